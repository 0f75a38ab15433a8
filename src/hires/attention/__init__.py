"""Self-attention of stock diffusers models at sizes beyond their training: windows, processors, one context manager."""

from hires.attention.context import KINDS, use_attention
from hires.attention.layers import AttentionHandle, Layer, attention_layers
from hires.attention.npa import draw_shifts

__all__ = ["KINDS", "AttentionHandle", "Layer", "attention_layers", "draw_shifts", "use_attention"]
