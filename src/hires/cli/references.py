"""Make the reference images of one size: scenes are rendered, web addresses downloaded; finished ones are kept."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")
    parser.add_argument("--size", required=True, help="height x width in pixels, such as 512x768")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.sizes import parse_size
    from hires.stages import references

    references.run(load_config(args.config), *parse_size(args.size))
