"""PyTorch's FlexAttention on permuted tokens: what a library can do for these operations, the baseline of the kernels.

Tokens are put into an order in which neighbours in the grid are neighbours in memory, and FlexAttention skips the
blocks of keys that no query of a block sees. The lists of blocks come from each block's extent, never from the mask
of all pairs. Text of Neighborhood Patch Attention is rotated for each patch, so it stands in the sequence once for
each. Compiled on CUDA; elsewhere FlexAttention computes all pairs, which is for tests.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hires_kernels.errors import KernelError
from hires_kernels.geometry import Grid, local_side, local_spans, patches
from hires_kernels.orders import inverse, permutation
from hires_kernels.rope import rotate

Triple = tuple[Tensor, Tensor, Tensor]


class Configuration(NamedTuple):
    """Tokens of a block of queries and of keys, and FlexAttention's `kernel_options`."""

    queries: int = 128
    keys: int = 128
    options: tuple[tuple[str, Any], ...] = ()


CONFIGURATIONS = (  # to choose the fastest of, for a comparison
    Configuration(),
    Configuration(options=(("USE_TMA", True),)),
    Configuration(256, 128, options=(("USE_TMA", True), ("BLOCK_M", 128), ("BLOCK_N", 128), ("num_warps", 8))),
    Configuration(options=(("USE_TMA", True), ("BLOCK_M", 128), ("BLOCK_N", 64), ("num_warps", 8), ("num_stages", 3))),
    Configuration(128, 64, options=(("BLOCK_M", 128), ("BLOCK_N", 64))),
)


class Queries(NamedTuple):
    """What each query sees: keys of two rectangles (4, queries), top, bottom, left, right, and those of its label."""

    near: Tensor
    low: Tensor
    label: Tensor


class Keys(NamedTuple):
    """Row, column and label of every key. Text has row -1; guidance stands below the image."""

    row: Tensor
    col: Tensor
    label: Tensor


