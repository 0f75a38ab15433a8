"""What the processors of FLUX's joint attention share: projections, QK-norm and RoPE of both streams."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hires_kernels
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxIPAdapterAttnProcessor,
    _get_qkv_projections,
)
from torch import Tensor, nn

from hires.attention.layers import Grid, Layer
from hires.attention.processors import WindowedProcessor
from hires.errors import HiresError

Triple = tuple[Tensor, Tensor, Tensor]


def image_ids(grid: Grid, device: torch.device, anchors: Grid | None = None) -> Tensor:
    """(rows · columns, 3) positions of a grid's tokens: 0, row, column. float32: bf16 ends at 256.

    `anchors`: a finer grid of the same picture, s times as large, whose rows and columns are counted: (0, s·i, s·j),
    Scale-DiT's scaled positional anchors (arXiv 2510.16325, section 3.2).
    """
    rows, columns = (
        torch.arange(side, device=device, dtype=torch.float32) * (counted / side)
        for side, counted in zip(grid, anchors or grid)
    )
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    return torch.cat([torch.zeros_like(places[..., :1]), places], dim=-1).flatten(0, 1)


class Joint(NamedTuple):
    """Tensors (batch, tokens, heads, head_dim) of one call.

    query, key, value: of the image, normalised and rotated. text: query, key and value of the text, normalised, not
    rotated. rope: (cos, sin) of the image tokens. projected: the image's query as projected.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    text: Triple
    rope: tuple[Tensor, Tensor]
    projected: Tensor


def joint_projections(
    attn: FluxAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    image_rotary_emb: tuple[Tensor, Tensor],
    tokens: int,
    backend: str,
) -> Joint:
    """A double block has its text apart, with its own projections; a single block in front of `tokens` image tokens."""
    projections = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
    added = None if encoder_hidden_states is None else projections[3:]
    return joint_of(attn, projections[:3], added, image_rotary_emb, tokens, backend)


def joint_of(
    attn: Any,
    projections: Triple,
    added: Triple | None,
    image_rotary_emb: tuple[Tensor, Tensor],
    tokens: int,
    backend: str,
) -> Joint:
    """What `joint_projections` makes of (batch, tokens, channels) projections; `added` are those of a text apart."""
    query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projections)
    norms = attn.norm_q, attn.norm_k
    if added is None:
        text_tokens = query.shape[1] - tokens
        text = query[:, :text_tokens], key[:, :text_tokens], value[:, :text_tokens]
        query, key, value = (x[:, text_tokens:] for x in (query, key, value))
        text_norms = norms
    else:
        text_tokens = added[0].shape[1]
        text_query, text_key, text_value = (x.unflatten(-1, (-1, attn.head_dim)) for x in added)
        text = text_query, text_key, text_value
        text_norms = attn.norm_added_q, attn.norm_added_k
    rope = image_rotary_emb[0][text_tokens:], image_rotary_emb[1][text_tokens:]
    if hasattr(attn.norm_q, "_hf_hook") or hasattr(attn.norm_q, "_diffusers_hook"):
        # Offloaded by itself: its weight is on the device only while it runs.
        turned = [apply_rotary_emb(norm(x), rope, sequence_dim=1) for norm, x in zip(norms, (query, key))]
        texts = [norm(x) for norm, x in zip(text_norms, text)]
        return Joint(turned[0], turned[1], value, (texts[0], texts[1], text[2]), rope, query)
    turned_query, turned_key, normed_query, normed_key = hires_kernels.qk_norm_rope(
        query,
        key,
        (norms[0].weight, norms[1].weight),
        rope,
        text=text[:2],
        text_weight=(text_norms[0].weight, text_norms[1].weight),
        eps=attn.norm_q.eps,
        backend="reference" if backend == "reference" else "auto",
    )
    assert normed_query is not None and normed_key is not None  # as text was given
    return Joint(turned_query, turned_key, value, (normed_query, normed_key, text[2]), rope, query)


def image_prompt_term(
    adapter: FluxIPAdapterAttnProcessor, attn: FluxAttention, projected: Tensor, prompts: Sequence[Tensor]
) -> Tensor:
    """What an IP-Adapter adds to a double block: image queries, not rotated, on every token of the image prompts."""
    query = attn.norm_q(projected)
    term = torch.zeros_like(query.flatten(2))
    for prompt, scale, to_k, to_v in zip(prompts, adapter.scale, adapter.to_k_ip, adapter.to_v_ip):
        # A prompt is (batch, tokens, width), or (batch, images, tokens, width).
        key, value = (x.flatten(1, -2).unflatten(-1, (-1, attn.head_dim)) for x in (to_k(prompt), to_v(prompt)))
        seen = dispatch_attention_fn(query, key, value, backend=adapter._attention_backend)
        term = term + scale * seen.flatten(2)
    return term


class FluxProcessor(WindowedProcessor):
    """Joint attention of FLUX's double blocks (text apart) and single blocks (text in front of the image).

    A subclass has `attend`, which takes the arguments of a call and gives what it returns, and the image query as
    projected.
    """

    attend: Callable[..., tuple[Any, Tensor]]

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)[0]


class FluxIPAdapterProcessor(nn.Module, FluxProcessor):
    """A double block with an IP-Adapter: the adapter's own weights, and its image-prompt term as a third output.

    A module, so that the adapter's weights stay part of the model and move with it.
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ip_hidden_states: Sequence[Tensor] = (),
        ip_adapter_masks: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        output, query = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return *output, image_prompt_term(self.wrapped, attn, query, ip_hidden_states)


def check_call(kind: str, layer: Layer, tokens: int, attention_mask: Tensor | None) -> None:
    """Raise HiresError where the model was called with other latents than the context was opened for."""
    expected = layer.grid[0] * layer.grid[1]
    if tokens != expected:
        raise HiresError(
            f"{layer.name} got {tokens} image tokens, its grid {layer.grid[0]}x{layer.grid[1]} has {expected}: "
            "give use_attention the latents' own size"
        )
    if attention_mask is not None:
        raise HiresError(f"{layer.name} got an attention mask: {kind} takes none: call the model without it")
