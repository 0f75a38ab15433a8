"""Measure time on this machine's GPU, everything in one run.

`hires speed kernels` compares the attention backends of hires_kernels with each other, with dense attention through
cuDNN ("dense") and with gathered windows through cuDNN ("sdpa", "sdpa-compiled"), on the layers of FLUX and SDXL.
`hires speed orders` compares the orders of tokens for Scale-DiT's kernel, with --traffic in gigabytes as well.
`hires speed tune` measures other tiles, warps and stages for our own kernels, and with --write commits the fastest.

Example: hires speed kernels --shapes npa-flux-4096,sdxl1 --backends triton,sdpa --accuracy
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=["kernels", "orders", "tune"], help="what is measured")
    parser.add_argument(
        "--shapes",
        default="",
        help="comma-separated names, patterns or words, e.g. npa-flux-4096,sdxl1,*-8192; default: all",
    )
    parser.add_argument("--backends", default="", help="comma-separated; default: all")
    parser.add_argument("--kernels", default="", help="tune: comma-separated kernels of launches.json; default: all")
    parser.add_argument("--write", action="store_true", help="tune: write the fastest launches into launches.json")
    parser.add_argument("--traffic", action="store_true", help="orders: read L2 and DRAM traffic with Nsight Compute")
    parser.add_argument("--repeats", type=int, default=50, help="calls of each, fewer beyond 3 seconds (default: 50)")
    parser.add_argument("--accuracy", action="store_true", help="also the error of sampled rows against float64")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for the shapes called tiny (default: cuda)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/speed/kernels.csv"), help="CSV (default: results/speed/kernels.csv)"
    )


def run(args: argparse.Namespace) -> None:
    from hires.errors import HiresError

    if args.repeats < 1:
        raise HiresError(f"--repeats {args.repeats}: must be at least 1")

    if args.what != "kernels":
        return {"orders": _orders, "tune": _tune}[args.what](args)

    from hires.speed import kernels
    from hires.storage import write_text

    device, shapes, names = kernels.check(args.device, _items(args.shapes), _items(args.backends))
    found = []
    print(kernels.HEADER)
    for row in kernels.measure(device, shapes, names, args.repeats, args.accuracy):
        found.append(row)
        print(kernels.line(row), flush=True)
        write_text(args.out, kernels.table(found))  # after every row: a run takes minutes
    print(args.out, file=sys.stderr)


def _orders(args: argparse.Namespace) -> None:
    import torch

    from hires.speed import orders

    shapes = orders.check(_items(args.shapes), args.device, args.traffic)
    print(orders.HEADER)
    for row in orders.measure(shapes, torch.device(args.device), args.repeats, args.traffic):
        print(orders.line(row), flush=True)


def _tune(args: argparse.Namespace) -> None:
    import torch

    from hires.speed import tune

    kernels, device = tune.check(_items(args.kernels), args.device), torch.device(args.device)
    found = []
    print(tune.HEADER)
    for row in tune.tune(kernels, args.repeats, device):
        found.append(row)
        print(tune.line(row), flush=True)
    chosen = tune.better(found)
    for (kernel, head_dim), launch in chosen.items():
        print(f"{kernel} {head_dim}: faster with {launch}")
    if args.write:
        tune.write(chosen, device)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
