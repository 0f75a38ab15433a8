"""Draw the prompts of a configuration from its source, and say what each filter dropped."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.prompts import LONG, read_counts
    from hires.stages import prompts

    path = prompts.run(load_config(args.config))
    counts = read_counts(path)
    dropped = ", ".join(f"{name} {n}" for name, n in counts["dropped"].items())
    long = counts[f"over_{LONG}_characters"]
    cut = f"; {long} longer than {LONG} characters: encoders cut them" if long else ""
    print(f"{path}: {counts['drawn']} prompts of {counts['rows']} rows (dropped: {dropped}){cut}")
