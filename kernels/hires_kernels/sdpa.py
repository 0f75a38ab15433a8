"""Gathered windows and PyTorch's scaled_dot_product_attention: the CPU's fast path.

Queries are cut into tiles of one size. All queries of a tile share one block of keys, gathered once; where they
don't see the same part of it, a mask of the tile says so. Ragged tiles at the border are filled up with
repeated queries, whose outputs are dropped.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hires_kernels.geometry import Grid, Intervals, local_spans, patches
from hires_kernels.orders import inverse, permutation
from hires_kernels.reference import add_bias as add_bias  # nothing to gather, here and in the next two
from hires_kernels.reference import group_norm as group_norm
from hires_kernels.reference import qk_norm_rope as qk_norm_rope
from hires_kernels.rope import rotate

Triple = tuple[Tensor, Tensor, Tensor]
MASK_ELEMENTS = 2**24  # masks are built for as many tiles at a time as fit into this many elements


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """SDPA over (batch, tokens, heads, head_dim); mask (batch, queries, keys)."""
    mask = mask if mask is None else mask[:, None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def _tokens(row: Tensor, col: Tensor, width: int, device: torch.device) -> Tensor:
    """Token indices of tiles, given their rows (tiles, m) and columns (tiles, n): (tiles, m · n)."""
    return (row.to(device)[:, :, None] * width + col.to(device)[:, None, :]).flatten(1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x (batch, tokens, …) at index (tiles, n): (batch · tiles, n, …)."""
    return x.index_select(1, index.flatten()).unflatten(1, index.shape).flatten(0, 1)


def _kept(plan: Callable[..., Any]) -> Callable[..., Any]:
    """A plan's lists of tokens stay on their device: made on the host in each call, they make a GPU wait for it."""

    @lru_cache(maxsize=4)
    def made(*geometry: Any) -> Any:
        with torch.inference_mode(False):  # or no gradient could go through them later
            return plan(*geometry)

    def call(*geometry: Any) -> Any:
        return plan(*geometry) if torch.compiler.is_compiling() else made(*geometry)

    return call


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
    options = {
        "grid": grid,
        "window": window,
        "rope": rope,
        "text_rows": text_rows,
        "scale": scale,
        "patch": patch or (None, None),
    }
    if shift is None:
        return _npa(query, key, value, text=text, offsets=(None, None), **options)
    outputs = [
        _npa(
            *(x[sample, None] for x in (query, key, value)),
            text=None if text is None else tuple(x[sample, None] for x in text),
            offsets=tuple(offsets),
            **options,
        )
        for sample, offsets in enumerate(shift.tolist())
    ]
    images, texts = zip(*outputs)
    return torch.cat(images), None if text is None else torch.cat(texts)


class _NpaAxis(NamedTuple):
    """Patches of one axis: token indices (patches, side), window starts (patches,), place of the first token."""

    queries: Tensor
    windows: Tensor
    first: int


def _npa_axis(length: int, window: int, offset: int | None, side: int | None) -> _NpaAxis:
    if window == length:  # every patch has this window: one patch does
        return _NpaAxis(torch.arange(length)[None], torch.zeros(1, dtype=torch.long), first=0)
    windows = torch.tensor([patch.window for patch in patches(length, window, offset, side)])
    side = side or window // 2
    offset = offset or 0
    queries = (torch.arange(len(windows) * side) - offset).clamp(0, length - 1).view(-1, side)
    return _NpaAxis(queries, windows, first=offset)


class _NpaPlan(NamedTuple):
    """All tiles: token indices of their queries and keys (tiles, n), and of their windows' first tokens (tiles,).

    tiles: along each axis; sides: of a tile; first: row and column of the grid's first token in the tiles' canvas.
    """

    queries: Tensor
    keys: Tensor
    corners: Tensor
    tiles: Grid
    sides: Grid
    first: Grid


