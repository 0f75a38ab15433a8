"""Stage: base latents, the clean latents at the model's own size that every variant of a prompt starts from."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from hires import layout, provenance, shards
from hires.config import Config
from hires.execution.devices import locked_device
from hires.execution.oom import Thrift
from hires.layout import BaseSet
from hires.shards import Batch, Item
from hires.stages import VERSIONS, models


def run(config: Config, backbone: str, name: str, shard: int, *, device: str | None = None) -> None:
    """Make one shard of the base latents `name` (<h>x<w>-<key>) of one backbone; finished ones are kept.

    Each file holds one tensor `latents`, (1, C, h, w) float32. Declared output: `layout.base_shard`.
    """
    base = layout.base_set(config, backbone, name)
    made_of = items(config, base, shard)
    work = shards.batches(made_of, config.compute.batch_size)
    with shards.counted(f"base {backbone} {name} shard {shard}", len(made_of)) as made:
        if work:
            with locked_device(device or config.compute.device) as place:
                made.extend(_make(config, base, work, place))
        shards.write_manifest(layout.base_shard(config, base, shard), _head(base), "latents", made_of)


def items(config: Config, base: BaseSet, shard: int) -> list[Item]:
    """The base latents of one shard."""
    given = config.sampling(base.study, base.setting, base.backbone)
    return shards.items(
        config,
        base.n,
        base.seeds,
        shard,
        lambda prompt, seed: layout.base_latents(config, base, prompt, seed),
        "base",
        **_head(base),
        sampling={setting: getattr(given, setting) for setting in layout.BASE_SETTINGS},
        **models.identity(config.backbones[base.backbone]),
    )


def _head(base: BaseSet) -> dict[str, Any]:
    return {"version": VERSIONS["base"], "backbone": base.backbone, "height": base.height, "width": base.width}


def _make(config: Config, base: BaseSet, work: Sequence[Batch], device: str) -> Iterator[int]:
    """Make the batches; yields how many files each gave."""
    from safetensors.torch import save

    from hires.cascade import base_latents

    model = models.load(config, base.backbone, device)
    sampling = config.sampling(base.study, base.setting, base.backbone).over(model.defaults)
    effective = {setting: getattr(sampling, setting) for setting in layout.BASE_SETTINGS}
    origin = provenance.record(config, **models.record(model))
    thrift = Thrift(f"base latents of {base.backbone}, {base.height}x{base.width}", config.compute, model)

    def make(whole: Sequence[Item], wanted: Sequence[bool], part: slice) -> None:
        batch = whole[part]
        started = time.monotonic()
        prompts, seeds = [item.prompt.prompt for item in batch], [item.noise_seed for item in batch]
        latents = base_latents(model, prompts, seeds, base.target_height, base.target_width, sampling).cpu()
        measured = {
            "seconds": round((time.monotonic() - started) / len(batch), 4),
            "steps": sampling.num_inference_steps,
            "batch": len(batch),
            **thrift.record(),
            "sampling": effective,
            "provenance": origin,
        }
        for item, sample, missing in zip(batch, latents.split(1), wanted[part]):
            if missing:
                item.finish(save({"latents": sample.contiguous()}), **measured)

    for batch, todo in tqdm(work, desc="base latents", unit="batch", disable=None):
        thrift.run(partial(make, batch, todo), len(batch))
        yield sum(todo)
