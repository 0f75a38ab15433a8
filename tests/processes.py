"""A test's script in several processes, which each store what they made."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def in_processes(script, count, folder, device="cpu"):
    """What every process stored in `folder`, by its rank, on the CPU; the run must end well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(script)), str(folder), device],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(count)]
