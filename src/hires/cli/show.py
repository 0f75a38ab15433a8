"""Show how an image came to be, from the record that its PNG or TIFF carries, or make it once more from that record.

  hires show rings.png --again rings-again.png

Exit code: 0; with --again 1 if the pixels differ; 2 for bad input.
"""

import argparse
import json
from pathlib import Path

from hires.errors import HiresError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="PNG of hires generate, or PNG or TIFF of the images stage")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="the record as it is in the file")
    output.add_argument("--again", type=Path, metavar="OUT.png", help="make the image again, and compare the pixels")
    again = parser.add_argument_group("with --again")
    again.add_argument("--image", type=Path, help="your own picture, where the image was made from one")
    again.add_argument(
        "--with", dest="files", action="append", default=[], type=Path, metavar="PATH",
        help="file or folder of what was added to the model, or of its picture; known by its SHA-256; repeatable",
    )  # fmt: skip
    again.add_argument("--model", help="where the model is now: a name, folder or hub id; default: as recorded")
    again.add_argument(
        "--config", type=Path, help="configuration of the images stage; default: that of the results folder of FILE"
    )
    again.add_argument("--device", help="torch device; default: cuda where there is one, else cpu")


def run(args: argparse.Namespace) -> int:
    from hires.provenance.records import describe, read

    record = read(args.file)
    if args.again:
        return again(args, record)
    for name, given in (
        ("image", args.image), ("with", args.files), ("model", args.model), ("config", args.config),
        ("device", args.device),
    ):  # fmt: skip
        if given:
            raise HiresError(f"--{name} goes with --again OUT.png, which makes the image once more")
    print(json.dumps(record, indent=1) if args.json else describe(record))
    return 0


def again(args: argparse.Namespace, record: dict) -> int:
    """Make the image of `record` once more; 0 where its pixels are those of the file, else 1."""
    from hires.additions import Additions, AdditionsRecord
    from hires.cli.generate import ProgressBar
    from hires.config import load_config
    from hires.files.storage import write_bytes
    from hires.files.untrusted import read_picture
    from hires.provenance import read_stored, records
    from hires.stages.images import encode

    if args.again.suffix.lower() != ".png":
        raise HiresError(f"--again {args.again}: give a name that ends with .png")
    if not args.again.parent.is_dir():
        raise HiresError(f"--again {args.again}: the folder {args.again.parent} does not exist")
    if args.again.resolve() == args.file.resolve():
        raise HiresError(f"--again {args.again}: that is the image itself: choose another name")
    config, place = None, records.configuration(args.file)
    if "study" in record and args.config:
        config = load_config(args.config)
    elif "study" in record and place:
        config = read_stored(place)
    recipe = records.recipe(record, config)
    picture = records.own_picture(recipe, args.image)
    additions = Additions.found(recipe.additions or AdditionsRecord(), args.files)
    former = read_picture(args.file, args.file)

    if config is not None:  # another number of threads may move the last bits
        import torch

        torch.set_num_threads(config.compute.threads)
    backbone = records.load(recipe, args.model, args.device, additions)
    with ProgressBar() as progress:
        image, now = records.make(recipe, backbone, picture, progress.update, additions)
    write_bytes(args.again, encode(image, "png", now))
    verdict = records.compare(former, image)
    print(f"{args.again}: {verdict}")
    if verdict == records.SAME:
        return 0
    for name, version in now["versions"].items():
        if recipe.versions.get(name, version) != version:
            print(f"{name} was {recipe.versions[name]}, is {version}")
    return 1
