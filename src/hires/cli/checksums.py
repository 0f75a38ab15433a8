"""Write SHA256SUMS over everything that a configuration made; `hires verify` checks it."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")


def run(args: argparse.Namespace) -> None:
    from hires import layout
    from hires.config import load_config
    from hires.stages import checksums

    config = load_config(args.config)
    checksums.run(config)
    print(layout.checksums(config))
