"""Every stage of a configuration in one process, in order: what the Snakefile does, where Snakemake is missing."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hires import layout
from hires.config import Config, parse_size
from hires.devices import locked_device
from hires.provenance import other_versions, store_config
from hires.stages import (
    VERSIONS,
    base,
    checksums,
    features,
    images,
    metrics,
    notebook,
    prompts,
    provenance,
    references,
    report,
    scores,
)
from hires.storage import claim, not_ahead


def run(config: Config) -> None:
    """Make everything of a configuration; each model is loaded once.

    Finished files are kept. Tables and pages are made again when they are older than what they are made from, or than
    the last change of the configuration.
    """
    notebook.check_all(config)
    with claim(config.root):
        not_ahead(layout.made(config))
        _run(config)


def _run(config: Config) -> None:
    changed = store_config(config)
    other = other_versions(config)
    for stage, version in other.items():
        print(f"{stage}: version {version} made it, and is {VERSIONS[stage]} now: made again", file=sys.stderr)
    if _old([layout.prompts(config)], [changed], "prompts" in other):
        prompts.run(config)
    with locked_device(config.compute.device) as device:
        for height, width, _ in layout.references(config):
            references.run(config, height, width)
        for backbone in config.backbones:
            _make(config, backbone, device)
        for height, width, _ in layout.references(config):
            features.run_references(config, height, width, device=device)
        for study, entry in config.studies.items():
            for backbone in entry.backbones:
                for size in entry.sizes:
                    _measure(config, study, backbone, *parse_size(size), changed, device, "scores" in other)
    tables = [layout.metrics(config), layout.paired(config)]
    made_from = [changed, *(layout.scores(config, made) for made in config.image_sets())]
    if _old(tables, made_from, "metrics" in other):
        metrics.run(config)
    provenance.run(config)
    for name in config.notebooks:
        made_from = [changed, *tables, notebook.NOTEBOOKS / f"{name}.ipynb"]
        if _old([layout.notebook(config, name)], made_from, "notebook" in other):
            notebook.run(config, name)
    report.run(config)
    checksums.run(config)


def _make(config: Config, backbone: str, device: str) -> None:
    """All base latents and images of one backbone."""
    for latents in layout.base_sets(config):
        if latents.backbone == backbone:
            for shard in layout.shards(config, latents.n):
                base.run(config, backbone, latents.name, shard, device=device)
    for study, entry in config.studies.items():
        if backbone in entry.backbones:
            for size, n in entry.sizes.items():
                for shard in layout.shards(config, n):
                    images.run(config, study, backbone, *parse_size(size), shard, device=device)


def _measure(
    config: Config, study: str, backbone: str, height: int, width: int, changed: Path, device: str, anew: bool
) -> None:
    """Features and scores of the image sets of one study, backbone and size; `anew`: scores in any case."""
    features.run(config, study, backbone, height, width, device=device)
    sets = images.image_sets(config, study, backbone, height, width)
    made_from = [changed, layout.reference_features(config, height, width)]
    made_from += [path for made in sets for path in (layout.features(config, made), *layout.image_shards(config, made))]
    targets = [path for made in sets for path in (layout.scores(config, made), layout.image_scores(config, made))]
    if _old(targets, made_from, anew):
        scores.run(config, study, backbone, height, width)


def _old(targets: Sequence[Path], made_from: Sequence[Path], anew: bool) -> bool:
    """Whether targets are to be made `anew`, or one is missing, or older than something that it is made from."""
    if anew or not all(target.exists() for target in targets):
        return True
    oldest = min(target.stat().st_mtime_ns for target in targets)
    return any(path.stat().st_mtime_ns > oldest for path in made_from)
