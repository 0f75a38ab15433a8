"""Stage: features of image sets and of references; the only stage of the metrics that opens images or needs a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires import layout, shards
from hires.config import Config
from hires.data.prompts import Prompt
from hires.errors import HiresError
from hires.execution.threads import allowed
from hires.files.storage import digest, remade, sha256
from hires.files.untrusted import member
from hires.shards import read_manifest
from hires.stages import VERSIONS, models
from hires.stages.images import image_sets

if TYPE_CHECKING:
    from hires.scenes import Camera


def run(
    config: Config,
    study: str,
    backbone: str,
    height: int,
    width: int,
    *,
    settings: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    device: str | None = None,
) -> None:
    """Extract the features of image sets that share study, backbone and size (pixels); those that still fit are kept.

    `settings`, `variants`: those of the study when None; `device`: a torch device, a GPU where there is one when None.
    Declared outputs: one `layout.features` per image set.
    """
    sets = image_sets(config, study, backbone, height, width, settings, variants)
    work = {layout.features(config, images): layout.image_shards(config, images) for images in sets}
    _extract(config, f"features {study} {backbone} {height}x{width}", work, "images", device)


def run_references(config: Config, height: int, width: int, device: str | None = None) -> None:
    """Extract the features of the references of one size. Declared output: `layout.reference_features`."""
    work = {layout.reference_features(config, height, width): [layout.reference_manifest(config, height, width)]}
    _extract(config, f"features references {height}x{width}", work, "references", device)


def read_manifests(paths: Sequence[Path], stage: str) -> list[dict[str, Any]]:
    """The images of some shards, each entry with its path under `file`."""
    return [
        {**entry, "file": member(path.parent, entry["file"])}
        for path in paths
        for entry in read_manifest(path, stage)["images"]
    ]


def _extract(config: Config, what: str, work: dict[Path, list[Path]], stage: str, device: str | None) -> None:
    import torch

    from hires.metrics import Source, crops_of, extract, load_clip, load_features, wants_aliased
    from hires.metrics.networks import clip_files

    weights = [sha256(file) for name in (config.metrics.features, config.metrics.clip) for file in clip_files(name)]
    settings, prompts = config.metrics, {p.id: p for p in shards.drawn(config)}
    models.quiet("transformers")
    torch.set_num_threads(allowed(config.compute.threads))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with shards.counted(what, len(work)) as made:
        for path, manifests in work.items():
            entries = read_manifests(manifests, stage)
            asked = [prompts[entry["id"]] for entry in entries]
            key = digest(
                {
                    "version": VERSIONS["features"],
                    "metrics": settings.model_dump(include={"features", "clip", "patch"}, mode="json"),
                    "crops": crops_of(settings) is not None,
                    "aliased": wants_aliased(settings.scores),
                    "weights": weights,
                    "images": [[entry["sha256"], prompt.prompt] for entry, prompt in zip(entries, asked)],
                }
            )
            if _fits(path, key):
                if path.stat().st_mtime_ns < max(manifest.stat().st_mtime_ns for manifest in manifests):
                    path.touch()  # for Snakemake: still newer than what it is made from
                continue
            with remade(stage, *manifests):
                features = extract(
                    [Source(entry["id"], entry["seed"], entry["file"], entry["sha256"]) for entry in entries],
                    [prompt.prompt for prompt in asked],
                    load_features(settings.features, place),
                    load_clip(settings.clip, place),
                    crops_of(settings),
                    _scenes(asked),
                    allowed(config.compute.threads),
                    wants_aliased(settings.scores),
                )
            features.metadata["key"] = key
            features.save(path)
            made.append(1)


def _fits(path: Path, key: str) -> bool:
    """Whether whole features with this key are there."""
    from hires.metrics import Features

    try:
        return path.exists() and Features.load(path).metadata["key"] == key
    except HiresError:
        return False


def _scenes(prompts: Sequence[Prompt]) -> "list[tuple[int, Camera]] | None":
    """Scene ids and cameras of prompts that are captions of scenes, None when one is not."""
    from hires.scenes import view_of_url

    urls = [prompt.url or "" for prompt in prompts]
    return [view_of_url(url) for url in urls] if all(url.startswith("scene://") for url in urls) else None
