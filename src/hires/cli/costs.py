"""Measure seconds and memory of image sets, one after the other, in batches of which nothing is kept.

Let nothing else run on the machine meanwhile. `hires run` (or `hires metrics`) then takes these in place of what the
images took while they were made, and `hires promote costs --from results/<config>` into scores that were promoted
before.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[Path("config/config.yaml")], help="one or several, in their order"
    )
    parser.add_argument("--backbone", action="append", help="name in backbones, repeatable; all when left out")
    parser.add_argument("--study", action="append", help="name in studies, repeatable; all when left out")
    parser.add_argument(
        "--batches", type=int, default=3, help="of 32 images, after one to warm up (default: 3); more narrow intervals"
    )
    parser.add_argument("--seconds", type=float, help="begin no image set that would end later")


def run(args: argparse.Namespace) -> None:
    import time

    from hires.config import load_config
    from hires.files.storage import claim
    from hires.provenance import store_config
    from hires.stages import costs

    end = None if args.seconds is None else time.monotonic() + args.seconds
    for config in [load_config(path) for path in args.config]:
        left = None if end is None else end - time.monotonic()
        with claim(config.root):
            store_config(config)
            missing = costs.run(config, backbones=args.backbone, studies=args.study, seconds=left, batches=args.batches)
        print(f"{config.root}: {'all measured' if not missing else f'{missing} image sets are left'}")
