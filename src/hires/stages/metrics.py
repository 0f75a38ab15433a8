"""Stage: all scores in one tidy table, and the paired comparisons of variants."""

import sys
from typing import TYPE_CHECKING

from hires import layout, shards
from hires.config import Config, ImageSet
from hires.errors import HiresError
from hires.files import parquet
from hires.files.storage import remade
from hires.stages import collect, costs
from hires.stages.scores import borders

if TYPE_CHECKING:
    import pandas as pd

REFERENCE = "reference"


def check(config: Config) -> None:
    """HiresError unless metrics.parquet and paired.parquet are whole, for stages that read them elsewhere."""
    for path in (layout.metrics(config), layout.paired(config)):
        with remade("metrics", path):
            parquet.read(path)


def unscored(config: Config) -> list[ImageSet]:
    """Image sets without scores."""
    return [images for images in config.image_sets() if not layout.scores(config, images).is_file()]


def run(config: Config, partial: bool = False) -> None:
    """Write metrics.parquet and paired.parquet, of all image sets, or of those that have scores where `partial`.

    For every study and size the references stand in the table too, under the name "reference" in the columns setting,
    backbone and variant: the best that can be reached (see `hires.metrics.scores.ceiling`).
    """
    import pandas as pd

    from hires.metrics import Features
    from hires.metrics.scores import PAIRED, TIDY, ceiling, frame, paired

    parts = []
    missing = unscored(config)
    sets = [images for images in config.image_sets() if images not in missing] if partial else config.image_sets()
    if missing and partial:
        print(f"incomplete: {len(sets)} of {len(sets) + len(missing)} image sets have scores", file=sys.stderr)
    for images in sets:
        path = layout.scores(config, images)
        if not path.exists():
            raise HiresError(f"{path} does not exist: score the image sets first (hires scores)")
        with remade("scores", path):
            parts.append(parquet.read_frame(path, TIDY))
    scores = _with_costs(config, pd.concat(parts, ignore_index=True), sets)
    prompts = [prompt.id for prompt in shards.drawn(config)]
    references = []
    first = {(s.study, s.height, s.width, s.n): s for s in reversed(sets)}
    for (study, height, width, n), images in reversed(first.items()):
        file = layout.reference_features(config, height, width)
        with remade("features", file):
            features = Features.load(file)
        asked = set(prompts[:n])
        features = features.take([i for i, name in enumerate(features.ids) if name in asked])
        names = {"setting": REFERENCE, "trial": "all", "backbone": REFERENCE, "variant": REFERENCE}
        found = ceiling(features, config.metrics, borders(config, images))
        references.append(frame(found, study=study, **names, height=height, width=width))
    tidy = pd.concat([scores, *references], ignore_index=True)[TIDY]
    tests = paired(scores[scores["trial"] == "all"])[PAIRED]
    parquet.write_frame(layout.metrics(config), tidy)
    parquet.write_frame(layout.paired(config), tests)


def _with_costs(config: Config, scores: "pd.DataFrame", sets: list[ImageSet]) -> "pd.DataFrame":
    """Seconds and bytes as `hires costs` measured them, where it did; no seconds of other machines but these."""
    import pandas as pd

    names = ["study", "setting", "backbone", "variant", "height", "width"]
    measured = costs.rows(config, sets)
    foreign = pd.DataFrame([images.names for images in collect.elsewhere(config)], columns=names)
    places, alone, elsewhere = (pd.MultiIndex.from_frame(rows[names]) for rows in (scores, measured, foreign))
    replaced = places.isin(alone) & scores["metric"].isin(costs.METRICS)
    dropped = places.isin(elsewhere) & (scores["metric"] == "seconds")
    return pd.concat([scores[~(replaced | dropped)], measured], ignore_index=True)
