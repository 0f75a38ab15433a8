"""Copy a finished model into the package, or the results of a full evaluation into results/reference.

`hires promote tiny-flux` takes results/train/tiny-flux to src/hires/assets/tiny-flux, with tiny-vae from the same
place inside; `hires promote results --from results/evaluation` takes tables, figures, scores and the records, never
images. Nothing else writes tracked files.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from hires.errors import HiresError, unknown

REFERENCE = Path("results/reference")
KEPT = ("metrics.parquet", "paired.parquet", "prompts.parquet", "provenance.json", "config.yaml", "tables", "figures")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help="tiny-flux, tiny-sdxl, tiny-clip or results")
    parser.add_argument("--from", dest="source", type=Path, help="folder to copy (default results/train/WHAT)")


def run(args: argparse.Namespace) -> None:
    names = ("tiny-flux", "tiny-sdxl", "tiny-clip", "results")
    if args.what not in names:
        raise unknown("thing to promote", args.what, names)
    if args.what == "results":
        if args.source is None:
            raise HiresError("promote results needs --from, a results folder such as results/embedded")
        _promote_results(args.source)
        return
    source = args.source or Path("results/train") / args.what
    if not (source / "training.json").is_file():
        raise HiresError(f"{source} holds no finished model (no training.json): train one with `hires train`")
    from hires.models import ASSETS, HINTS

    target = ASSETS / args.what
    ASSETS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ASSETS) as temporary:
        fresh = Path(temporary) / args.what
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns("samples.png"))
        if args.what in HINTS:
            (fresh / "hires.json").write_text(json.dumps(HINTS[args.what], indent=1) + "\n")
            vae = source.parent / "tiny-vae"
            if not (fresh / "vae").is_dir():
                raise HiresError(f"{source} has no vae folder: it is not a complete pipeline")
            if (vae / "config.json").is_file():
                shutil.copy(vae / "training.json", fresh / "vae" / "training.json")
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    print(f"{target}: {sum(f.stat().st_size for f in target.rglob('*')) / 2**20:.1f} MiB")


def _promote_results(source: Path) -> None:
    if not (source / "metrics.parquet").is_file():
        raise HiresError(f"{source} holds no metrics.parquet: finish the run first")
    for name in KEPT:
        path, target = source / name, REFERENCE / name
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        elif path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    print(f"{REFERENCE}: {sum(f.stat().st_size for f in REFERENCE.rglob('*')) / 2**20:.1f} MiB")
