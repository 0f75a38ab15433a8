"""`hires speed accuracy`: what each option that changes pixels costs in accuracy, against the same image without it."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hires.attention import use_attention
from hires.backbones import load
from hires.backbones.base import Backbone
from hires.cascade import base_latents, cascade, to_pixels
from hires.execution.fp8 import fp8_linears
from hires.metrics.distances import kid
from hires.metrics.networks import load_features
from hires.metrics.pixels import crop_boxes
from hires.scenes import caption, reference_image, scene
from hires.scenes.world import scene_ids
from hires.settings import PRESETS, Sampling
from hires.speed.steps import PROMPT, noise
from hires.variants import VARIANTS

OPTIONS: dict[str, dict[str, Any]] = {
    "fp8": {"linears": "fp8"},
    "global text rows": {"text_rows": "global"},
    "step cache 3": {"step_cache": 3},
    "fast": PRESETS["fast"],
}
CROPS = 10  # of an image, 128 pixels each
SIDE = 256


def images(model: str, device: torch.device, count: int) -> Iterator[dict[str, Any]]:
    """A row for each option: ScaleDiff images of a trained small model at 256², one per held-out prompt, seed 0.

    psnr: mean over images, dB, of 8-bit values. latents: relative error, the norm of the difference over the norm.
    kid_patch: by how much KID of crops to the true renders' grows, in tiny-clip's features; the same subsets for both.
    """
    backbone = load(model, device)
    network = load_features("tiny-clip", str(device))
    ids = scene_ids("held-out", count)
    prompts = [caption(scene(index)) for index in ids]
    bases = [base_latents(backbone, [prompt], [0], SIDE, SIDE, Sampling()) for prompt in prompts]

    def made(settings: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        latents, pixels = [], []
        for prompt, base in zip(prompts, bases, strict=True):
            sampling = Sampling.of(**settings)
            *_, last = cascade(backbone, [prompt], [0], VARIANTS["scalediff"], SIDE, SIDE, sampling, base)
            assert last.latents is not None
            latents.append(last.latents)
            pixels.append(((backbone.decode(last.latents)[0] + 1) * 127.5).round())
        return latents, pixels

    @torch.no_grad()
    def features(pixels: list[Tensor]) -> Tensor:
        crops = [
            image[:, top : top + network.crop, left : left + network.crop]
            for index, image in enumerate(pixels)
            for top, left in crop_boxes(str(index), SIDE, SIDE, network.crop, CROPS, 0)
        ]
        return network(torch.stack(crops))[0].double()

    exact_latents, exact = made({})
    truth = [to_pixels(reference_image(index, SIDE, SIDE), (SIDE, SIDE))[0].to(device) for index in ids]
    reals = features([((image + 1) * 127.5).round() for image in truth])

    def distance(pixels: list[Tensor]) -> float:
        generator = torch.Generator().manual_seed(0)
        return kid(features(pixels), reals, len(reals) // 2, 50, generator)[0]

    before = distance(exact)
    for name, settings in OPTIONS.items():
        given = {key: value for key, value in settings.items() if key not in backbone.unused_settings}
        if not given or (name != "fast" and given != settings):
            continue
        latents, pixels = made(given)
        noise_power = torch.stack([(a - b).square().mean() for a, b in zip(pixels, exact, strict=True)])
        yield {
            "model": model,
            "option": name,
            "n": count,
            "psnr": float((10 * torch.log10(255**2 / noise_power)).mean()),
            "latents": relative(torch.cat(latents), torch.cat(exact_latents)),
            "kid_patch": distance(pixels) - before,
        }


@torch.no_grad()
def outputs(model: str, dtype: str, device: torch.device, side: int) -> Iterator[dict[str, Any]]:
    """A row for each option that acts within a step: relative error of one model output of a full-size architecture.

    Its weights are random, so this says how rounding grows through the blocks, not what a trained model makes of it.
    """
    backbone = load(model, device, dtype, weights="random")
    exact = _output(backbone, side, {})
    for name, settings in OPTIONS.items():
        given = {key: value for key, value in settings.items() if key not in (*backbone.unused_settings, "step_cache")}
        if given and (name == "fast" or given == settings):
            error = relative(_output(backbone, side, given), exact)
            yield {"model": f"{model}, {side}², random weights", "option": name, "n": 1, "latents": error}


def _output(backbone: Backbone, side: int, settings: dict[str, Any]) -> Tensor:
    sampling = Sampling.of(**settings).over(backbone.defaults)
    base = backbone.latent_size(backbone.base_resolution, backbone.base_resolution)
    size = backbone.latent_size(side, side)
    latents = noise(1, backbone.latent_channels, *size, device=backbone.device)
    conditioning = backbone.encode_prompt([PROMPT], sampling)
    schedule = backbone.schedule(sampling, base)
    with use_attention(backbone.model, "npa", size, base, text_rows=sampling.text_rows):
        if sampling.linears == "full":
            return backbone.predict(latents, schedule, 0, conditioning, sampling, (side, side))
        with fp8_linears(backbone.model):
            return backbone.predict(latents, schedule, 0, conditioning, sampling, (side, side))


def relative(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖."""
    return float((one - other).norm() / other.norm())


def shown(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as people read them."""
    table = pd.DataFrame(rows).reindex(columns=["model", "option", "n", "psnr", "latents", "kid_patch"])
    return pd.DataFrame(
        {
            "model": table["model"],
            "option": table["option"],
            "images": table["n"],
            "PSNR, dB": table["psnr"].map(lambda x: "" if pd.isna(x) else f"{x:.1f}"),
            "relative error of latents": table["latents"].map(lambda x: f"{x:.2%}"),
            "change of KID_p, 10⁻³": table["kid_patch"].map(lambda x: "" if pd.isna(x) else f"{1e3 * x:+.2g}"),
        }
    )
