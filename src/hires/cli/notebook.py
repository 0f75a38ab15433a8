"""Run one notebook on the results of a configuration, through papermill."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")
    parser.add_argument("--name", required=True, help="name in the configuration's notebooks, such as 02_ablation")
    parser.add_argument("--results", type=Path, help="folder to read; default: the configuration's own results")
    parser.add_argument("--output", type=Path, help="folder for tables/ and figures/; default: the results")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.stages import notebook

    notebook.run(load_config(args.config), args.name, results=args.results, output=args.output)
