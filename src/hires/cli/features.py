"""Extract the features of image sets, or of the reference images of one size, for the scores."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")
    parser.add_argument("--references", action="store_true", help="the references of this size; no study, no backbone")
    parser.add_argument("--study", help="study of the configuration")
    parser.add_argument(
        "--setting", action="append", help="setting of the study; may be given again; all when left out"
    )
    parser.add_argument("--backbone", help="backbone of the study")
    parser.add_argument(
        "--variant", action="append", help="variant of the study; may be given again; all when left out"
    )
    parser.add_argument("--height", type=int, required=True, help="pixels")
    parser.add_argument("--width", type=int, required=True, help="pixels")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; compute.device of the configuration when left out")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.errors import HiresError
    from hires.stages import features

    config = load_config(args.config)
    if args.references:
        features.run_references(config, args.height, args.width, device=args.device)
        return
    if not (args.study and args.backbone):
        raise HiresError("say which features: --study and --backbone, or --references")
    features.run(
        config,
        args.study,
        args.backbone,
        args.height,
        args.width,
        settings=args.setting,
        variants=args.variant,
        device=args.device,
    )
