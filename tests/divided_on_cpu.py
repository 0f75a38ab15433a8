"""What each of several processes does in test_parallel.py: makes latents and an image, and stores its own."""

import sys
from pathlib import Path

import torch
from test_parallel import made

from hires.execution import parallel

with parallel.joined("cpu" if sys.argv[2] == "cpu" else None) as device:
    torch.save(made(device), Path(sys.argv[1]) / f"{parallel.dist.get_rank()}.pt")
