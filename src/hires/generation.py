"""`hires.generate`: images from prompts in one call, and the record that makes an image again."""

import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

import hires
from hires.adapters import adapter_digests
from hires.backbones.base import Backbone
from hires.cascade import Callback, Stage, cascade, decode, to_pixels
from hires.errors import HiresError
from hires.settings import Sampling
from hires.sizes import stage_sizes
from hires.variants import Variant
from hires.variants import variant as find_variant


def generate(
    backbone: Backbone,
    prompt: str | Sequence[str],
    variant: str | Variant = "scalediff",
    *,
    height: int,
    width: int,
    seed: int | Sequence[int] = 0,
    image: Image.Image | None = None,
    strength: float | None = None,
    callback: Callback | None = None,
    **overrides: Any,
) -> list[Image.Image]:
    """Images of height × width pixels, one per prompt.

    Args:
        backbone: from `hires.load` or `Backbone.from_pipeline`.
        prompt: one or several; they are made together, yet each as if alone.
        variant: a name of `hires.variants.VARIANTS`, or a Variant of your own.
        height, width: the target in pixels; `hires.sizes` says which are allowed.
        seed: one for all prompts, or one each.
        image: your own, in the place of the base image; its aspect ratio must be the target's.
        strength: in (0, 1]; how much of your image the first stage redraws. Default: τ/1000.
        callback: (stage name, steps done, steps of the stage, noisy latents), after every step.
        overrides: fields of `hires.settings.Sampling`, for example tau=300.

    Raises:
        HiresError: bad input, in one line.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if not prompts:
        raise HiresError("no prompt: give at least one")
    chosen = find_variant(variant) if isinstance(variant, str) else variant
    stages = run(backbone, prompts, seeds, chosen, height, width, Sampling.of(**overrides), image, strength, callback)
    *_, last = stages
    return decode(backbone, last, Sampling.of(**overrides).vae_tiling)


def run(
    backbone: Backbone,
    prompts: list[str],
    seeds: list[int],
    variant: Variant,
    height: int,
    width: int,
    sampling: Sampling,
    image: Image.Image | None = None,
    strength: float | None = None,
    callback: Callback | None = None,
) -> Iterator[Stage]:
    """The stages of `hires.cascade.cascade`, from a PIL image where one is given."""
    pixels = None
    if image is not None:
        base = stage_sizes(height, width, backbone.base_resolution, backbone.size_multiple)[0]
        if abs(image.height * width - image.width * height) > 0.01 * image.width * height:
            raise HiresError(
                f"the image is {image.height}x{image.width} (height x width) and the target {height}x{width}: "
                "their aspect ratios must agree within 1%: crop the image or choose another size"
            )
        pixels = to_pixels(image, base).expand(len(prompts), -1, -1, -1)
    return cascade(
        backbone, prompts, seeds, variant, height, width, sampling,
        callback=callback, image=pixels, strength=strength,
    )  # fmt: skip


def record(
    backbone: Backbone,
    prompt: str,
    seed: int,
    variant: str | Variant,
    stage: Stage,
    sampling: Sampling,
    strength: float | None = None,
    image: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that made an image, as JSON-ready values: enough to make it again.

    `image` says which picture of your own took the base's place: file name and SHA-256.
    """
    import diffusers

    chosen = find_variant(variant) if isinstance(variant, str) else variant
    return {
        "model": backbone.name,
        "revision": backbone.revision,
        "adapters": adapter_digests(backbone.pipe, chosen.adapter),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "prompt": prompt,
        "seed": seed,
        "variant": variant if isinstance(variant, str) else None,
        "variant_fields": chosen.model_dump(),
        "stage": stage.name,
        "height": stage.height,
        "width": stage.width,
        "strength": strength,
        "image": image,
        "sampling": sampling.over(backbone.defaults).model_dump(),
        "versions": {
            "hires": hires.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
