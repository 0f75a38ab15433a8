"""Make one shard of base latents, which all variants of a prompt start from; finished ones are kept."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")
    parser.add_argument("--backbone", required=True, help="name in the configuration's backbones")
    parser.add_argument("--name", required=True, help="set of base latents, <height>x<width>-<key>, as in its path")
    parser.add_argument("--shard", type=int, required=True, help="number of the shard, from 0")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.stages import base

    base.run(load_config(args.config), args.backbone, args.name, args.shard)
