"""Seconds and peak memory of every stage from a prompt to a decoded image, for full-size models with random weights.

Rows that are there already are kept: a run that was cut goes on. Without a GPU the small architectures run instead.

  hires memory --rows 'flux-dev-24*,sdxl-12*'
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/memory.yaml"), help="what is measured")
    parser.add_argument("--rows", default="", help="comma-separated names or patterns of rows; default: all")
    parser.add_argument("--plan", action="store_true", help="only list the rows, with about how long each takes")
    parser.add_argument("--out", type=Path, default=Path("results/memory"), help="folder of rows and tables")


def run(args: argparse.Namespace) -> None:
    from hires import memory
    from hires.execution.devices import gpus

    settings, gpu = memory.load_memory(args.config), bool(gpus())
    loads = settings.loads if gpu or args.plan else settings.without_gpu
    folder = args.out if gpu else args.out / "cpu"
    wanted = memory.rows(loads, [name.strip() for name in args.rows.split(",") if name.strip()])
    if args.plan:
        print(memory.plan(loads, wanted, settings.steps))
        return
    if not gpu:
        print("No GPU: the small architectures stand in, which says nothing of the large ones.", flush=True)
    try:
        memory.measure(loads, wanted, settings.steps, folder)
    finally:
        print(memory.write_tables(folder))
