"""One CPU thread for torch, here and in child processes: the tensors are small, and threads wait for a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
