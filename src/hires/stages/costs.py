"""Stage: what images cost, by a process that has the machine to itself: seconds and peak memory of every image set.

Image sets that several processes make beside each other take longer, each by what the others happen to do. Where these
measurements are there, they stand in the tables in place of the seconds and bytes of the images themselves.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hires import layout, provenance, shards
from hires.config import Config, ImageSet
from hires.errors import HiresError, unknown
from hires.execution.devices import locked_device
from hires.files.storage import digest, read_json, remade, write_json
from hires.shards import Clock
from hires.stages import models, prompts

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("seconds", "peak_bytes")
BATCH = 32
BATCHES = 3


def run(
    config: Config,
    *,
    backbones: Sequence[str] | None = None,
    studies: Sequence[str] | None = None,
    seconds: float | None = None,
    batches: int = BATCHES,
) -> int:
    """Measure the image sets that aren't yet, of some `backbones` and `studies` or of all; how many are missing.

    A set is measured on one batch, its first BATCH prompts (or the configuration's batch size, if that is smaller):
    once to warm up, then `batches` times, base and decoding included; one that was measured fewer times is measured
    anew. Nothing is kept of the images. `seconds`: after these no set is begun. Declared output, per image set:
    `layout.costs`.
    """
    if batches < 2:
        raise HiresError(f"--batches {batches}: allowed: 2 or more, as an interval needs them")
    for name in backbones or ():
        if name not in config.backbones:
            raise unknown("backbone", name, config.backbones)
    for name in studies or ():
        if name not in config.studies:
            raise unknown("study", name, config.studies)
    todo = [
        images
        for images in sorted(config.image_sets(), key=lambda made: [*config.backbones].index(made.backbone))
        if images.backbone in (backbones or config.backbones)
        and images.study in (studies or config.studies)
        and _measured(config, images) < batches
    ]
    if not layout.prompts(config).is_file():
        prompts.run(config)
    with locked_device(config.compute.device) as device:
        clock = Clock(seconds)
        for done, images in enumerate(todo):
            kind = images.backbone, images.variant, images.size
            if clock.over(kind):
                return len(todo) - done
            with clock.timed(kind):
                write_json(layout.costs(config, images), _measure(config, images, device, batches))
    return 0


def _measured(config: Config, images: ImageSet) -> int:
    """How many batches were measured with this very configuration."""
    file = layout.costs(config, images)
    if not file.is_file():
        return 0
    cost = read_json(file)
    return len(cost["seconds"]) if cost["provenance"]["config"] == provenance.config_digest(config) else 0


def _measure(config: Config, images: ImageSet, device: str, batches: int) -> dict[str, Any]:
    from hires.additions.adapters import adapter_digests
    from hires.cascade import cascade, decode
    from hires.execution.meter import Meter

    variant = config.variants()[images.variant]
    backbone = models.load(config, images.backbone, device)
    if variant.adapter:
        backbone.require_adapter(variant.adapter)
    sampling = config.sampling(images.study, images.setting, images.backbone).over(backbone.defaults)
    drawn = shards.drawn(config)[: min(BATCH, config.compute.batch_size, images.n)]
    texts = [prompt.prompt for prompt in drawn]
    seeds = [shards.noise_seed(text, images.seeds[0]) for text in texts]
    taken: list[float] = []
    peak = 0
    for _ in range(1 + batches):
        spent = 0.0
        for stage in cascade(backbone, texts, seeds, variant, images.height, images.width, sampling):
            spent += stage.seconds
            peak = max(peak, stage.peak_bytes)
        with Meter(backbone.device) as cost:
            decode(backbone, stage, sampling.vae_tiling)
        taken.append((spent + cost.seconds) / len(texts))
        peak = max(peak, cost.peak_bytes)
    adapters = adapter_digests(backbone.pipe, variant.adapter)
    return {
        **images.names,
        "seconds": taken[1:],
        "peak_bytes": peak,
        "batch": len(texts),
        "provenance": provenance.record(config, **models.record(backbone), adapters=adapters),
    }


def rows(config: Config, sets: Sequence[ImageSet]) -> "pd.DataFrame":
    """Tidy rows, with replicates, of those image sets that were measured."""
    import pandas as pd

    from hires.metrics.scores import TIDY, frame

    parts = []
    for images in sets:
        file = layout.costs(config, images)
        if _measured(config, images):
            with remade("costs", file):
                parts.append(frame(_scores(config, read_json(file)), trial="all", **images.names))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*TIDY, "replicates"])


def _scores(config: Config, cost: Mapping[str, Any]) -> list[Any]:
    """Seconds and bytes of one image set. Replicates of seconds: Student's t of the batches, drawn for each set anew.

    Resampled medians of three batches would hold the true one 75 times in a hundred; these 95, and the difference of
    two sets' replicates gives the interval of Behrens and Fisher, 99.
    """
    import numpy as np

    from hires.metrics.scores import Score

    batches, peak = np.array(cost["seconds"]), float(cost["peak_bytes"])
    value = float(np.median(batches))
    rng = np.random.default_rng(int(digest(cost), 16))
    error = batches.std(ddof=1) / np.sqrt(len(batches))
    replicates = value + error * rng.standard_t(len(batches) - 1, config.metrics.bootstrap)
    n = cost["batch"] * len(batches)
    made = cost["provenance"]
    place = made["gpu"] or made["cpu"]
    how = f"{len(batches)} batches of {cost['batch']} images, with nothing beside them on the {place}"
    return [
        Score("seconds", value, replicates, n, "", f"median of {how}; interval: Student's t over batches"),
        Score("peak_bytes", peak, np.full(len(replicates), peak), n, "", f"highest of {how}"),
    ]
