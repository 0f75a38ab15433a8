"""Stage: scores of image sets from stored features, with their intervals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hires import layout, shards
from hires.config import Config, ImageSet
from hires.execution.threads import allowed
from hires.files import parquet
from hires.files.storage import remade
from hires.sizes import stage_sizes
from hires.stages.features import read_manifests
from hires.stages.images import image_sets

if TYPE_CHECKING:
    from hires.metrics import Borders, Features


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

    torch.set_num_threads(allowed(config.compute.threads))
    file = layout.reference_features(config, height, width)
    with remade("features", file):
        references = Features.load(file)
    sets = image_sets(config, study, backbone, height, width, settings, variants)
    with shards.counted(f"scores {study} {backbone} {height}x{width}", len(sets)) as made:
        for images in sets:
            _score(config, images, references)
            made.append(1)


def _score(config: Config, images: ImageSet, references: "Features") -> None:
    import pandas as pd

    from hires.metrics import Features
    from hires.metrics.scores import TIDY, frame, over_trials, per_image, score

    file = layout.features(config, images)
    with remade("features", file):
        features = Features.load(file)
    manifest = pd.DataFrame(read_manifests(layout.image_shards(config, images), "images"))
    table = per_image(features, config.metrics.scores, manifest, references, borders(config, images))
    trials = {}
    for seed in images.seeds:
        rows = [i for i, s in enumerate(features.seeds) if s == seed]
        trials[str(seed)] = score(features.take(rows), references, config.metrics, table[table["seed"] == seed])
    parts = [frame(over_trials([*trials.values()]), trial="all", **images.names)]
    if len(trials) > 1:
        parts += [frame(found, trial=seed, **images.names).assign(replicates=None) for seed, found in trials.items()]
    parts = [part[[*TIDY, "replicates"]] for part in parts]
    parquet.write_frame(layout.image_scores(config, images), table)
    parquet.write_frame(layout.scores(config, images), pd.concat(parts))


def borders(config: Config, images: ImageSet) -> "Borders":
    """The patch borders that an image set is looked at for seams: those of NPA in its setting, whatever its variant."""
    from hires.metrics import patch_borders

    entry, variant = config.backbones[images.backbone], config.variants()[images.variant]
    base = (entry.base_resolution, entry.base_resolution)
    if variant.start == "base":
        base = stage_sizes(images.height, images.width, entry.base_resolution, entry.size_multiple)[0]
    sampling = config.sampling(images.study, images.setting, images.backbone)
    return patch_borders((images.height, images.width), base, sampling.window_scale, sampling.window_overlap)
