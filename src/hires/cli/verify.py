"""Check that results are as they were made: recompute the hashes of all files, and compare the records.

  hires verify results/embedded --again 3

One line per difference: missing; changed; extra, listed nowhere; other, made by another version, commit, configuration
or model. Exit code: 0 without a difference, 1 with one, 2 for bad input.
"""

import argparse
from pathlib import Path

from hires.errors import HiresError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("results/embedded"),
        help="results of a configuration, or reference",
    )
    parser.add_argument("--again", type=int, default=0, metavar="N", help="images to make again, to compare the pixels")
    parser.add_argument("--seed", type=int, default=0, help="draws the images of --again")
    parser.add_argument("--device", help="torch device of --again; default: cuda where there is one, else cpu")


def run(args: argparse.Namespace) -> int:
    from hires.provenance import records
    from hires.provenance.verify import Difference, again, verify

    if args.again < 0:
        raise HiresError(f"--again {args.again}: give a number of images, 0 or more")
    folder, differences = verify(args.folder)
    for difference in differences:
        print(difference)
    if not any(name.startswith("images/") for name in folder.records):
        print(f"{args.folder}: no images here: only scores and records were checked")
    if args.again:
        for name, verdict in again(folder, args.again, args.seed, args.device):
            print(f"again: {name}: {verdict}")
            if verdict != records.SAME:
                differences.append(Difference("other", name, verdict))
    print(folder.summary(differences))
    return 1 if differences else 0
