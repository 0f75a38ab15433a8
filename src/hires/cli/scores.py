"""Score image sets from their features, with intervals over resampled prompts."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")
    parser.add_argument("--study", required=True, help="name in the configuration's studies")
    parser.add_argument("--backbone", required=True, help="name in the configuration's backbones")
    parser.add_argument("--size", required=True, help="height x width in pixels, such as 512x768")
    parser.add_argument("--setting", action="append", help="setting of the study, repeatable; all when left out")
    parser.add_argument("--variant", action="append", help="variant of the study, repeatable; all when left out")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.sizes import parse_size
    from hires.stages import scores

    names = {"settings": args.setting, "variants": args.variant}
    scores.run(load_config(args.config), args.study, args.backbone, *parse_size(args.size), **names)
