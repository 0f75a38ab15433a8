"""How the fused kernels are launched: tiles, warps and stages for each kernel, head dim and size of shared memory.

The table, `launches.json`, is committed and never tuned at run time: another launch sums in another order, so it gives
other bits. `hires speed tune` measures the candidates of `hires.speed.tune` and writes the fastest into it.

On Hopper no kernel of local attention walks over tiles as long as the head dim: ptxas of Triton 3.6 (CUDA 12.8) then
puts the queries, which stay in registers, and the weights of a step into the same ones, and results are wrong.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("launches.json")
TABLE: dict[str, dict[str, dict[str, dict[str, Any]]]] = json.loads(PATH.read_text())  # kernel, memory, head dim
LARGE = 227  # KiB of shared memory that a thread block can have on Hopper and datacentre Blackwell


@cache
def memory(device: torch.device) -> str:
    """The column of the table for a device: "227" KiB of shared memory, or "99", which every GPU since sm_80 has.

    The interpreter has no limit, and takes the larger tiles.
    """
    if device.type == "cpu":
        return str(LARGE)
    properties: Any = torch.cuda.get_device_properties(device)  # its type lacks the field
    return str(LARGE) if properties.shared_memory_per_block_optin >= LARGE * 1024 else "99"


def launch(kernel: str, head_dim: int, device: torch.device) -> dict[str, Any]:
    """The committed launch of a kernel."""
    return TABLE[kernel][memory(device)][str(head_dim)]


@contextmanager
def trying(kernel: str, head_dim: int, device: torch.device, candidate: Mapping[str, Any]) -> Iterator[None]:
    """Another launch for the time of a block."""
    column = TABLE[kernel][memory(device)]
    committed = column[str(head_dim)]
    column[str(head_dim)] = dict(candidate)
    try:
        yield
    finally:
        column[str(head_dim)] = committed


def text() -> str:
    """The table as the file holds it: a line for each head dim."""
    kernels = []
    for kernel, columns in TABLE.items():
        blocks = []
        for size, dims in columns.items():
            rows = ",\n".join(f'   "{dim}": {json.dumps(launch)}' for dim, launch in dims.items())
            blocks.append(f'  "{size}": {{\n{rows}\n  }}')
        kernels.append(f' "{kernel}": {{\n' + ",\n".join(blocks) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"
