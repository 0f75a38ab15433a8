"""One CPU thread for torch, here and in child processes: the tensors are small, and threads wait for a busy machine.

Triton's kernels run in its interpreter, compiled with `pytest -m gpu`. Both are chosen before torch and triton load.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    if config.getoption("markexpr") != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