def _npa_plan(grid: Grid, window: Grid, offsets: Any, patch: Any, device: torch.device) -> _NpaPlan:
    rows, cols = (_npa_axis(*axis) for axis in zip(grid, window, offsets, patch))
    tiles = len(rows.windows), len(cols.windows)
    row, col = (x.flatten() for x in torch.meshgrid(*map(torch.arange, tiles), indexing="ij"))
    seen = [axis.windows[:, None] + torch.arange(side) for axis, side in zip((rows, cols), window)]
    return _NpaPlan(
        _tokens(rows.queries[row], cols.queries[col], grid[1], device),
        _tokens(seen[0][row], seen[1][col], grid[1], device),
        (rows.windows[:, None] * grid[1] + cols.windows).flatten().to(device),
        tiles,
        (rows.queries.shape[1], cols.queries.shape[1]),
        (rows.first, cols.first),
    )


_kept_npa_plan = _kept(_npa_plan)


def _npa(query, key, value, *, grid, window, text, rope, offsets, text_rows, scale, patch):
    planned = _kept_npa_plan if offsets == (None, None) else _npa_plan  # shifts are drawn anew
    plan = planned(grid, window, offsets, patch, query.device)
    batch, corners = len(query), plan.corners
    queries = _gather(query, plan.queries)
    keys, values = _gather(key, plan.keys), _gather(value, plan.keys)
    if text is not None:

        def per_tile(x: Tensor, rotated: bool) -> Tensor:
            """Text (batch, tokens, heads, head_dim) for each tile, at the place of its window's first token."""
            if rotated and rope is not None:
                x = rotate(x[:, None], *(part[corners][:, None, None] for part in rope))
            else:
                x = x[:, None].expand(-1, len(corners), -1, -1, -1)
            return x.flatten(0, 1)

        keys = torch.cat([per_tile(text[1], rotated=True), keys], dim=1)
        values = torch.cat([per_tile(text[2], rotated=False), values], dim=1)
        if text_rows == "patch":
            queries = torch.cat([per_tile(text[0], rotated=True), queries], dim=1)
    output = _attend(queries, keys, values, scale)

    text_output = None
    if text is not None and text_rows == "patch":
        text_output, output = output.split([text[0].shape[1], output.shape[1] - text[0].shape[1]], dim=1)
        text_output = text_output.unflatten(0, (batch, -1)).mean(1)
    elif text is not None:
        first = [text[i] if rope is None else rotate(text[i], *(part[0] for part in rope)) for i in (0, 1)]
        text_output = _attend(first[0], torch.cat([first[1], key], 1), torch.cat([text[2], value], 1), scale)

    tiled = output.unflatten(0, (batch, *plan.tiles)).unflatten(3, plan.sides)
    canvas, (top, left) = tiled.transpose(2, 3).flatten(3, 4).flatten(1, 2), plan.first
    image = canvas[:, top : top + grid[0], left : left + grid[1]]
    return image.flatten(1, 2), text_output


class _LocalAxis(NamedTuple):
    """Tiles of one axis: queries (tiles, side); for each grid of keys, keys (tiles, m) and mask (tiles, side, m)."""

    queries: Tensor
    keys: list[Tensor]
    masks: list[Tensor]


