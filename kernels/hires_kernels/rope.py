"""Rotary position embedding in FLUX's layout: neighbouring channels (2i, 2i + 1) form a pair."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of `x`; `cos` and `sin` broadcast against it. Computed in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    real, imaginary = wide.unflatten(-1, (-1, 2)).unbind(-1)
    return (wide * cos + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sin).to(x.dtype)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (batch, tokens, heads, head_dim) by rope = (cos, sin), each (tokens, head_dim).

    The same numbers as diffusers' `apply_rotary_emb` up to float32, and full precision in float64.
    """
    cos, sin = rope
    return rotate(x, cos[:, None].to(x.device), sin[:, None].to(x.device))
