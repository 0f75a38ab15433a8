"""A model with its self-attention left out: the floor that a step's time is held against.

Query, key and value are projected as ever, and what comes out in the place of attention is a copy of the value: no
norm, no RoPE, no product. An operator of its own, or a compiler would drop the projections of query and key.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import _get_qkv_projections
from torch import Tensor, nn
from torch.library import custom_op

from hires.attention.layers import attention_layers


@custom_op("hires::attention_left_out", mutates_args=())
def attention_left_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)


@attention_left_out.register_fake
def _(query, key, value):
    return torch.empty_like(value, memory_format=torch.contiguous_format)


class FreeFluxProcessor:
    """FLUX's double and single blocks."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        query, key, value, *added = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        image = attention_left_out(query, key, value)
        if encoder_hidden_states is None:
            return image
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(attention_left_out(*added))


class FreeUNetProcessor:
    """Self-attention of a U-Net."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        projections = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return attn.to_out[1](attn.to_out[0](attention_left_out(*projections)))


@contextmanager
def without_attention(model: nn.Module) -> Iterator[None]:
    """Leave out the model's self-attention within the context."""
    free: Any = FreeFluxProcessor() if isinstance(model, FluxTransformer2DModel) else FreeUNetProcessor()
    modules: list[Any] = [model.get_submodule(layer.name) for layer in attention_layers(model, (2, 2), (2, 2))]
    former = [module.processor for module in modules]
    try:
        for module in modules:
            module.set_processor(free)
        yield
    finally:
        for module, processor in zip(modules, former, strict=True):
            module.set_processor(processor)
