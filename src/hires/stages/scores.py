"""Stage: scores of image sets from stored features, with their intervals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hires import layout, parquet, shards
from hires.config import Config, ImageSet
from hires.stages.features import read_manifests
from hires.stages.images import image_sets
from hires.storage import remade

if TYPE_CHECKING:
    from hires.metrics import Features


def run(
    config: Config,
    study: str,
    backbone: str,
    height: int,
    width: int,
    *,
    settings: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
) -> None:
    """Score image sets that share study, backbone and size (pixels).

    `settings`, `variants`: those of the study when None. Declared outputs, per image set: `layout.scores` (tidy rows,
    and in `replicates` the score of each resample of the prompts) and `layout.image_scores`.
    """
    import torch

    from hires.metrics import Features

    torch.set_num_threads(config.compute.threads)
    file = layout.reference_features(config, height, width)
    with remade("features", file):
        references = Features.load(file)
    sets = image_sets(config, study, backbone, height, width, settings, variants)
    with shards.told(f"scores {study} {backbone} {height}x{width}", len(sets)) as made:
        for images in sets:
            _score(config, images, references)
            made.append(1)


def _score(config: Config, images: ImageSet, references: "Features") -> None:
    import pandas as pd

    from hires.metrics import Features
    from hires.metrics.scores import SET, TIDY, frame, per_image, score

    file = layout.features(config, images)
    with remade("features", file):
        features = Features.load(file)
    manifest = pd.DataFrame(read_manifests(layout.image_shards(config, images), "images"))
    table = per_image(features, config.metrics.scores, manifest)
    trials = {"all": list(range(len(features)))}
    if len(images.seeds) > 1:
        trials |= {str(seed): [i for i, s in enumerate(features.seeds) if s == seed] for seed in images.seeds}
    names = {name: getattr(images, name) for name in SET}
    parts = []
    for trial, rows in trials.items():
        part = table if trial == "all" else table[table["seed"] == int(trial)]
        found = score(features.take(rows), references, config.metrics, part)
        parts.append(frame(found, trial=trial, **names)[[*TIDY, "replicates"]])
    parquet.write_frame(layout.image_scores(config, images), table)
    parquet.write_frame(layout.scores(config, images), pd.concat(parts))
