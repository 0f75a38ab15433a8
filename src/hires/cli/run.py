"""Run every stage of configurations in this process, in order, without Snakemake; finished work is kept."""

import argparse
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[Path("config/config.yaml")], help="one or several, in their order"
    )
    parser.add_argument("--seconds", type=float, help="begin no shard of images that would end later; then collect")
    parser.add_argument("--backbone", action="append", help="name in backbones, repeatable; all when left out")


def run(args: argparse.Namespace) -> None:
    from hires import layout
    from hires.config import load_config
    from hires.stages import run

    configs = [load_config(path) for path in args.config]
    end = None if args.seconds is None else time.monotonic() + args.seconds
    for config in configs:
        backbones = args.backbone or [*config.backbones]
        if len(configs) > 1:
            backbones = [name for name in backbones if name in config.backbones]
        left = None if end is None else end - time.monotonic()
        complete = run.run(config, seconds=left, backbones=backbones)
        state = f"complete, see {layout.report(config)}" if complete else "not complete: another run goes on from here"
        print(f"{config.root}: {state}")