def _local_axis(length: int, side: int, spans: list[Intervals], key_lengths: list[int]) -> _LocalAxis:
    queries = torch.arange(-(-length // side) * side).clamp(max=length - 1).view(-1, side)
    keys, masks = [], []
    for (low, high), key_length in zip(spans, key_lengths):
        first, last = low[queries].amin(1), high[queries].amax(1)
        index = first[:, None] + torch.arange(int((last - first).max()))
        masks.append((low[queries][..., None] <= index[:, None]) & (index[:, None] < high[queries][..., None]))
        keys.append(index.clamp(max=key_length - 1))
    return _LocalAxis(queries, keys, masks)


class _LocalPart(NamedTuple):
    """Some tiles: token indices of their queries (tiles, n); for each grid of keys those of the keys, and its masks.

    The masks of rows and columns, (tiles, side, m) each, are None where every query of a tile sees all of its keys.
    """

    queries: Tensor
    keys: list[Tensor]
    masks: list[tuple[Tensor, Tensor]] | None


class _LocalPlan(NamedTuple):
    """Parts whose masks fit into memory, and the place of every token in their outputs."""

    parts: list[_LocalPart]
    places: Tensor


def _local_plan(
    grid: Grid, form: str, reach: int, guidance_grid: Grid | None, neighbours: str, order: str, device: torch.device
) -> _LocalPlan:
    grids = [grid] if guidance_grid is None else [grid, guidance_grid]
    spans = local_spans(grid, form, reach, guidance_grid, neighbours)
    axes = []
    for axis, length in enumerate(grid):
        covered = form == "radius" and reach >= length - 1
        side = length if covered else min(length, reach if form == "window" else max(reach, 4))
        axes.append(_local_axis(length, side, [s[axis] for s in spans], [source[axis] for source in grids]))
    rows, cols = axes
    tiles = len(rows.queries), len(cols.queries)
    sides = rows.queries.shape[1], cols.queries.shape[1]
    visits = permutation(order, tiles)

    masked = not all(mask.all() for axis in axes for mask in axis.masks)
    key_count = sum(r.shape[1] * c.shape[1] for r, c in zip(rows.keys, cols.keys))
    at_once = max(1, MASK_ELEMENTS // (sides[0] * sides[1] * key_count)) if masked else len(visits)
    parts = []
    for part in visits.split(at_once):
        row, col = part // tiles[1], part % tiles[1]
        keys = [_tokens(r[row], c[col], width, device) for r, c, (_, width) in zip(rows.keys, cols.keys, grids)]
        masks = [(r[row].to(device), c[col].to(device)) for r, c in zip(rows.masks, cols.masks)]
        queries = _tokens(rows.queries[row], cols.queries[col], grid[1], device)
        parts.append(_LocalPart(queries, keys, masks if masked else None))

    row, col = torch.arange(grid[0])[:, None], torch.arange(grid[1])[None]
    tile = inverse(visits)[row // sides[0] * tiles[1] + col // sides[1]]
    places = (tile * sides[0] + row % sides[0]) * sides[1] + col % sides[1]
    return _LocalPlan(parts, places.flatten().to(device))


_kept_local_plan = _kept(_local_plan)


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
    batch = len(query)
    sources = [(key, value)]
    if guidance is not None and guidance_grid is not None:
        sources.append(guidance)
    among = guidance_grid if guidance is not None else None
    plan = _kept_local_plan(grid, form, reach, among, guidance_neighbours, order, query.device)

    outputs = []
    for part in plan.parts:
        keys = [_gather(source[0], seen) for source, seen in zip(sources, part.keys)]
        values = [_gather(source[1], seen) for source, seen in zip(sources, part.keys)]
        tiles, queries = part.queries.shape
        if text is not None:
            keys.append(text[1].repeat_interleave(tiles, dim=0))
            values.append(text[2].repeat_interleave(tiles, dim=0))
        mask = None
        if part.masks is not None:
            masks = [
                (down[:, :, None, :, None] & across[:, None, :, None, :]).flatten(3).flatten(1, 2)
                for down, across in part.masks
            ]
            if text is not None:
                masks.append(masks[0].new_ones(tiles, queries, text[1].shape[1]))
            mask = torch.cat(masks, dim=2).repeat(batch, 1, 1)
        output = _attend(_gather(query, part.queries), torch.cat(keys, 1), torch.cat(values, 1), scale, mask)
        outputs.append(output.unflatten(0, (batch, -1)))

    image = torch.cat(outputs, 1).flatten(1, 2).index_select(1, plan.places)
    if text is None:
        return image, None
    text_keys, text_values = torch.cat([text[1], key], 1), torch.cat([text[2], value], 1)
    return image, _attend(text[0], text_keys, text_values, scale)
