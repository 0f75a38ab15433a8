"""What can't be made, refused before any work: each HiresError says in one line what doesn't fit and how to mend it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hires.additions.extras import Extras
from hires.attention import use_attention
from hires.attention.bands import divided
from hires.backbones.base import Backbone
from hires.errors import HiresError
from hires.methods import GUIDES, low_pass
from hires.settings import Resolved
from hires.sizes import Size, low_resolution_size
from hires.variants import Variant


def check_request(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    variant: Variant,
    sampling: Resolved,
    extras: Extras,
) -> None:
    """Refuse a variant that contradicts itself or the settings, and seeds or additions that don't go with the rest."""
    backbone.check_extras(extras)
    if variant.attention == "scale_dit" and extras.control_images:
        raise HiresError(
            "a ControlNet has no keys of the low-resolution image that scale_dit needs: choose another variant"
        )
    if variant.attention == "scale_dit" and sampling.true_guidance > 1:
        raise HiresError("true_cfg_scale: the low-resolution pass of scale_dit sees one prompt: leave it out")
    if len(prompts) != len(seeds):
        raise HiresError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed per prompt")
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise HiresError(f"seed {seed}: allowed: 0 to 2^63 − 1")
    of_base = ("lfm", "sharpening", *GUIDES)
    if variant.start == "noise" and any(getattr(variant, name) for name in of_base):
        raise HiresError(f"a variant that starts from noise has no base image: {', '.join(of_base)} must be off")
    if variant.views != "none" and variant.attention != "dense":
        raise HiresError(f"views of the base size leave {variant.attention!r} attention nothing to do: allowed: dense")
    if variant.views != "none" and sampling.step_cache is not None:
        raise HiresError("step_cache: the views of a step would be taken for steps: leave it out")
    if variant.attention == "scale_dit" and variant.start == "noise":
        raise HiresError("scale_dit is guided by a base image: start from the base")
    if variant.adapter and variant.attention != "scale_dit":
        raise HiresError(
            f"adapter {variant.adapter!r}: only attention 'scale_dit' uses one; a LoRA of yours that is loaded on the "
            "pipeline stays on without being named"
        )


def check_start(
    backbone: Backbone,
    variant: Variant,
    n: int,
    size: Size,
    base: Tensor | None,
    image: Tensor | None,
    strength: float | None,
) -> None:
    """Refuse what a first stage of `n` images of `size` (pixels) can't start from."""
    if variant.start == "noise" and (base is not None or image is not None or strength is not None):
        raise HiresError(
            "a variant that starts from noise takes no image, no strength and no base latents: leave them out, or "
            "choose one that starts from the base"
        )
    if base is not None and image is not None:
        raise HiresError("give base latents or an image, not both")
    if strength is not None and not 0 < strength <= 1:
        raise HiresError(f"strength {strength:g}: allowed: above 0, up to 1")
    if strength is not None and image is None:
        raise HiresError("strength says how much of your image is redrawn: give an image as well")
    for what, given, shape in (
        ("base latents", base, (n, backbone.latent_channels, *backbone.latent_size(*size))),
        ("image", image, (n, 3, *size)),
    ):
        if given is not None and tuple(given.shape) != shape:
            raise HiresError(f"{what} of shape {tuple(given.shape)}: this target needs {shape}")


def check_stages(
    backbone: Backbone,
    variant: Variant,
    sampling: Resolved,
    sizes: Sequence[Size],
    base_size: Size,
    strength: float | None = None,
) -> None:
    """Refuse steps, an attention or a filter that don't fit one of the stages; sizes in latent pixels."""
    if variant.start == "base":
        for given in (strength, None):  # of the first stage above the base, of the others
            sampling.above_base(given).stage_steps()
    options = sampling.attention_options(variant.attention)
    if variant.sharpening and sampling.reference == "latent" and not variant.lfm:
        raise HiresError("reference = 'latent' enlarges no image that could be sharpened: leave one of the two out")
    for size in sizes:
        for model in (backbone.model, *backbone.controlnets):
            with use_attention(model, variant.attention, size, base_size, **options):
                if model is backbone.model:
                    with divided(model, variant, sampling, size, base_size, bool(backbone.controlnets)):
                        pass
        for used, factor in ((variant.lfm, sampling.lfm_factor), (variant.sg, sampling.sg_factor)):
            if used:
                low_pass(torch.zeros(1, 1, *size), sampling.low_pass, factor)
        if variant.attention == "scale_dit" and sampling.lr_keys:
            low_resolution_size(size, sampling.lr_ratio)
