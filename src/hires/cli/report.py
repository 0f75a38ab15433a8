"""Write one self-contained HTML page: what was run, tables, figures, and a gallery to compare variants in."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")
    parser.add_argument("--lossless-prompts", type=int, default=2, help="prompts of the gallery stored without loss")
    parser.add_argument("--max-megabytes", type=float, default=40, help="size that the gallery may reach, MB")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.stages import report

    config = load_config(args.config)
    report.run(config, lossless_prompts=args.lossless_prompts, max_megabytes=args.max_megabytes)
