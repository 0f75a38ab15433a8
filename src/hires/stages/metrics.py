"""Stage: all scores in one tidy table, and the paired comparisons of variants."""

from hires import layout
from hires.config import Config
from hires.errors import HiresError
from hires.prompts import read_prompts
from hires.storage import replacing

REFERENCE = "reference"


def run(config: Config) -> None:
    """Write metrics.parquet and paired.parquet.

    For every study and size the references stand in the table too, under the name "reference" in the columns setting,
    backbone and variant: the best that can be reached (see `hires.metrics.scores.ceiling`).
    """
    import pandas as pd

    from hires.metrics import Features
    from hires.metrics.scores import PAIRED, TIDY, ceiling, frame, paired

    parts = []
    for images in config.image_sets():
        path = layout.scores(config, images)
        if not path.is_file():
            raise HiresError(f"{path} does not exist: score the image sets first (hires scores)")
        parts.append(pd.read_parquet(path))
    scores = pd.concat(parts, ignore_index=True)
    prompts = [prompt.id for prompt in read_prompts(layout.prompts(config))]
    references = []
    for study, height, width, n in dict.fromkeys((s.study, s.height, s.width, s.n) for s in config.image_sets()):
        features = Features.load(layout.reference_features(config, height, width))
        features = features.take([i for i, name in enumerate(features.ids) if name in set(prompts[:n])])
        names = {"setting": REFERENCE, "trial": "all", "backbone": REFERENCE, "variant": REFERENCE}
        found = ceiling(features, config.metrics)
        references.append(frame(found, study=study, **names, height=height, width=width))
    tidy = pd.concat([scores, *references], ignore_index=True)[TIDY]
    tests = paired(scores[scores["trial"] == "all"])[PAIRED]
    for path, rows in ((layout.metrics(config), tidy), (layout.paired(config), tests)):
        with replacing(path) as temporary:
            rows.to_parquet(temporary, index=False)
