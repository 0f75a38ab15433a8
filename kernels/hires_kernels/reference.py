"""The definition of every operation in plain PyTorch: any device, any dtype, no thought of speed."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import rms_norm

from hires_kernels.geometry import Grid, Spans, local_side, local_spans, patches
from hires_kernels.orders import inverse, permutation
from hires_kernels.rope import rotate

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v over tensors (…, tokens, heads, head_dim); `mask` (queries, keys) is true to keep."""
    scores = torch.einsum("...qhd,...khd->...hqk", query, key) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(dim=-1), value)


def neighborhood_patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    window: Grid,
    text: Triple | None,
    rope: tuple[Tensor, Tensor] | None,
    shift: Tensor | None,
    text_rows: str,
    scale: float,
    patch: Grid | None = None,
) -> tuple[Tensor, Tensor | None]:
    images, texts = [], []
    for sample in range(len(query)):
        image, text_mean = _npa_sample(
            *(x[sample].unflatten(0, grid) for x in (query, key, value)),
            grid=grid,
            window=window,
            text=None if text is None else (text[0][sample], text[1][sample], text[2][sample]),
            rope=rope,
            offsets=(None, None) if shift is None else (int(shift[sample, 0]), int(shift[sample, 1])),
            text_rows=text_rows,
            scale=scale,
            sides=patch or (None, None),
        )
        images.append(image.flatten(0, 1))
        texts.append(text_mean)
    return torch.stack(images), None if text is None else torch.stack(texts)


def _npa_sample(query, key, value, *, grid, window, text, rope, offsets, text_rows, scale, sides):
    """One sample: image tensors (height, width, heads, head_dim), text tensors (text tokens, heads, head_dim)."""
    if text is None:
        text = tuple(x.new_empty(0, *x.shape[2:]) for x in (query, key, value))
    text_query, text_key, text_value = text

    def rotated(x: Tensor, row: int, col: int) -> Tensor:
        """Text has no place of its own: it takes the one of an image token."""
        if rope is None:
            return x
        return rotate(x, rope[0][row * grid[1] + col], rope[1][row * grid[1] + col])

    rows, text_outputs = [], []
    for top, bottom, window_row in patches(grid[0], window[0], offsets[0], sides[0]):
        cols = []
        for left, right, window_col in patches(grid[1], window[1], offsets[1], sides[1]):
            seen = slice(window_row, window_row + window[0]), slice(window_col, window_col + window[1])
            keys = torch.cat([rotated(text_key, window_row, window_col), key[seen].flatten(0, 1)])
            values = torch.cat([text_value, value[seen].flatten(0, 1)])
            patch = query[top:bottom, left:right]
            cols.append(attention(patch.flatten(0, 1), keys, values, scale).unflatten(0, patch.shape[:2]))
            if text_rows == "patch":
                text_outputs.append(attention(rotated(text_query, window_row, window_col), keys, values, scale))
        rows.append(torch.cat(cols, dim=1))
    if text_rows == "global":
        keys = torch.cat([rotated(text_key, 0, 0), key.flatten(0, 1)])
        values = torch.cat([text_value, value.flatten(0, 1)])
        text_outputs.append(attention(rotated(text_query, 0, 0), keys, values, scale))
    return torch.cat(rows), torch.stack(text_outputs).mean(0)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    form: str,
    reach: int,
    text: Triple | None,
    guidance: tuple[Tensor, Tensor] | None,
    guidance_grid: Grid | None,
    guidance_neighbours: str,
    order: str,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    spans = local_spans(grid, form, reach, guidance_grid, guidance_neighbours)
    side = local_side(form, reach)
    places = permutation(order, grid, (side, side)).to(query.device)
    keys, values = [key[:, places]], [value[:, places]]
    masks = [_mask(spans[0], grid).to(query.device)[places][:, places]]
    if guidance is not None and guidance_grid is not None:
        keys.append(guidance[0])
        values.append(guidance[1])
        masks.append(_mask(spans[1], guidance_grid).to(query.device)[places])
    if text is not None:
        keys.append(text[1])
        values.append(text[2])
        masks.append(masks[0].new_ones(len(places), text[1].shape[1]))
    image = attention(query[:, places], torch.cat(keys, 1), torch.cat(values, 1), scale, torch.cat(masks, 1))
    image = image[:, inverse(places)]
    if text is None:
        return image, None
    text_keys, text_values = torch.cat([text[1], key], 1), torch.cat([text[2], value], 1)
    return image, attention(text[0], text_keys, text_values, scale)


def _mask(spans: Spans, grid: Grid) -> Tensor:
    """Boolean (queries, keys) of a grid of keys, both in raster order."""
    rows, cols = (span.mask(length) for span, length in zip(spans, grid))
    return (rows[:, None, :, None] & cols[None, :, None, :]).flatten(2).flatten(0, 1)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    *,
    text: Pair | None,
    weight: Pair,
    text_weight: Pair | None,
    rope: Pair,
    places: Tensor | None,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    factors = scale, 1.0

    def normalised(pair: Pair, weights: Pair) -> list[Tensor]:
        return [rms_norm(x, x.shape[-1:], w, eps) for x, w in zip(pair, weights)]

    def rotated(pair: list[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
        return [rotate(x, cos * factor, sin * factor) for x, factor in zip(pair, factors)]

    image = rotated(normalised((query, key), weight), *(part[:, None] for part in rope))
    if text is None:
        return image[0], image[1], None, None
    texts = normalised(text, weight if text_weight is None else text_weight)
    if places is None:
        texts[0] = texts[0] * scale
    else:
        texts = rotated([x[:, None] for x in texts], *(part[places][:, None, None] for part in rope))
    return image[0], image[1], texts[0], texts[1]


def group_norm(
    x: Tensor, *, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    y = functional.group_norm(x if shift is None else x + shift[:, None, None], groups, weight, bias, eps)
    return (functional.silu(y) if silu else y).contiguous(memory_format=torch.channels_last)


def add_bias(x: Tensor, y: Tensor, *, bias: Tensor) -> Tensor:
    return (x + y + bias[:, None, None]).contiguous(memory_format=torch.channels_last)
