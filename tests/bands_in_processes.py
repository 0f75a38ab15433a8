"""What each of several processes does in test_kernels_band.py: its bands, which it stores."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from hires_kernels import NCCL, band_attention
from test_kernels_band import CASES, LARGE, inputs, own_part

folder, device = sys.argv[1:]
if device == "cuda":
    os.environ |= NCCL
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    cases, options, times = [(LARGE["grid"], (64, 64), (0, 128, 256))], LARGE, 20
else:
    dist.init_process_group("gloo")
    cases, options, times = [case for case in CASES if len(case[2]) == 4], {}, 1
rank, found = dist.get_rank(), {}
for grid, window, edges in cases:
    image, text, rope = inputs(**(options | {"grid": grid}), device=device)
    own, own_rope = own_part(image, rope, grid, window, edges, rank)
    first, *others = (
        band_attention(*own, grid=grid, window=window, edges=edges, text=text, rope=own_rope) for _ in range(times)
    )
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other)), "a race"
    found[grid] = first
torch.save(found, Path(folder) / f"{rank}.pt")
dist.destroy_process_group()
