"""Stage: what made the results of a configuration, in one file."""

from collections.abc import Iterator
from typing import Any

from hires import layout, provenance
from hires.config import Config
from hires.files.storage import digest, write_json
from hires.provenance.schema import Manifest, Provenance
from hires.shards import drawn, read_manifest
from hires.stages import VERSIONS, collect, models


def run(config: Config, partial: bool = False) -> None:
    """Write `layout.provenance` (`provenance.schema.Provenance`): this process's own record, and what the shards say.

    Image sets that were collected count as well. `partial`: what isn't there yet is left aside.
    """
    runs: dict[str, dict[str, Any]] = {}
    made: dict[str, dict[str, Any]] = {}
    images, seconds, seeds = 0, 0.0, set()
    for manifest in _manifests(config, partial):
        for origin in manifest.provenance:
            found = origin.model_dump(exclude_unset=True)
            runs.setdefault(digest(found), found)
        if manifest.backbone and manifest.images:
            entry = config.backbones[manifest.backbone]
            made[manifest.backbone] = {
                **models.identity(entry), "revision": origin.revision, "files": origin.files
            }  # fmt: skip
        images += len(manifest.images)
        seconds += sum(image.seconds or 0.0 for image in manifest.images)
        seeds |= {image.seed for image in manifest.images}
    for record in collect.records(config):
        runs |= {digest(found): found for found in record["runs"]}
        made |= record["models"]
        images += record["images"]["n"]
        seconds += record["images"]["seconds"]
        seeds |= {*record["images"]["seeds"]}
    ids = [prompt.id for prompt in drawn(config)]
    facts = {
        "stages": VERSIONS,
        "configuration": provenance.config_data(config),
        "models": made,
        "prompts": {"n": len(ids), "digest": digest(ids)},
        "images": {"n": images, "seconds": round(seconds, 1), "seeds": sorted(seeds)},
        "runs": list(runs.values()),
    }
    path, record = layout.provenance(config), provenance.record(config, **facts)
    Provenance.of(record, path)
    write_json(path, record)


def _manifests(config: Config, partial: bool) -> Iterator[Manifest]:
    """All manifests of base latents, then those of images, one at a time."""
    elsewhere = collect.elsewhere(config)
    for base in layout.base_sets(config):
        for path in layout.base_shards(config, base):
            if path.exists() or not (partial or elsewhere):
                yield Manifest.of(read_manifest(path, "base"), path)
    for images in config.image_sets():
        for path in layout.image_shards(config, images) if images not in elsewhere else []:
            if path.exists() or not partial:
                yield Manifest.of(read_manifest(path, "images"), path)
