"""Stage: base latents, the clean latents at the model's own size that every variant of a prompt starts from."""

import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from hires import layout, provenance, shards
from hires.config import Config
from hires.devices import locked_device
from hires.layout import BaseSet
from hires.settings import Sampling
from hires.shards import Batch
from hires.stages import VERSIONS, models


def run(config: Config, backbone: str, name: str, shard: int, *, device: str | None = None) -> None:
    """Make one shard of the base latents `name` (<h>x<w>-<key>) of one backbone; finished ones are kept.

    Each file holds one tensor `latents`, (1, C, h, w) float32. Declared output: `layout.base_shard`.
    """
    base = layout.base_set(config, backbone, name)
    entry = config.backbones[backbone]
    given = config.sampling(base.study, base.setting, backbone)
    head = {
        "version": VERSIONS["base"],
        "backbone": backbone,
        "height": base.height,
        "width": base.width,
    }
    settings = {setting: getattr(given, setting) for setting in layout.BASE_SETTINGS}
    items = shards.items(
        config,
        base.n,
        base.seeds,
        shard,
        lambda prompt, seed: layout.base_latents(config, base, prompt, seed),
        **head,
        sampling=settings,
        **models.identity(entry),
    )
    work = shards.batches(items, config.compute.batch_size)
    with shards.told(f"base {backbone} {name} shard {shard}", len(items)) as made:
        if work:
            with locked_device(device or config.compute.device) as place:
                made.extend(_make(config, base, given, work, place))
        shards.write_manifest(layout.base_shard(config, base, shard), head, "latents", items)


def _make(config: Config, base: BaseSet, given: Sampling, work: Sequence[Batch], device: str) -> Iterator[int]:
    """Make the batches; yields how many files each gave."""
    from safetensors.torch import save

    from hires.cascade import base_latents

    model = models.load(config, base.backbone, device)
    sampling = given.over(model.defaults)
    effective = {setting: getattr(sampling, setting) for setting in layout.BASE_SETTINGS}
    origin = provenance.record(config, **models.told(model))
    for batch, todo in tqdm(work, desc="base latents", unit="batch", disable=None):
        started = time.monotonic()
        prompts, seeds = [item.prompt.prompt for item in batch], [item.seed for item in batch]
        latents = base_latents(model, prompts, seeds, base.target_height, base.target_width, sampling).cpu()
        measured = {
            "seconds": round((time.monotonic() - started) / len(batch), 4),
            "steps": sampling.num_inference_steps,
            "batch": len(batch),
            "sampling": effective,
            "provenance": origin,
        }
        for item, sample, wanted in zip(batch, latents.split(1), todo):
            if wanted:
                item.finish(save({"latents": sample.contiguous()}), **measured)
        yield sum(todo)
