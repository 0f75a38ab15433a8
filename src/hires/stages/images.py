"""Stage: images, one shard of prompts, any number of variants and settings of a study at one size."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hires import layout, provenance, shards
from hires.config import Config, ImageSet
from hires.errors import unknown
from hires.execution.devices import locked_device
from hires.execution.oom import Thrift
from hires.files.storage import remade
from hires.settings import Sampling
from hires.shards import Batch, Item
from hires.stages import VERSIONS, base, models

if TYPE_CHECKING:
    from PIL import Image


def run(
    config: Config,
    study: str,
    backbone: str,
    height: int,
    width: int,
    shard: int,
    *,
    settings: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    device: str | None = None,
) -> None:
    """Make one shard of the image sets that share study, backbone and size (pixels); finished images are kept.

    `settings`, `variants`: None means all of the study. Declared outputs: one `layout.image_shard` per image set.
    """
    sets = image_sets(config, study, backbone, height, width, settings, variants)
    wanted = {images: items(config, images, shard) for images in sets}
    work = {images: shards.batches(wanted[images], config.compute.batch_size) for images in sets}
    with shards.counted(
        f"images {study} {backbone} {height}x{width} shard {shard}", sum(map(len, wanted.values()))
    ) as made:
        if any(work.values()):
            with locked_device(device or config.compute.device) as place:
                made.extend(_make(config, work, shard, place))
        for images in sets:
            shards.write_manifest(layout.image_shard(config, images, shard), head(images), "images", wanted[images])


def image_sets(
    config: Config,
    study: str,
    backbone: str,
    height: int,
    width: int,
    settings: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
) -> list[ImageSet]:
    """The image sets that share study, backbone and size; None means all settings, or variants, of the study."""
    if study not in config.studies:
        raise unknown("study", study, config.studies)
    return [
        config.image_set(study, setting, backbone, variant, height, width)
        for setting in settings or config.studies[study].settings
        for variant in variants or config.studies[study].variants
    ]


def _make(config: Config, work: Mapping[ImageSet, Sequence[Batch]], shard: int, device: str) -> Iterator[int]:
    """Make the batches of each image set; yields how many images each gave."""
    total = sum(map(len, work.values()))
    written: list[Future] = []
    with (
        tqdm(total=total, desc="images", unit="batch", disable=None) as bar,
        ThreadPoolExecutor(config.compute.threads) as pool,  # compressing PNGs leaves other threads free
    ):
        for images, batches in work.items():
            maker = _Maker(config, images, shard, device, pool)
            for batch, todo in batches:
                files = maker.make(batch, todo)
                _wait(written)  # for the batch before: two in memory at most
                written = files
                bar.update()
                yield sum(todo)
        _wait(written)


def _wait(files: Sequence[Future]) -> None:
    for file in files:
        file.result()


def head(images: ImageSet) -> dict[str, Any]:
    """What a manifest begins with."""
    return {"version": VERSIONS["images"], **images.names}


def items(config: Config, images: ImageSet, shard: int) -> list[Item]:
    """The images of one shard."""
    given = config.sampling(images.study, images.setting, images.backbone)
    return shards.items(
        config,
        images.n,
        images.seeds,
        shard,
        lambda prompt, seed: layout.image(config, images, prompt, seed),
        "images",
        version=[VERSIONS["base"], VERSIONS["images"]],
        variant=config.variants()[images.variant].model_dump(),
        size=[images.height, images.width],
        sampling=given.model_dump(exclude_unset=True),
        **models.identity(config.backbones[images.backbone], config.variants()[images.variant].adapter),
    )


class _Maker:
    """Makes batches of one shard of an image set."""

    def __init__(self, config: Config, images: ImageSet, shard: int, device: str, pool: ThreadPoolExecutor):
        from hires.additions.adapters import adapter_digests

        self.config, self.images, self.pool = config, images, pool
        self.variant = config.variants()[images.variant]
        self.backbone = models.load(config, images.backbone, device)
        given = config.sampling(images.study, images.setting, images.backbone)
        self.sampling = given.over(self.backbone.defaults)
        self.base = layout.base_of(config, images)
        stored = base.items(config, self.base, shard) if self.base else []
        self.stored = {(item.prompt.id, item.seed): item for item in stored}
        self.vouches = [layout.base_shard(config, self.base, shard)] if self.base else []
        if self.variant.adapter:
            self.backbone.require_adapter(self.variant.adapter)
        self.adapters = adapter_digests(self.backbone.pipe, self.variant.adapter)
        self.provenance = provenance.record(config, **models.record(self.backbone), adapters=self.adapters)

        views = self.sampling.view_batch if self.variant.views != "none" else 1
        what = f"{images.variant} at {images.size} on {images.backbone}"
        self.thrift = Thrift(what, config.compute, self.backbone, views, tileable=not self.sampling.vae_tiling)

    def make(self, batch: Sequence[Item], todo: Sequence[bool]) -> list[Future]:
        """Make a batch, in parts where memory is short; the pool then writes its files, while the next one is made."""
        files: list[Future] = []
        self.thrift.run(lambda part: files.extend(self._make(batch[part], todo[part])), len(batch))
        return files

    def _make(self, batch: Sequence[Item], todo: Sequence[bool]) -> list[Future]:
        from hires_kernels import watch

        from hires.cascade import cascade, decode
        from hires.execution.meter import Meter

        prompts, seeds = [item.prompt.prompt for item in batch], [item.noise_seed for item in batch]
        height, width = self.images.height, self.images.width
        sampling = self.thrift.sampling(self.sampling)
        latents, shared = self._base_latents(batch)
        stages, peak = [], 0
        with watch() as ran:
            for stage in cascade(self.backbone, prompts, seeds, self.variant, height, width, sampling, base=latents):
                stages.append(_stage(stage.name, stage.height, stage.width, stage.steps, stage.seconds / len(batch)))
                peak = max(peak, stage.peak_bytes)
        with Meter(self.backbone.device) as cost:
            pictures = decode(self.backbone, stage, sampling.vae_tiling)
        stages.append(_stage("decode", height, width, 0, cost.seconds / len(batch)))
        peak = max(peak, cost.peak_bytes)

        def finish(item: Item, picture: "Image.Image", base: dict[str, Any]) -> None:
            steps = [{**stages[0], **base}, *stages[1:]]
            item.finish(
                self._encode(picture, item, sampling),
                seconds=round(sum(step["seconds"] for step in steps), 4),
                peak_bytes=peak,
                batch=len(batch),
                **self.thrift.record(),
                stages=steps,
                sampling=self.sampling.model_dump(),
                provenance={**self.provenance, "attention": ran.__dict__},
            )

        made = [row for row, wanted in zip(zip(batch, pictures, shared), todo) if wanted]
        return [self.pool.submit(finish, *row) for row in made]

    def _base_latents(self, batch: Sequence[Item]) -> tuple[Any, list[dict[str, Any]]]:
        """Stored base latents (n, C, h, w) and what they cost; None and nothing for a start from noise."""
        if self.base is None:
            return None, [{} for _ in batch]
        import torch
        from safetensors.torch import load_file

        samples, costs = [], []
        for item in batch:
            stored = self.stored[item.prompt.id, item.seed]
            with remade("base", *self.vouches):
                record = stored.checked()
            samples.append(load_file(stored.file)["latents"])
            costs.append({"steps": record["steps"], "seconds": record["seconds"], "stored": True})
        return torch.cat(samples), costs

    def _encode(self, picture: "Image.Image", item: Item, sampling: Sampling) -> bytes:
        """The file's bytes, the same in every run: nothing measured is in its metadata.

        Its seed there is the one that makes this image from this prompt, not the trial's.
        """
        parameters = {
            "prompt": item.prompt.prompt,
            "seed": item.noise_seed,
            **self.images.names,
            "model": self.backbone.name,
            "revision": self.backbone.revision,
            **({"adapters": self.adapters} if self.adapters else {}),
            "sampling": sampling.model_dump(exclude_defaults=True),
        }
        return encode(picture, self.config.compute.image_format, parameters)


def _stage(name: str, height: int, width: int, steps: int, seconds: float) -> dict[str, Any]:
    return {"name": name, "height": height, "width": width, "steps": steps, "seconds": round(seconds, 4)}


def encode(picture: "Image.Image", image_format: str, parameters: dict[str, Any]) -> bytes:
    """A PNG (text chunk `parameters`) or TIFF (tag ImageDescription) that says as JSON how the picture was made."""
    from PIL.PngImagePlugin import PngInfo

    text, data = json.dumps(parameters), io.BytesIO()
    if image_format == "png":
        info = PngInfo()
        info.add_text("parameters", text)
        picture.save(data, "PNG", pnginfo=info, compress_level=1)  # more takes four times as long and saves nothing
    else:
        picture.save(data, "TIFF", description=text)
    return data.getvalue()
