"""Where every output lies: pure functions from a configuration to paths, shared by the stages and the Snakefile.

`pattern` gives the same paths with Snakemake wildcards, `wildcards` the expressions that constrain them.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hires.config import Config, ImageSet
from hires.errors import HiresError, unknown
from hires.sizes import stage_sizes

_SET = "{study}/{setting}/{backbone}/{variant}/{height}x{width}"
_BASE = "base/{backbone}/{base_height}x{base_width}-{key}"

PATTERNS = {
    "prompts": "prompts.parquet",
    "scenes": "prompts/scenes.parquet",
    "reference_manifest": "references/{height}x{width}/manifest.json",
    "base_shard": f"{_BASE}/shard-{{shard}}.json",
    "image_shard": f"images/{_SET}/shard-{{shard}}.json",
    "features": f"features/{_SET}.safetensors",
    "reference_features": "features/references/{height}x{width}.safetensors",
    "scores": f"scores/{_SET}.parquet",
    "image_scores": f"scores/{_SET}.images.parquet",
    "costs": f"costs/{_SET}.json",
    "crops": f"crops/{_SET}.webp",
    "reference_crops": "crops/references/{height}x{width}.webp",
    "collected": "collected.json",
    "metrics": "metrics.parquet",
    "paired": "paired.parquet",
    "notebook": "notebooks/{notebook}.ipynb",
    "report": "report.html",
    "provenance": "provenance.json",
    "checksums": "SHA256SUMS",
}

# what shapes a base image beside its prompt, seed and size
BASE_SETTINGS = (
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "negative_prompt",
    "prompt_suffix",
    "max_sequence_length",
    "linears",
    "step_cache",
)


@dataclass(frozen=True)
class BaseSet:
    """Base latents shared by every image set of one backbone, base size and base-relevant settings.

    Attributes:
        height, width: of the base, in pixels.
        key: digest of the model and of the settings in `BASE_SETTINGS`.
        n, seeds: the first n prompts, each with every seed.
        study, setting: of one of the settings that share it (`config.sampling(study, setting, backbone)`).
        target_height, target_width: of one of the sizes that begin with this base, in pixels.
    """

    backbone: str
    height: int
    width: int
    key: str
    n: int
    seeds: tuple[int, ...]
    study: str
    setting: str
    target_height: int
    target_width: int

    @property
    def name(self) -> str:
        """<h>x<w>-<key>, as in the path."""
        return f"{self.height}x{self.width}-{self.key}"


def pattern(config: Config, output: str) -> str:
    """Path of an output with Snakemake's wildcards in it."""
    if output not in PATTERNS:
        raise unknown("output", output, PATTERNS)
    return str(config.root / PATTERNS[output])


def made(config: Config) -> Iterator[Path]:
    """Every declared output that is there."""
    for output in PATTERNS.values():
        yield from config.root.glob(re.sub(r"\{\w+\}", "*", output))


def wildcards(config: Config) -> dict[str, str]:
    """Regular expression of each wildcard: the names of this configuration, "+" escaped."""
    sets = config.image_sets()
    size, number = "[1-9][0-9]*", "[0-9]+"
    return {
        "study": _any(s.study for s in sets),
        "setting": _any(s.setting for s in sets),
        "backbone": _any(s.backbone for s in sets),
        "variant": _any(s.variant for s in sets),
        "notebook": _any(config.notebooks),
        **dict.fromkeys(("height", "width", "base_height", "base_width"), size),
        "key": "[0-9a-f]{8}",
        "shard": number,
    }


def _any(names: Any) -> str:
    return "|".join(re.escape(name) for name in dict.fromkeys(names))


def _path(config: Config, output: str, **fields: Any) -> Path:
    return Path(pattern(config, output).format(**fields))


def _base_fields(base: BaseSet) -> dict[str, Any]:
    return {"backbone": base.backbone, "base_height": base.height, "base_width": base.width, "key": base.key}


# single outputs


def prompts(config: Config) -> Path:
    """The prompts drawn."""
    return _path(config, "prompts")


def scenes(config: Config) -> Path:
    """The embedded source of prompts, in LAION's schema."""
    return _path(config, "scenes")


def metrics(config: Config) -> Path:
    """The tidy table of all scores."""
    return _path(config, "metrics")


def paired(config: Config) -> Path:
    """Paired comparisons of variants."""
    return _path(config, "paired")


def notebook(config: Config, name: str) -> Path:
    """The executed notebook."""
    if name not in config.notebooks:
        raise unknown("notebook", name, config.notebooks)
    return _path(config, "notebook", notebook=name)


def report(config: Config) -> Path:
    """The HTML report."""
    return _path(config, "report")


def provenance(config: Config) -> Path:
    """What made the results."""
    return _path(config, "provenance")


def checksums(config: Config) -> Path:
    """SHA-256 of everything made, directly or by way of the manifests."""
    return _path(config, "checksums")


def tables(config: Config) -> Path:
    """Folder of the tables."""
    return config.root / "tables"


def figures(config: Config) -> Path:
    """Folder of the figures."""
    return config.root / "figures"


# shards


