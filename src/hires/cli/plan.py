"""What a configuration will make: images, steps, the share of the schedule that τ keeps, about how long it takes."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.stages.plan import describe

    print(describe(load_config(args.config)))
