"""What each of three processes does in test_kernels_band.py: its band of every case, which it stores."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from hires_kernels import band_attention
from test_kernels_band import CASES, inputs, own_part

dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
for grid, window, edges in (case for case in CASES if len(case[2]) == 4):
    image, text, rope = inputs(grid)
    own, own_rope = own_part(image, rope, grid, window, edges, rank)
    found[grid] = band_attention(*own, grid=grid, window=window, edges=edges, text=text, rope=own_rope)
torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")
dist.destroy_process_group()
