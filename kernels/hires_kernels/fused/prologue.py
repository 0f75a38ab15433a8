"""RMSNorm, RoPE and softmax scale of queries and keys in one launch, so that each is read and written once.

With x the channels of one head of one token, w the norm's weight, and (2i, 2i + 1) the channel pairs:

    n = x · rsqrt(mean(x²) + eps) · w
    y[2i] = n[2i] · cos[2i] − n[2i + 1] · sin[2i],    y[2i + 1] = n[2i + 1] · cos[2i + 1] + n[2i] · sin[2i + 1]

in float32, rounded once; a query is multiplied by the scale before. A program serves one token: all heads of its
query and key share the row of cos and sin, which stays in registers. Text tokens come first in the grid, one program
for each place they are rotated to.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hires_kernels import launches, watching


@triton.jit
def _normalised(x, weight, eps, DIM: tl.constexpr):
    x = x.to(tl.float32)
    mean = tl.sum(x * x, axis=1) / DIM
    return x * tl.rsqrt(mean + eps)[:, None] * weight


@triton.jit
def _pairs(x, ROWS: tl.constexpr, DIM: tl.constexpr):
    """The even and the odd channels of x (ROWS, DIM)."""
    return tl.split(tl.reshape(x, [ROWS, DIM // 2, 2]))


@triton.jit
def _rotated(x, cos_even, cos_odd, sin_even, sin_odd, HEADS: tl.constexpr, DIM: tl.constexpr):
    even, odd = _pairs(x, HEADS, DIM)
    real = even * cos_even - odd * sin_even
    imaginary = odd * cos_odd + even * sin_odd
    return tl.reshape(tl.join(real, imaginary), [HEADS, DIM])


@triton.jit
def _token(
    query,
    key,
    query_head,
    key_head,
    query_weight,
    key_weight,
    cos,
    sin,
    place,
    query_out,
    key_out,
    eps,
    scale,
    heads: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """All heads of one token; the pointers are at its first channel, the outputs are contiguous."""
    channel = tl.arange(0, DIM)[None, :]
    wq = tl.load(query_weight + channel).to(tl.float32)
    wk = tl.load(key_weight + channel).to(tl.float32)
    if ROTATE:
        cos_even, cos_odd = _pairs(tl.load(cos + place * DIM + channel).to(tl.float32), 1, DIM)
        sin_even, sin_odd = _pairs(tl.load(sin + place * DIM + channel).to(tl.float32), 1, DIM)
    for first in tl.static_range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (channel < DIM)
        q = tl.load(query + head * query_head + channel, mask=inside, other=0.0)
        k = tl.load(key + head * key_head + channel, mask=inside, other=0.0)
        q = _normalised(q, wq, eps, DIM)
        k = _normalised(k, wk, eps, DIM)
        if ROTATE:
            q = _rotated(q, cos_even, cos_odd, sin_even, sin_odd, HEADS, DIM)
            k = _rotated(k, cos_even, cos_odd, sin_even, sin_odd, HEADS, DIM)
        tl.store(query_out + head * DIM + channel, (q * scale).to(query_out.dtype.element_ty), mask=inside)
        tl.store(key_out + head * DIM + channel, k.to(key_out.dtype.element_ty), mask=inside)


@triton.jit
def qk_norm_rope_kernel(
    query,
    key,
    query_weight,
    key_weight,
    cos,
    sin,
    query_out,
    key_out,
    text_query,
    text_key,
    text_query_weight,
    text_key_weight,
    places,
    text_query_out,
    text_key_out,
    query_batch,
    query_token,
    query_head,
    key_batch,
    key_token,
    key_head,
    text_query_batch,
    text_query_token,
    text_query_head,
    text_key_batch,
    text_key_token,
    text_key_head,
    tokens,
    text_tokens,
    copies,
    eps,
    scale,
    heads: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TEXT: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Program p of sample b: text token p % text_tokens at place p // text_tokens, then the image tokens."""
    program = tl.program_id(0).to(tl.int64)
    text_programs = text_tokens * copies
    sample = program // (tokens + text_programs)
    index = program % (tokens + text_programs)
    if index >= text_programs:
        token = index - text_programs
        out = (sample * tokens + token) * (heads * DIM)
        _token(
            query + sample * query_batch + token * query_token,
            key + sample * key_batch + token * key_token,
            query_head,
            key_head,
            query_weight,
            key_weight,
            cos,
            sin,
            token,
            query_out + out,
            key_out + out,
            eps,
            scale,
            heads,
            HEADS,
            DIM,
            True,
        )
    elif TEXT:
        token = index % text_tokens
        place = index // text_tokens
        if PLACES:
            place = tl.load(places + place).to(tl.int64)
        out = (sample * text_programs + index) * (heads * DIM)
        _token(
            text_query + sample * text_query_batch + token * text_query_token,
            text_key + sample * text_key_batch + token * text_key_token,
            text_query_head,
            text_key_head,
            text_query_weight,
            text_key_weight,
            cos,
            sin,
            place,
            text_query_out + out,
            text_key_out + out,
            eps,
            scale,
            heads,
            HEADS,
            DIM,
            PLACES,
        )


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    *,
    weight: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    text: tuple[Tensor, Tensor] | None,
    text_weight: tuple[Tensor, Tensor] | None,
    places: Tensor | None,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The public function's arguments, checked; channels are next to each other, other strides are free."""
    batch, tokens, heads, dim = query.shape
    query, key = _by_channel(query), _by_channel(key)
    cos, sin = (table.contiguous() for table in rope)
    outs = query.new_empty(query.shape), key.new_empty(key.shape)
    text_outs: tuple[Tensor | None, Tensor | None] = (None, None)
    text_in, copies = (query, key), 0  # pointers that no program reads
    if text is not None:
        text_in = _by_channel(text[0]), _by_channel(text[1])
        text_tokens, copies = text[0].shape[1], 1 if places is None else len(places)
        shape = (batch, text_tokens, heads, dim) if places is None else (batch, copies, text_tokens, heads, dim)
        text_outs = query.new_empty(shape), query.new_empty(shape)
    else:
        text_tokens = 0
    programs = batch * (tokens + copies * text_tokens)
    launch = launches.launch("qk_norm_rope", dim, query.device)  # elements: of one load by all warps
    if programs == 0:
        return *outs, *text_outs
    watching.launched("fused.qk_norm_rope", **launch)
    with torch.cuda.device_of(query):
        qk_norm_rope_kernel[(programs,)](
            query,
            key,
            *weight,
            cos,
            sin,
            *outs,
            *text_in,
            *(text_weight or weight),
            cos if places is None else places,
            *(outs if text is None else text_outs),
            *query.stride()[:3],
            *key.stride()[:3],
            *text_in[0].stride()[:3],
            *text_in[1].stride()[:3],
            tokens,
            text_tokens,
            copies,
            eps,
            scale,
            heads=heads,
            HEADS=min(triton.next_power_of_2(heads), launch["elements"] // dim),
            DIM=dim,
            TEXT=text is not None,
            PLACES=places is not None,
            num_warps=launch["warps"],
        )
    return *outs, *text_outs


def _by_channel(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
