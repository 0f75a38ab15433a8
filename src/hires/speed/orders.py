"""`hires speed orders`: what the order of tokens is worth to Scale-DiT's kernel, in time and in memory traffic.

The kernel reads two-dimensional tiles of the grid, so an order is the sequence in which tiles of queries are served:
it changes no result, only what the L2 cache still holds. Traffic comes from the hardware counters through Nsight
Compute, one process for each order: `python -m hires.speed.orders SHAPE ORDER` makes the calls that it looks at.
"""

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import hires_kernels
import torch
from hires_kernels.orders import ORDERS

from hires.errors import HiresError
from hires.speed.inputs import Inputs, make, turns
from hires.speed.shapes import SHAPES, Shape, choose, device_for
from hires.speed.timing import milliseconds

Row = dict[str, Any]
COUNTERS = {  # ours -> Nsight Compute's
    "l2_gb": ("lts__t_bytes.sum",),
    "dram_gb": ("dram__bytes_read.sum", "dram__bytes_write.sum"),
}
WARM_UP = 2  # calls before the counted one
HEADER = f"{'shape':<17} {'order':<8} {'ms':>9} {'L2 GB':>8} {'DRAM GB':>8}"


def check(shapes: Sequence[str], device: str, traffic: bool) -> tuple[torch.device, list[Shape]]:
    """The device and the layers that are meant; HiresError where one has no order, or what is needed isn't there."""
    chosen = choose(shapes or ["local-flux-*"])
    for shape in chosen:
        if shape.method != "local":
            allowed = ", ".join(name for name, shape in SHAPES.items() if shape.method == "local")
            raise HiresError(f"shape {shape.name}: neighborhood patch attention has no order: allowed: {allowed}")
    place = device_for(chosen, device)
    if traffic and shutil.which("ncu") is None:
        raise HiresError("--traffic needs Nsight Compute: put ncu on the PATH, or leave the option out")
    return place, chosen


def measure(shapes: Sequence[Shape], device: torch.device, repeats: int, traffic: bool) -> Iterator[Row]:
    """A row for each shape and order: milliseconds of image and text rows, gigabytes where `traffic` is asked for."""
    for shape in shapes:
        sets = turns(shape, device)
        for order in ORDERS:
            program = partial(_program, shape, sets, order)
            row = {"shape": shape.name, "order": order, "ms": median(milliseconds(program, device, repeats, len(sets)))}
            yield row | (_traffic(shape, order) if traffic else {})


def _program(shape: Shape, sets: Sequence[Inputs], order: str, index: int) -> Any:
    return call(shape, sets[index % len(sets)], order)


def call(shape: Shape, inputs: Inputs, order: str) -> Any:
    """One layer, on the backend that "auto" takes."""
    return hires_kernels.local_attention(
        *inputs.image,
        grid=shape.grid,
        radius=shape.radius,
        text=inputs.text,
        guidance=inputs.guidance,
        guidance_grid=shape.guidance_grid,
        order=order,
    )


def _traffic(shape: Shape, order: str) -> Row:
    metrics = ",".join(name for names in COUNTERS.values() for name in names)
    command = [
        *("ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--metrics", metrics),
        *("--kernel-name-base", "function", "--kernel-name", "regex:_forward|_combine", "--profile-from-start", "off"),
        *(sys.executable, "-m", "hires.speed.orders", shape.name, order),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        return {"reason": f"ncu: {''.join(last)}"}
    return gigabytes(done.stdout)


def gigabytes(report: str) -> Row:
    """The counters of a report of `ncu --csv --print-units base`, summed over its kernels."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    totals = dict.fromkeys(COUNTERS, 0.0)
    for record in csv.DictReader(lines[start:]):
        for name, metrics in COUNTERS.items():
            if record["Metric Name"] in metrics:
                totals[name] += float(record["Metric Value"].replace(",", "")) / 1e9
    return totals


def line(row: Row) -> str:
    """A row for the terminal."""
    gb = "".join(f" {row[name]:8.2f}" if name in row else " " * 9 for name in COUNTERS)
    return f"{row['shape']:<17} {row['order']:<8} {row['ms']:9.3f}{gb} {row.get('reason', '')}".rstrip()


def main(name: str, order: str) -> None:
    """Warm up, then one call between the marks that the profiler looks for."""
    shape = SHAPES[name]
    inputs = make(shape, torch.device("cuda"), seed=0)
    for _ in range(WARM_UP):
        call(shape, inputs, order)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    call(shape, inputs, order)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main(*sys.argv[1:])
