"""`hires.generate`: images from prompts in one call, and the record that makes an image again."""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

import hires
from hires.additions.adapters import adapter_digests
from hires.additions.extras import NO_EXTRAS, Extras, fitted, picture_record
from hires.backbones.base import Backbone
from hires.cascade import Callback, Stage, cascade, decode, small_images, to_pixels
from hires.errors import HiresError, unknown
from hires.execution.oom import ADVICE, attempt
from hires.settings import Sampling
from hires.sizes import stage_sizes
from hires.variants import Variant
from hires.variants import variant as find_variant

ELSEWHERE = {  # arguments of diffusers' pipelines that have another name here
    "generator": "give seed=0; every image draws from a CPU generator of its own",
    "callback_on_step_end": "give callback=, which is called with (stage, step, steps, latents)",
}


def generate(
    backbone: Backbone,
    prompt: str | Sequence[str],
    variant: str | Variant = "scalediff",
    *,
    height: int,
    width: int,
    seed: int | Sequence[int] = 0,
    num_images_per_prompt: int = 1,
    image: Image.Image | None = None,
    strength: float | None = None,
    crop: bool = False,
    control_image: Image.Image | Sequence[Image.Image] | None = None,
    controlnet_conditioning_scale: float | Sequence[float] = 1.0,
    control_guidance_start: float | Sequence[float] = 0.0,
    control_guidance_end: float | Sequence[float] = 1.0,
    control_mode: int | Sequence[int] | None = None,
    ip_adapter_image: Image.Image | Sequence[Image.Image] | None = None,
    ip_adapter_image_embeds: Sequence[torch.Tensor] | None = None,
    callback: Callback | None = None,
    preview: Callable[[str, list[Image.Image]], None] | None = None,
    preset: str | None = None,
    **overrides: Any,
) -> list[Image.Image]:
    """Images of height × width pixels, `num_images_per_prompt` of the first prompt, then of the second, …

    Each carries its record in `info["parameters"]`, as JSON; `hires.save` writes it into a PNG. Every stage has a
    progress bar, which `pipe.set_progress_bar_config(disable=True)` takes away, as elsewhere in diffusers.

    Args:
        backbone: from `hires.load` or `Backbone.from_pipeline`.
        prompt: one or several; they are made together, yet each as if alone.
        variant: a name of `hires.variants.VARIANTS`, or a `hires.Variant` of your own.
        height, width: the target in pixels; `hires.sizes` says which are allowed.
        seed: one for all prompts, or one each. The i-th image of a prompt has the seed + i.
        image: your own, in the place of the base image; its aspect ratio must be the target's.
        strength: in (0, 1]; how much of your image the first stage redraws. Default: τ/1000.
        crop: cut your own and control images around their centre to the target's aspect ratio.
        control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end, control_mode,
        ip_adapter_image, ip_adapter_image_embeds: see `hires.additions.extras.Extras`; they act at every stage.
        callback: (stage name, steps done, steps of the stage, noisy latents), after every step.
        preview: (stage name, small images), after every stage but the last; see `hires.cascade.small_images`.
        preset: a name of `hires.settings.PRESETS`: "fast" (8-bit linear layers, cheaper text rows, extrapolated steps).
        overrides: fields of `hires.settings.Sampling`, for example tau=300 or negative_prompt="blurry".

    Raises:
        HiresError: bad input, or too little memory, in one line.
    """
    if not isinstance(backbone, Backbone):
        raise HiresError(f"{type(backbone).__name__} is no backbone: give hires.Backbone.from_pipeline(pipe)")
    for name in overrides:
        if name in ELSEWHERE:
            raise HiresError(f"{name!r} is diffusers': {ELSEWHERE[name]}")
        if name not in Sampling.model_fields:
            own = [name for name, p in signature(generate).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
            raise unknown("argument or setting", name, [*own, *Sampling.model_fields])
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    seeds = [int(seed)] * len(prompts) if isinstance(seed, int | Integral) else [int(each) for each in seed]
    if not prompts:
        raise HiresError("no prompt: give at least one")
    if num_images_per_prompt < 1:
        raise HiresError(f"num_images_per_prompt = {num_images_per_prompt}: allowed: 1 or more")
    copies = range(num_images_per_prompt)
    sampling = Sampling.of(**{**backbone.preset(preset), **overrides})
    extras = Extras(
        control_image=control_image,
        controlnet_conditioning_scale=controlnet_conditioning_scale,
        control_guidance_start=control_guidance_start,
        control_guidance_end=control_guidance_end,
        control_mode=control_mode,
        ip_adapter_image=ip_adapter_image,
        ip_adapter_image_embeds=ip_adapter_image_embeds,
    )
    texts = [text for text in prompts for _ in copies]
    numbers = [first + index for first in seeds for index in copies]
    request = Request(backbone, variant, height, width, sampling, image, strength, extras, crop)
    made: list[Image.Image] = []
    bars = _Bars(backbone.pipe, callback)

    def make() -> None:
        for stage in request.stages(texts, numbers, bars):
            if preview is not None and not request.ends_with(stage):
                preview(stage.name, small_images(backbone, stage))
        given = extras.record() | ({"image": picture_record(image)} if image else {}) | ({"crop": True} if crop else {})
        made.extend(request.images(stage, texts, numbers, additions={"in_memory": given} if given else None))

    try:
        reason = attempt(make)
    finally:
        bars.bar.close()
        backbone.free()
    if reason:
        raise HiresError(f"{height}x{width}, batch {len(texts)}: {reason}; {ADVICE}")
    return made


class _Bars:
    """A callback that shows a progress bar for each stage, the pipeline's own, and calls another one."""

    def __init__(self, pipe: Any, callback: Callback | None) -> None:
        self.pipe, self.callback = pipe, callback
        self.stage, self.bar = "", tqdm(disable=True)

    def __call__(self, stage: str, step: int, steps: int, latents: torch.Tensor) -> None:
        if stage != self.stage:
            self.bar.close()
            self.stage, self.bar = stage, self.pipe.progress_bar(total=steps)
            self.bar.set_description(stage)
        self.bar.update()
        if self.callback is not None:
            self.callback(stage, step, steps, latents)


@dataclass(frozen=True)
class Request:
    """What images are made of, all but their prompts and seeds.

    Attributes:
        variant: a name of `hires.variants.VARIANTS`, or a Variant.
        height, width: of the last stage, in pixels.
        image, strength, extras, crop: as `generate` takes them.
    """

    backbone: Backbone
    variant: str | Variant
    height: int
    width: int
    sampling: Sampling
    image: Image.Image | None = None
    strength: float | None = None
    extras: Extras = NO_EXTRAS
    crop: bool = False

    @property
    def chosen(self) -> Variant:
        """The variant itself."""
        return find_variant(self.variant) if isinstance(self.variant, str) else self.variant

    def stages(self, prompts: list[str], seeds: list[int], callback: Callback | None = None) -> Iterator[Stage]:
        """The stages of `hires.cascade.cascade` for a prompt and a seed per image."""
        backbone, height, width = self.backbone, self.height, self.width
        pixels = None
        if self.crop and self.image is None and not self.extras.control_images:
            raise HiresError("crop cuts your own and control images, and there is none: leave it out")
        if self.image is not None:
            base = stage_sizes(height, width, backbone.base_resolution, backbone.size_multiple)[0]
            rgb = fitted("image", self.image, height, width, self.crop)
            pixels = to_pixels(rgb, base).expand(len(prompts), -1, -1, -1)
        return cascade(
            backbone, prompts, seeds, self.chosen, height, width, self.sampling, callback=callback, image=pixels,
            strength=self.strength, extras=self.extras.fitted(height, width, self.crop),
        )  # fmt: skip

    def ends_with(self, stage: Stage) -> bool:
        """Whether a stage is the last one."""
        return (stage.height, stage.width) == (self.height, self.width)

    def images(
        self,
        stage: Stage,
        prompts: list[str],
        seeds: list[int],
        picture: dict[str, str] | None = None,
        additions: dict[str, Any] | None = None,
    ) -> list[Image.Image]:
        """The images of a stage, each with its record as JSON in `info["parameters"]`: enough to make it again.

        `picture` says which file took the base's place: its name and SHA-256. `additions`: what was added
        (`hires.additions.Additions.record`).
        """
        images = decode(self.backbone, stage, self.sampling.vae_tiling)
        common = self._record(stage, picture, additions)
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            image.info["parameters"] = json.dumps(common | {"prompt": prompt, "seed": seed})
        return images

    def _record(self, stage: Stage, picture: dict[str, str] | None, additions: dict[str, Any] | None) -> dict[str, Any]:
        """What the images of a stage have in common; prompt and seed are left open."""
        import diffusers

        backbone = self.backbone
        return {
            "model": backbone.name,
            "revision": backbone.revision,
            "adapters": adapter_digests(backbone.pipe, self.chosen.adapter),
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "prompt": None,
            "seed": None,
            "variant": self.variant if isinstance(self.variant, str) else None,
            "variant_fields": self.chosen.model_dump(),
            "stage": stage.name,
            "height": stage.height,
            "width": stage.width,
            "strength": self.strength,
            "image": picture,
            "additions": additions,
            "sampling": self.sampling.over(backbone.defaults).model_dump(),
            "versions": {
                "hires": hires.__version__,
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "python": platform.python_version(),
            },
        }
