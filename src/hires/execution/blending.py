"""Seams of a tiled VAE blended a strip at a time: diffusers launches four kernels for every row of pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor


def blend(a: Tensor, b: Tensor, blend_extent: int, dim: int) -> Tensor:
    """`b`, whose first rows along `dim` now go over from the last ones of `a`: a·(1 − y/n) + b·(y/n) in row y of n.

    To the bit what diffusers' `AutoencoderKL.blend_v` (dim 2) and `blend_h` (dim 3) give row by row. PyTorch
    multiplies 16 bits by a Python number in float32: the products are rounded to `b`'s dtype, and then their sum.

    Args:
        a, b: neighbouring tiles (B, C, H, W), float32 or 16 bits; `b` is changed in place.
        blend_extent: n, at most; fewer rows where a tile has fewer.
    """
    n = min(a.shape[dim], b.shape[dim], blend_extent)
    last, first = a.narrow(dim, a.shape[dim] - n, n), b.narrow(dim, 0, n)
    falling, rising = (weights.unsqueeze(-1) if dim == 2 else weights for weights in _weights(n, b.device))
    first.copy_((last * falling).to(b.dtype) + (first * rising).to(b.dtype))
    return b


@cache
def _weights(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """1 − y/n and y/n, y < n, in float32. From the CPU: a GPU divides by a number as it multiplies by its inverse."""
    rising = torch.arange(n, dtype=torch.float64, device="cpu") / n
    return (1 - rising).float().to(device), rising.float().to(device)


BLENDS = {"blend_v": partial(blend, dim=2), "blend_h": partial(blend, dim=3)}
REPLACED = [{name: getattr(kind, name) for name in BLENDS} for kind in (AutoencoderKL, AutoencoderKLFlux2)]


@contextmanager
def whole_strips(vae: Any) -> Iterator[None]:
    """Within it a VAE with diffusers' own methods blends by `blend`; a VAE with others keeps them."""
    vae = unwrap_module(vae)
    if vars(vae).keys() & BLENDS or {name: getattr(type(vae), name, None) for name in BLENDS} not in REPLACED:
        yield
        return
    vars(vae).update(BLENDS)
    try:
        yield
    finally:
        for name in BLENDS:
            del vars(vae)[name]