def _extent(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of every run of `size` along the last axis; the last run may be shorter."""
    missing = -x.shape[-1] % size
    runs = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1).unflatten(-1, (-1, size))
    return runs.amin(-1), runs.amax(-1)


def _block_lists(queries: Queries, keys: Keys, configuration: Configuration) -> tuple[Tensor, Tensor]:
    """Boolean (blocks of queries, blocks of keys): some pair may be seen, and all pairs are."""
    row, col, key_label = (_extent(x, configuration.keys) for x in keys)
    label = _extent(queries.label, configuration.queries)
    some = (label[0][:, None] <= key_label[1]) & (label[1][:, None] >= key_label[0])
    every = some & (label[0] == label[1])[:, None] & (key_label[0] == key_label[1])
    for rectangles in queries[:2]:
        least, greatest = (x[:, :, None] for x in _extent(rectangles, configuration.queries))
        some |= (least[0] <= row[1]) & (greatest[1] > row[0]) & (least[2] <= col[1]) & (greatest[3] > col[0])
        every |= (greatest[0] <= row[0]) & (least[1] > row[1]) & (greatest[2] <= col[0]) & (least[3] > col[1])
    return some, every


def _block_mask(queries: Queries, keys: Keys, configuration: Configuration, device: torch.device) -> BlockMask:
    some, every = _block_lists(queries, keys, configuration)
    near, low, label = (x.to(device, torch.int32) for x in queries)
    row, col, key_label = (x.to(device, torch.int32) for x in keys)

    def seen(batch, head, query, key):
        at = row[key], col[key]
        hit = label[query] == key_label[key]
        for top, bottom, left, right in (near, low):
            down = (top[query] <= at[0]) & (at[0] < bottom[query])
            hit = hit | (down & (left[query] <= at[1]) & (at[1] < right[query]))
        return hit

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        places = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1)[None, None].to(device, torch.int32), places[None, None].to(device, torch.int32)

    return BlockMask.from_kv_blocks(
        *listed(some & ~every),
        *listed(every),
        BLOCK_SIZE=(configuration.queries, configuration.keys),
        mask_mod=seen,
        seq_lengths=(len(label), len(key_label)),
    )


@cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, configuration: Configuration
) -> Tensor:
    """FlexAttention over (batch, tokens, heads, head_dim)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type != "cuda":
        return flex_attention(query, key, value, block_mask=mask, scale=scale).transpose(1, 2)
    with torch._dynamo.config.patch(recompile_limit=256):  # one for every geometry
        options = dict(configuration.options)
        return _compiled()(query, key, value, block_mask=mask, scale=scale, kernel_options=options).transpose(1, 2)


def _places(order: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return order // width, order % width


class _Plan(NamedTuple):
    """Order of the image's tokens, its inverse, the mask, and what else an operation has to know."""

    order: Tensor
    back: Tensor
    mask: BlockMask
    extra: Tensor


@lru_cache(maxsize=64)
def _npa_plan(
    grid: Grid, window: Grid, text_tokens: int, text_rows: str, configuration: Configuration, device: torch.device
) -> _Plan:
    """`extra`: the first token of every patch's window."""
    axes = [patches(*axis) for axis in zip(grid, window)]
    windows = [torch.tensor([patch.window for patch in axis]) for axis in axes]
    sides = window[0] // 2, window[1] // 2
    order = permutation("window", grid, (max(1, window[0] // 4), max(1, window[1] // 4)))
    order = order[(order // grid[1] // sides[0] * len(axes[1]) + order % grid[1] // sides[1]).argsort(stable=True)]
    row, col = _places(order, grid[1])
    patch_row, patch_col = row // sides[0], col // sides[1]
    patch = torch.arange(len(axes[0]) * len(axes[1])).repeat_interleave(text_tokens)
    text_patch = patch if text_rows == "patch" else patch[:0]
    top = windows[0][torch.cat([patch_row, text_patch // len(axes[1])])]
    left = windows[1][torch.cat([patch_col, text_patch % len(axes[1])])]
    near = torch.stack([top, top + window[0], left, left + window[1]])
    label = torch.cat([patch_row * len(axes[1]) + patch_col, text_patch])
    outside = torch.full_like(patch, -1)
    keys = Keys(torch.cat([row, outside]), torch.cat([col, outside]), torch.cat([torch.full_like(row, -1), patch]))
    mask = _block_mask(Queries(near, torch.zeros_like(near), label), keys, configuration, device)
    corners = (windows[0][:, None] * grid[1] + windows[1]).flatten()
    return _Plan(order.to(device), inverse(order).to(device), mask, corners.to(device))


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
    configuration: Configuration = CONFIGURATIONS[0],
) -> tuple[Tensor, Tensor | None]:
    if shift is not None:
        raise KernelError("shift: backend 'flex' has one mask for all samples: allowed: no shift")
    text_tokens = 0 if text is None else text[0].shape[1]
    plan = _npa_plan(grid, window, text_tokens, text_rows, configuration, query.device)
    queries, keys, values = ([x[:, plan.order]] for x in (query, key, value))

    def copies(x: Tensor, rotated: bool) -> Tensor:
        """Text (batch, tokens, heads, head_dim) for every patch: (batch, patches · tokens, heads, head_dim)."""
        if rotated and rope is not None:
            return rotate(x[:, None], *(part[plan.extra][:, None, None] for part in rope)).flatten(1, 2)
        return x.repeat(1, len(plan.extra), 1, 1)

    if text is not None:
        keys.append(copies(text[1], rotated=True))
        values.append(copies(text[2], rotated=False))
        if text_rows == "patch":
            queries.append(copies(text[0], rotated=True))
    output = _attend(torch.cat(queries, 1), torch.cat(keys, 1), torch.cat(values, 1), plan.mask, scale, configuration)
    image = output[:, plan.back]
    if text is None:
        return image, None
    if text_rows == "patch":
        return image, output[:, len(plan.order) :].unflatten(1, (len(plan.extra), text_tokens)).mean(1)
    first = [text[i] if rope is None else rotate(text[i], *(part[0] for part in rope)) for i in (0, 1)]
    return image, _dense(first[0], torch.cat([first[1], key], 1), torch.cat([text[2], value], 1), scale)


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


@lru_cache(maxsize=64)
def _local_plan(
    grid: Grid,
    form: str,
    reach: int,
    text_tokens: int,
    guidance_grid: Grid | None,
    guidance_neighbours: str,
    order: str,
    configuration: Configuration,
    device: torch.device,
) -> _Plan:
    """`extra`: the order of the guidance tokens."""
    spans = local_spans(grid, form, reach, guidance_grid, guidance_neighbours)
    places = permutation(order, grid, _tile(configuration.queries))
    row, col = _places(places, grid[1])
    near, *low = (torch.stack([*(x[row] for x in span[0]), *(x[col] for x in span[1])]) for span in spans)
    low_places = low_row = low_col = torch.empty(0, dtype=torch.long)
    if guidance_grid is not None:
        side = local_side(form, reach)
        low_window = [max(1, side * keys // length) for keys, length in zip(guidance_grid, grid)]
        low_places = permutation(order, guidance_grid, (low_window[0], low_window[1]))
        low_row, low_col = _places(low_places, guidance_grid[1])
        low[0] = low[0] + torch.tensor([grid[0], grid[0], 0, 0])[:, None]
    text = torch.zeros(text_tokens, dtype=torch.long)
    keys = Keys(
        torch.cat([low_row + grid[0], row, text - 1]),
        torch.cat([low_col, col, text - 1]),
        torch.cat([torch.full_like(low_row, -1), torch.full_like(row, -1), text]),
    )
    queries = Queries(near, low[0] if low else torch.zeros_like(near), torch.zeros_like(row))
    mask = _block_mask(queries, keys, configuration, device)
    return _Plan(places.to(device), inverse(places).to(device), mask, low_places.to(device))


def _tile(tokens: int) -> Grid:
    """The squarest tile of a power of two tokens."""
    rows = 1 << (tokens.bit_length() - 1) // 2
    return rows, tokens // rows


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
    configuration: Configuration = CONFIGURATIONS[0],
) -> tuple[Tensor, Tensor | None]:
    text_tokens = 0 if text is None else text[0].shape[1]
    plan = _local_plan(
        grid, form, reach, text_tokens, guidance_grid, guidance_neighbours, order, configuration, query.device
    )
    parts = [(key[:, plan.order], value[:, plan.order])]
    if guidance is not None:
        parts.insert(0, (guidance[0][:, plan.extra], guidance[1][:, plan.extra]))
    if text is not None:
        parts.append((text[1], text[2]))
    keys, values = (torch.cat(part, 1) for part in zip(*parts))
    image = _attend(query[:, plan.order], keys, values, plan.mask, scale, configuration)[:, plan.back]
    if text is None:
        return image, None
    first = len(plan.extra)  # few queries with all keys: a dense kernel does them better
    return image, _dense(text[0], keys[:, first:], values[:, first:], scale)
