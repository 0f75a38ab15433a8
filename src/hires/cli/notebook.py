"""Run one notebook on the results of a configuration, through papermill."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")
    parser.add_argument("--name", required=True, help="name in the configuration's notebooks, such as 02_ablation")
    parser.add_argument("--results", type=Path, help="folder to read; default: the configuration's own results")
    parser.add_argument("--output", type=Path, help="folder for tables/ and figures/; default: the results")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a value of its parameters cell, over the configuration's; e.g. study=variants; repeatable",
    )


def run(args: argparse.Namespace) -> None:
    from hires.cli.generate import parse_settings
    from hires.config import load_config
    from hires.stages import notebook

    config = load_config(args.config)
    given = {name: _value(name, text) for name, text in parse_settings(args.set).items()}
    notebook.run(config, args.name, results=args.results, output=args.output, given=given)


def _value(name: str, text: str) -> Any:
    """The value as YAML reads it: 3 is a number, [a, b] a list."""
    import yaml

    from hires.errors import HiresError

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise HiresError(f"--set {name}={text}: not a value that YAML knows; quote text as '\"…\"'") from error
