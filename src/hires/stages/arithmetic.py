"""Arithmetic of a denoising step of FLUX.1-dev, SDXL and FLUX.2 [klein], counted without loading them."""

from dataclasses import dataclass
from typing import Any

from hires_kernels import flops

from hires.methods.multidiffusion import views
from hires.settings import Sampling
from hires.sizes import Size, patch_side, scaled_window
from hires.variants import Variant

TOKEN = 16  # side in pixels of the tokens that `Architecture.token` counts


@dataclass(frozen=True)
class Architecture:
    """What a model call costs.

    Attributes:
        calls: model calls of a step: two with classifier-free guidance.
        token: FLOP of everything but self-attention, for each token of 16x16 pixels, and of text where it is joint.
        joint: image and text attend to each other in one sequence.
        layers: self-attention as (side of a token in pixels, number of layers, heads, head_dim).
    """

    calls: int
    token: float
    joint: bool
    layers: tuple[tuple[int, int, int, int], ...]


ARCHITECTURES = {  # torch.utils.flop_counter on the full-size models, less their self-attention
    "flux-dev": Architecture(1, 12.91e9, True, ((16, 57, 24, 128),)),
    "sdxl": Architecture(2, 1.46e9, False, ((16, 10, 10, 64), (32, 60, 20, 64))),
    "flux2-klein": Architecture(1, 6.14e9, True, ((16, 25, 24, 128),)),
    "flux2-klein-base": Architecture(2, 6.14e9, True, ((16, 25, 24, 128),)),
}


def step_flop(architecture: Architecture, size: Size, base: Size, variant: Variant, sampling: Sampling) -> float:
    """FLOP of one step of one image of `size`, its base `base`, both (height, width) in pixels."""
    if variant.views == "none":
        return architecture.calls * _call(architecture, size, base, variant.attention, sampling)
    (h, w), view = size, (base[0] // 8, base[1] // 8)
    count = len(views((h // 8, w // 8), view, sampling.view_overlap))
    return architecture.calls * count * _call(architecture, base, base, "dense", sampling)


def _call(architecture: Architecture, size: Size, base: Size, attention: str, sampling: Sampling) -> float:
    text = (sampling.max_sequence_length or 512) if architecture.joint else 0
    total = architecture.token * (size[0] * size[1] / TOKEN**2 + text)
    for side, layers, heads, head_dim in architecture.layers:
        grid, window = (size[0] // side, size[1] // side), (base[0] // side, base[1] // side)
        shape: dict[str, Any] = {"batch": 1, "heads": heads, "head_dim": head_dim}
        rows: tuple[int, ...]
        if attention == "npa":
            window = _scaled(window, grid, sampling.window_scale)
            patch = (patch_side(window[0], sampling.window_overlap), patch_side(window[1], sampling.window_overlap))
            shape |= {"text": text, "text_rows": sampling.text_rows, "patch": patch}
            rows = flops.neighborhood_patch_attention(grid, window, **shape)
        elif attention == "scale_dit":
            rows = _local(grid, text, shape, sampling)
        else:
            rows = (flops.dense_attention(grid[0] * grid[1] + text, **shape),)
        total += layers * sum(rows)
    return total


def _scaled(window: Size, grid: Size, scale: float) -> Size:
    return scaled_window(window[0], grid[0], scale), scaled_window(window[1], grid[1], scale)


def _local(grid: Size, text: int, shape: dict[str, Any], sampling: Sampling) -> tuple[int, int]:
    form, reach = ("radius", sampling.local_radius or 8)
    if sampling.local_window:
        form, reach = "window", sampling.local_window
    low = (int(grid[0] / sampling.lr_ratio), int(grid[1] / sampling.lr_ratio)) if sampling.lr_keys else None
    return flops.local_attention(
        grid, form, reach, **shape, text=text, guidance_grid=low, guidance_neighbours=sampling.lr_neighbours
    )
