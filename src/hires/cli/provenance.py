"""Write down what made the results of a configuration: code, versions, machines, models, seeds."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.stages import provenance

    provenance.run(load_config(args.config))
