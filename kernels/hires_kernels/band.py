"""Neighborhood Patch Attention for a band of rows: what one of several devices computes of an image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from hires_kernels import fused, hopper
from hires_kernels.backends import Problem, choose
from hires_kernels.errors import KernelError
from hires_kernels.geometry import Grid, patches

Triple = tuple[Tensor, Tensor, Tensor]


def band_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    window: Grid,
    first: int,
    text: Triple,
    rope: tuple[Tensor, Tensor],
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`neighborhood_patch_attention` of the queries in some rows of a grid: (image, text).

    Patches begin at row `first` and are window // 2 rows high; the last is shorter where the band ends with the grid.
    The text output is the mean over the patches of the band alone.

    Args:
        query: (batch, rows · width, heads, head_dim) of the rows `first` … of the grid, rotated.
        key, value: (batch, height · width, heads, head_dim) of the whole grid, rotated.
        grid, window: (rows, columns) in tokens.
        first: row of the grid at which the band begins.
        text: (query, key, value), each (batch, text tokens, heads, head_dim), not rotated.
        rope: (cos, sin) of the grid's tokens, each (height · width, head_dim).

    Raises:
        KernelError: the shapes don't fit.
    """
    rows = query.shape[1] / grid[1]
    side = window[0] // 2
    if key.shape[1] != grid[0] * grid[1] or key.shape != value.shape:
        raise KernelError(f"{key.shape[1]} keys: a grid of {grid[0]}x{grid[1]} has {grid[0] * grid[1]}")
    if rows != int(rows) or first + rows > grid[0] or (rows % side and first + rows < grid[0]):
        raise KernelError(
            f"{rows:g} rows from row {first} of {grid[0]}: bands are whole patches of {side} rows, or end with the grid"
        )
    return _band_attention(
        query, key, value, list(text), list(rope), list(grid), list(window), first,
        query.shape[-1] ** -0.5 if scale is None else scale, backend,
    )  # fmt: skip


@custom_op("hires::band_attention", mutates_args=())
def _band_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: Sequence[Tensor],
    rope: Sequence[Tensor],
    grid: Sequence[int],
    window: Sequence[int],
    first: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = choose(backend, Problem("neighborhood_patch_attention", query.device, query.dtype, query.shape[-1]))
    width, rows = grid[1], query.shape[1] // grid[1]
    if module in (fused, hopper):  # they address queries by their place in the grid
        everywhere = torch.empty_like(key, memory_format=torch.contiguous_format)
        band = slice(first * width, (first + rows) * width)
        everywhere[:, band] = query
        image, text_rows = module.neighborhood_patch_attention(
            everywhere, key, value, grid=tuple(grid), window=tuple(window), text=tuple(text), rope=tuple(rope),
            shift=None, text_rows="patch", scale=scale, rows=(first, first + rows),
        )  # fmt: skip
        return image[:, band].contiguous(), text_rows
    images, texts = [], []
    for start in range(0, rows, window[0] // 2):
        image, text_rows = _row_of_patches(module, query, key, value, text, rope, grid, window, first, start, scale)
        images.append(image)
        texts.append(text_rows.float())
    return torch.cat(images, 1), torch.stack(texts).mean(0).to(query.dtype)


def _row_of_patches(module, query, key, value, text, rope, grid, window, first, start, scale):
    """All patches that begin at row `start` of the band: they see the same rows of keys, a grid of its own."""
    width, side = grid[1], window[0] // 2
    rows = min(side, query.shape[1] // width - start)
    low = min(max(first + start - window[0] // 4, 0), grid[0] - window[0])
    seen = slice(low * width, (low + window[0]) * width)
    padded = query.new_zeros(query.shape[0], window[0] * width, *query.shape[2:])
    padded[:, : rows * width] = query[:, start * width : (start + rows) * width]
    image, text_rows = module.neighborhood_patch_attention(
        padded, key[:, seen], value[:, seen], grid=(window[0], width), window=tuple(window), text=tuple(text),
        rope=tuple(part[seen] for part in rope), shift=None, text_rows="patch", scale=scale,
    )  # fmt: skip
    return image[:, : rows * width], text_rows


@_band_attention.register_fake
def _(query, key, value, text, *_):
    return torch.empty_like(query, memory_format=torch.contiguous_format), torch.empty_like(
        text[0], memory_format=torch.contiguous_format
    )


def seen_rows(height: int, window: int, first: int, last: int) -> tuple[int, int]:
    """(first, last + 1) row of the keys that the query rows first … last − 1 see, whole patches from row `first`."""
    windows = [patch.window for patch in patches(height, window) if first <= patch.start < last]
    return min(windows), max(windows) + window
