"""FID, KID, IS, CLIP score and their patch versions; object counts and spectra; each with an interval and its protocol.

`evaluate` scores lists of images; the stages `features`, `scores` and `metrics` do the same for stored image sets.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from PIL import Image

from hires.config import Metrics
from hires.errors import HiresError, validated
from hires.metrics.features import Crops, Features, extract
from hires.metrics.networks import Clip, ClipFeatures, FeatureNetwork, Inception, load_clip, load_features
from hires.metrics.pixels import Source
from hires.metrics.protocol import Protocol, wants_aliased, wants_crops
from hires.metrics.scores import ROW, frame, paired, per_image, score
from hires.metrics.seams import Borders, patch_borders
from hires.scenes import WHOLE

__all__ = [
    "Borders",
    "Clip",
    "ClipFeatures",
    "Crops",
    "FeatureNetwork",
    "Features",
    "Inception",
    "Protocol",
    "Source",
    "evaluate",
    "extract",
    "load_clip",
    "load_features",
    "paired",
    "patch_borders",
    "per_image",
    "score",
    "wants_aliased",
]


def evaluate(
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
    prompts: Sequence[str],
    scenes: Sequence[int] | None = None,
    borders: Borders | None = None,
    device: str = "cpu",
    threads: int = 1,
    **settings: Any,
) -> pd.DataFrame:
    """Score images against reference images of the same prompts.

    Args:
        images, references, prompts: n each; image i and reference i belong to prompt i.
        scenes: n scene ids where the references are true renders; adds counts, colours, repetition and spectrum.
        borders: of attention patches, from `patch_borders`; adds the seam score.
        settings: fields of the configuration's `metrics` section (features, clip, scores, patch, bootstrap, …). Here
            kid_subset_size defaults to n.

    Returns:
        One row per score: metric, value, low, high, n, flag, protocol. A score undefined at n has no row.

    Raises:
        HiresError: lists of different lengths, images of different sizes, an unknown setting or a value out of range.
    """
    if not len(images) == len(references) == len(prompts) == len(scenes or images) > 0:
        raise HiresError(
            f"{len(images)} images, {len(references)} references, {len(prompts)} prompts"
            + (f", {len(scenes)} scenes" if scenes else "")
            + ": give as many of each, and at least one"
        )
    metrics = validated(Metrics, "metrics setting", {"kid_subset_size": max(2, len(images)), **settings})
    network, clip = load_features(metrics.features, device), load_clip(metrics.clip, device)
    ids = [f"{i:06}" for i in range(len(images))]

    def features(given: Sequence[Image.Image]) -> Features:
        sources = [Source(name, 0, image) for name, image in zip(ids, given)]
        views = None if scenes is None else [(scene_id, WHOLE) for scene_id in scenes]
        return extract(
            sources, prompts, network, clip, crops_of(metrics), views, threads, wants_aliased(metrics.scores)
        )

    found, true = features(images), features(references)
    table = per_image(found, metrics.scores, references=true, borders=borders)
    return frame(score(found, true, metrics, table))[ROW]


def crops_of(metrics: Metrics) -> Crops | None:
    """The crops that the patch scores of a configuration need; None when it asks for none."""
    if not wants_crops(metrics.scores):
        return None
    return Crops(metrics.patch.size, metrics.patch.per_image, metrics.patch.seed)