def shards(config: Config, n: int) -> range:
    """Shard numbers of `n` prompts."""
    return range(-(-n // config.compute.shard_size))


def shard_rows(config: Config, n: int, shard: int) -> range:
    """Indices of the prompts in one shard of the first `n`."""
    if shard not in shards(config, n):
        raise HiresError(f"shard {shard}: {n} prompts make shards 0 to {len(shards(config, n)) - 1}")
    size = config.compute.shard_size
    return range(shard * size, min(n, (shard + 1) * size))


# references


def references(config: Config) -> list[tuple[int, int, int]]:
    """(height, width, n) of the reference images that the studies need."""
    most: dict[tuple[int, int], int] = {}
    for images in config.image_sets():
        size = images.height, images.width
        most[size] = max(images.n, most.get(size, 0))
    return [(height, width, n) for (height, width), n in most.items()]


def reference_manifest(config: Config, height: int, width: int) -> Path:
    """Declared output of one size of reference images."""
    return _path(config, "reference_manifest", height=height, width=width)


def reference(config: Config, height: int, width: int, prompt_id: str) -> Path:
    """One reference image."""
    return reference_manifest(config, height, width).parent / f"{prompt_id}.png"


def reference_features(config: Config, height: int, width: int) -> Path:
    """Features of the reference images of one size."""
    return _path(config, "reference_features", height=height, width=width)


# base latents


def base_of(config: Config, images: ImageSet) -> BaseSet | None:
    """The base latents that an image set starts from, at this set's own n and seeds; None when it starts from noise."""
    if config.variants()[images.variant].start == "noise":
        return None
    entry = config.backbones[images.backbone]
    stages = config.variants()[images.variant].stages
    height, width = stage_sizes(images.height, images.width, entry.base_resolution, entry.size_multiple, stages)[0]
    given = config.sampling(images.study, images.setting, images.backbone).model_dump()
    content = {name: given[name] for name in BASE_SETTINGS}
    content |= {name: getattr(entry, name) for name in ("model", "weights", "dtype")}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return BaseSet(
        images.backbone, height, width, key, images.n, images.seeds,
        images.study, images.setting, images.height, images.width,
    )  # fmt: skip


def base_sets(config: Config) -> list[BaseSet]:
    """Every set of base latents once, with the most prompts and all the seeds that an image set asks for."""
    merged: dict[tuple[str, str], BaseSet] = {}
    for base in filter(None, map(partial(base_of, config), config.image_sets())):
        place = base.backbone, base.name
        if place in merged:
            first = merged[place]
            seeds = tuple(sorted({*first.seeds, *base.seeds}))
            base = replace(first, n=max(first.n, base.n), seeds=seeds)
        merged[place] = base
    return list(merged.values())


def base_set(config: Config, backbone: str, name: str) -> BaseSet:
    """The set of base latents called <h>x<w>-<key> of one backbone."""
    if backbone not in config.backbones:
        raise unknown("backbone", backbone, config.backbones)
    table = {base.name: base for base in base_sets(config) if base.backbone == backbone}
    if name not in table:
        raise unknown(f"base latents of {backbone}", name, table)
    return table[name]


def base_shard(config: Config, base: BaseSet, shard: int) -> Path:
    """Manifest of one shard of base latents: its declared output."""
    return _path(config, "base_shard", **_base_fields(base), shard=f"{shard:03}")


def base_latents(config: Config, base: BaseSet, prompt_id: str, seed: int) -> Path:
    """Base latents of one prompt and seed."""
    return base_shard(config, base, 0).parent / f"{prompt_id}-{seed}.safetensors"


def base_shards(config: Config, base: BaseSet) -> list[Path]:
    """All manifests of one set of base latents."""
    return [base_shard(config, base, k) for k in shards(config, base.n)]


# images, features, scores


def image_shard(config: Config, images: ImageSet, shard: int) -> Path:
    """Manifest of one shard of images: its declared output."""
    return _path(config, "image_shard", **images.names, shard=f"{shard:03}")


def image(config: Config, images: ImageSet, prompt_id: str, seed: int) -> Path:
    """One image."""
    return image_shard(config, images, 0).parent / f"{prompt_id}-{seed}.{config.compute.image_format}"


def image_shards(config: Config, images: ImageSet) -> list[Path]:
    """All manifests of one image set."""
    return [image_shard(config, images, k) for k in shards(config, images.n)]


def features(config: Config, images: ImageSet) -> Path:
    """Features of one image set."""
    return _path(config, "features", **images.names)


def scores(config: Config, images: ImageSet) -> Path:
    """Aggregate scores of one image set, tidy."""
    return _path(config, "scores", **images.names)


def costs(config: Config, images: ImageSet) -> Path:
    """What the images of one set cost where nothing runs beside them."""
    return _path(config, "costs", **images.names)


def crops(config: Config, images: ImageSet) -> Path:
    """Crops of the first images of one set, side by side."""
    return _path(config, "crops", **images.names)


def reference_crops(config: Config, height: int, width: int) -> Path:
    """The same crops of the reference images of one size."""
    return _path(config, "reference_crops", height=height, width=width)


def collected(config: Config) -> Path:
    """Which image sets were made and scored elsewhere, and by what."""
    return _path(config, "collected")


def image_scores(config: Config, images: ImageSet) -> Path:
    """Scores of the single images of one set: columns id, seed, metric, value."""
    return _path(config, "image_scores", **images.names)
