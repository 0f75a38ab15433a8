"""Score image sets from their features, with intervals over resampled prompts."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")
    parser.add_argument("--study", required=True, help="study of the configuration")
    parser.add_argument(
        "--setting", action="append", help="setting of the study; may be given again; all when left out"
    )
    parser.add_argument("--backbone", required=True, help="backbone of the study")
    parser.add_argument(
        "--variant", action="append", help="variant of the study; may be given again; all when left out"
    )
    parser.add_argument("--height", type=int, required=True, help="pixels")
    parser.add_argument("--width", type=int, required=True, help="pixels")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.stages import scores

    config = load_config(args.config)
    scores.run(config, args.study, args.backbone, args.height, args.width, settings=args.setting, variants=args.variant)
