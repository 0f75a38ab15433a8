"""Draw the prompts of a configuration from its source, and say what each filter dropped.

--freeze also writes the list of what was drawn, without captions, for prompts.frozen to replay: LAION loses rows.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="configuration")
    parser.add_argument("--freeze", type=Path, metavar="FILE", help="write the frozen list to this JSON file")


def run(args: argparse.Namespace) -> None:
    from hires.config import load_config
    from hires.data.prompts import LONG, freeze, read_counts
    from hires.stages import prompts

    path = prompts.run(load_config(args.config))
    counts = read_counts(path)
    dropped = ", ".join(f"{name} {n}" for name, n in counts["dropped"].items())
    long = counts[f"over_{LONG}_characters"]
    cut = f"; {long} longer than {LONG} characters: encoders cut them" if long else ""
    if "frozen" in counts:
        lost = f"{counts['missing']} gone from the source, {counts['changed']} with another caption"
        print(f"{path}: {counts['drawn']} of {counts['frozen']} frozen prompts ({lost}){cut}")
    else:
        print(f"{path}: {counts['drawn']} prompts of {counts['rows']} rows (dropped: {dropped}){cut}")
    if args.freeze:
        print(f"{args.freeze}: {freeze(path, args.freeze)} prompts, frozen")
