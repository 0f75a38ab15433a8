"""Stage: the HTML report of a configuration."""

from hires import layout, shards
from hires.config import Config
from hires.files.storage import read_json, remade, replacing
from hires.stages import metrics


def run(config: Config, *, lossless_prompts: int = 2, max_megabytes: float = 40) -> None:
    """Write `layout.report` from the metrics, tables, figures, images and provenance that are there.

    Args:
        lossless_prompts: how many prompts of the gallery are stored without loss.
        max_megabytes: size that the gallery may reach.
    """
    from hires.analysis.results import Results
    from hires.report import write

    target = layout.report(config)
    metrics.check(config)
    shards.drawn(config)
    with remade("provenance", layout.provenance(config)):
        read_json(layout.provenance(config))
    with shards.counted("report", 1) as made, replacing(target) as temporary:
        write(Results.open(config.root), temporary, config.name, lossless_prompts, max_megabytes)
        made.append(1)
