"""Self-attention of stock diffusers models at sizes beyond their training: windows, processors, one context manager."""

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
