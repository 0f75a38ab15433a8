"""Attention over windows of a token grid, for ultra-high-resolution diffusion. Imports torch and nothing of hires.

`neighborhood_patch_attention` is ScaleDiff's operation (arXiv 2510.25818), `local_attention` Scale-DiT's
(arXiv 2510.16325), `qk_norm_rope` what FLUX does to queries and keys before. Tensors are (batch, tokens, heads,
head_dim), grids row-major. `group_norm` and `add_bias` are what a VAE does between its convolutions.
"""

from hires_kernels.backends import BACKENDS, Problem, explain
from hires_kernels.band import EXCHANGING, NCCL, band_attention, seen_rows
from hires_kernels.errors import KernelError
from hires_kernels.library import register_flop_formulas
from hires_kernels.operations import (
    add_bias,
    group_norm,
    local_attention,
    neighborhood_patch_attention,
    qk_norm_rope,
)
from hires_kernels.rope import apply_rope
from hires_kernels.watching import Ran, watch

__all__ = [
    "BACKENDS",
    "EXCHANGING",
    "NCCL",
    "KernelError",
    "Problem",
    "Ran",
    "add_bias",
    "apply_rope",
    "band_attention",
    "explain",
    "group_norm",
    "local_attention",
    "neighborhood_patch_attention",
    "qk_norm_rope",
    "register_flop_formulas",
    "seen_rows",
    "watch",
]
