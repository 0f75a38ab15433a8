"""Run every stage of a configuration in this process, in order, without Snakemake; finished work is kept."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.stages import run

    run.run(load_config(args.config))
