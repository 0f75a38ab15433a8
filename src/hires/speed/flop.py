"""Floating-point operations of a step: counted on tensors without values, and by the formula of ScaleDiff's table."""

from functools import lru_cache

import hires_kernels
import torch
from torch.utils.flop_counter import FlopCounterMode

from hires.attention import use_attention
from hires.backbones import load
from hires.backbones.base import Backbone
from hires.methods.multidiffusion import views
from hires.settings import Sampling
from hires.speed.steps import PROMPT, Contender


@lru_cache(maxsize=1)
def _twin(name: str, dtype: torch.dtype) -> Backbone:
    """The model on the device "meta", which counts and computes nothing."""
    hires_kernels.register_flop_formulas()
    return load(name, "meta", dtype, weights="random")


@torch.no_grad()
def step(backbone: Backbone, contender: Contender, side: int) -> dict[str, int]:
    """FLOP of a step at side² pixels: {"flop": counted, with Scale-DiT's "flop_low" for its pass over the low image}.

    Matrix products, convolutions and attention; for windowed attention what the method needs (`hires_kernels.flops`).
    """
    twin = _twin(backbone.name, backbone.dtype)
    conditioning = {key: x.to("meta") for key, x in backbone.encode_prompt([PROMPT], backbone.defaults).items()}
    variant = contender.variant
    base = twin.latent_size(twin.base_resolution, twin.base_resolution)
    size = twin.latent_size(side, side)
    count = 1
    if variant.views != "none":
        count, size = len(views(size, base)), base
    sampling = Sampling.of(**contender.settings).over(twin.defaults)
    schedule = backbone.schedule(sampling, base)
    schedule.timesteps = schedule.timesteps.to("meta")
    found: dict[str, int] = {}
    options = sampling.attention_options(variant.attention)
    if variant.attention == "scale_dit":
        low = (int(size[0] / sampling.lr_ratio), int(size[1] / sampling.lr_ratio))
        with FlopCounterMode(display=False) as counter:
            options["guidance"] = twin.low_resolution_guidance(_empty(twin, low), size, conditioning, sampling)
        found["flop_low"] = counter.get_total_flops()
    with (
        contender.installed(twin),
        use_attention(twin.model, variant.attention, size, base, **options),
        FlopCounterMode(display=False) as counter,
    ):
        twin.predict(_empty(twin, size), schedule, 0, conditioning, sampling, (side, side))
    return {"flop": count * counter.get_total_flops(), **found}


def _empty(twin: Backbone, size: tuple[int, int]) -> torch.Tensor:
    return torch.empty(1, twin.latent_channels, *size, device="meta")


def by_formula(contender: str, base: int, attention: int, factor: float) -> float | None:
    """ScaleDiff's complexity table, in units of a base pass: `base` FLOP, of which self-attention `attention`.

    With s = `factor`: everything but self-attention s² (MultiDiffusion (2s − 1)²), self-attention s⁴ (dense), s²
    (NPA), (2s − 1)² (MultiDiffusion). It counts text with the image and text rows not at all. None for what the
    table hasn't.
    """
    rest = base - attention
    if contender == "multidiffusion":
        return base * (2 * factor - 1) ** 2
    if contender in ("dense", "base", "base-fp8"):
        return rest * factor**2 + attention * factor**4
    if contender.startswith("scalediff"):
        return base * factor**2
    return rest * factor**2 if contender == "attention-free" else None
