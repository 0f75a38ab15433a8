"""Self-attention of stock diffusers models at sizes beyond their training: processors, and a context manager for them.

    context.py         `use_attention`: dense, npa or scale_dit for a while
    layers.py          the self-attention layers of a model, with the token grid and the window of each
    npa.py             Neighborhood Patch Attention (ScaleDiff) in FLUX and U-Nets; flux2.py: in FLUX.2
    scale_dit.py       Scale-DiT's local attention, and its pass over the low-resolution image
    bands.py           Neighborhood Patch Attention of one image on several GPUs

The operations themselves are those of `hires_kernels`.
"""

from hires.attention import flux2  # noqa: F401  (adds FLUX.2's layers and processors)
from hires.attention.context import KINDS, use_attention
from hires.attention.layers import AttentionHandle, Layer, attention_layers
from hires.attention.npa import draw_shifts
from hires.attention.scale_dit import Guidance, low_resolution_pass

__all__ = [
    "KINDS",
    "AttentionHandle",
    "Guidance",
    "Layer",
    "attention_layers",
    "draw_shifts",
    "low_resolution_pass",
    "use_attention",
]
