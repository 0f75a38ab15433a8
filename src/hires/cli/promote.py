"""Copy what is finished into the tracked tree: a model into the package, results into results/reference.

  tiny-flux, tiny-sdxl, tiny-clip
              results/train/WHAT to src/hires/assets/WHAT, with tiny-vae from
              the same place inside, and without the adapter, which was made
              for other weights
  scale-dit   that adapter, in half precision, to
              src/hires/assets/tiny-flux/adapters/scale-dit
  results     scores, crops and records of the folder --from, never images, to
              stand beside those of other configurations; rows of a study that
              stood there are replaced
  costs       what `hires costs` measured in the folder --from, into such scores
  memory      the tables of results/memory, into the README as well
  speed       what `hires speed` measured on a GPU, into the README as well

Example:

  hires promote results --from results/evaluation
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from hires.errors import HiresError, unknown
from hires.files.storage import replacing

ADAPTER_BYTES = 2 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help="tiny-flux, tiny-sdxl, tiny-clip, scale-dit, results, costs, memory or speed")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="folder to copy (default: results/train/WHAT, results/memory or results/speed)",
    )


def run(args: argparse.Namespace) -> None:
    names = ("tiny-flux", "tiny-sdxl", "tiny-clip", "scale-dit", "results", "costs", "memory", "speed")
    if args.what not in names:
        raise unknown("thing to promote", args.what, names)
    if args.what in ("results", "costs"):
        if args.source is None:
            raise HiresError(f"promote {args.what} needs --from, a results folder such as results/embedded")
        _promote_results(args.source, args.what)
        return
    if args.what == "memory":
        from hires import memory
        from hires.analysis.reference import seal

        print(memory.promote(args.source or memory.ROOT))
        seal()
        return
    if args.what == "speed":
        _promote_speed(args.source or Path("results/speed"))
        return
    source = args.source or Path("results/train") / args.what
    if not (source / "training.json").is_file():
        raise HiresError(f"{source} holds no finished model (no training.json): train one with `hires train`")
    from hires.models import ASSETS, HINTS

    if args.what == "scale-dit":
        _promote_adapter(source, ASSETS / "tiny-flux")
        return
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


def _promote_adapter(source: Path, model: Path) -> None:
    from safetensors.torch import load_file, save_file

    from hires.additions.lora import WEIGHTS, metadata
    from hires.backbones.loading import revision

    trained_on = json.loads((source / "training.json").read_text()).get("revision")
    if trained_on != revision(model):
        raise HiresError(f"{source} was trained on other weights than {model} has: train it again")
    weights = {key: x.half() for key, x in load_file(source / WEIGHTS).items()}
    size = sum(x.nbytes for x in weights.values())
    if size > ADAPTER_BYTES:
        raise HiresError(f"{source}: {size / 2**20:.1f} MiB in half precision, at most 2 are embedded; lower lora.rank")
    target = model / "adapters" / "scale-dit"
    with replacing(target / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata(source / WEIGHTS))
    shutil.copy(source / "training.json", target)
    print(f"{target}: {size / 2**20:.1f} MiB")


def _promote_results(source: Path, what: str) -> None:
    from hires.analysis.reference import REFERENCE, TABLES, image_sets, promote, promote_costs

    former = image_sets(REFERENCE / TABLES[0])
    studies = promote(source) if what == "results" else promote_costs(source)
    sets = image_sets(REFERENCE / TABLES[0])
    for name in studies:
        print(f"{name}: {sets[name]} image sets, {former[name]} before")
    size = sum(f.stat().st_size for f in REFERENCE.rglob("*") if f.is_file()) / 2**20
    print(f"{REFERENCE}: {size:.1f} MiB in all")


def _promote_speed(source: Path) -> None:
    from hires.analysis.reference import REFERENCE, seal
    from hires.speed.summary import promote

    promote(source, REFERENCE / "speed", Path("README.md"))
    seal()
    print(REFERENCE / "speed")
