"""Extract the features of image sets, or of the reference images of one size, for the scores."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")
    parser.add_argument("--size", required=True, help="height x width in pixels, such as 512x768")
    parser.add_argument("--references", action="store_true", help="the references of this size; no study, no backbone")
    parser.add_argument("--study", help="name in the configuration's studies")
    parser.add_argument("--backbone", help="name in the configuration's backbones")
    parser.add_argument("--setting", action="append", help="setting of the study, repeatable; all when left out")
    parser.add_argument("--variant", action="append", help="variant of the study, repeatable; all when left out")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.errors import HiresError
    from hires.execution.devices import locked_device
    from hires.sizes import parse_size
    from hires.stages import features

    config, size = load_config(args.config), parse_size(args.size)
    with locked_device(config.compute.device) as device:
        if args.references:
            features.run_references(config, *size, device=device)
        elif args.study and args.backbone:
            names = {"settings": args.setting, "variants": args.variant}
            features.run(config, args.study, args.backbone, *size, **names, device=device)
        else:
            raise HiresError("which features? Give --study and --backbone, or --references")
