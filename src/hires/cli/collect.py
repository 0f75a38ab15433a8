"""Bring together scores of one configuration that several machines made; the images stay where they are."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="configuration")
    parser.add_argument("--from", dest="sources", type=Path, nargs="+", required=True, help="results/<name> of each")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.files.storage import claim
    from hires.provenance import store_config
    from hires.stages import collect, metrics, provenance

    config = load_config(args.config)
    with claim(config.root):
        taken = collect.run(config, args.sources)
        store_config(config)
        missing = metrics.unscored(config)
        if len(missing) < len(config.image_sets()):
            metrics.run(config, partial=True)
        provenance.run(config, partial=True)
    print(f"{config.root}: {len(taken)} image sets taken, {len(missing)} missing")
