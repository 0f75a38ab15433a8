"""Neighborhood Patch Attention in FLUX.2: text has positions of its own, a single block is attention and MLP in one.

RoPE has four axes there (time, row, column, index in the text): an image token stands at (0, row, column, 0), text
token i at (0, 0, 0, i). Rotations add up, and each axis turns channels of its own: text that is rotated by its index
here, and by the top-left token of a window in the operation, stands at (0, row, column, i).
"""

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from hires_kernels.rope import apply_rope
from torch import Tensor

from hires.attention.flux import Joint, joint_of
from hires.attention.layers import LAYERS, flux_layers
from hires.attention.npa import STAND_INS, FluxNpaProcessor, NpaLayer
from hires.attention.processors import WindowedProcessor


def place_text(joint: Joint, image_rotary_emb: tuple[Tensor, Tensor]) -> Joint:
    """Rotate the text by its own positions, which are the first of `image_rotary_emb` = (cos, sin)."""
    query, key, value = joint.text
    cos, sin = (table[: query.shape[1]] for table in image_rotary_emb)
    return joint._replace(text=(apply_rope(query, (cos, sin)), apply_rope(key, (cos, sin)), value))


class Flux2NpaProcessor(FluxNpaProcessor):
    """Joint attention of FLUX.2's double blocks."""

    def project(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb) -> Joint:
        joint = super().project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        return place_text(joint, image_rotary_emb)


class Flux2SingleNpaProcessor(WindowedProcessor):
    """FLUX.2's single blocks: one projection gives query, key, value and the MLP's input, one takes both outputs."""

    def __init__(self, wrapped: Flux2ParallelSelfAttnProcessor, operation: NpaLayer) -> None:
        self.wrapped, self.operation = wrapped, operation

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert image_rotary_emb is not None  # the model always gives it
        widths = [attn.inner_dim] * 3 + [attn.mlp_hidden_dim * attn.mlp_mult_factor]
        query, key, value, mlp = attn.to_qkv_mlp_proj(hidden_states).split(widths, dim=-1)
        tokens, backend = self.operation.tokens, self.operation.backend
        joint = joint_of(attn, (query, key, value), None, image_rotary_emb, tokens, backend)
        self.operation.check(joint.query.shape[1], attention_mask)
        placed = place_text(joint, image_rotary_emb)
        image, text = self.operation(placed.query, placed.key, placed.value, text=placed.text, rope=placed.rope)
        attended = torch.cat([text, image], dim=1).flatten(2)
        return attn.to_out(torch.cat([attended, attn.mlp_act_fn(mlp)], dim=-1))


LAYERS[Flux2Transformer2DModel] = flux_layers
STAND_INS |= {Flux2AttnProcessor: Flux2NpaProcessor, Flux2ParallelSelfAttnProcessor: Flux2SingleNpaProcessor}
