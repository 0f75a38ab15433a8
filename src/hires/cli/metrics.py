"""Collect the scores of a configuration in metrics.parquet, and compare its variants in paired.parquet."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")


def run(args: argparse.Namespace) -> None:
    from hires import layout
    from hires.config import load_config
    from hires.stages import metrics

    config = load_config(args.config)
    metrics.run(config)
    print(f"{layout.metrics(config)}, {layout.paired(config)}")
