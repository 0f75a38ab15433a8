"""Local attention (Scale-DiT, arXiv 2510.16325, section 3.2) as Triton kernels, forward and backward.

A program owns a tile of queries of the row-major grid and walks over the tiles of keys that the union of its
queries' boxes touches, then over the guidance keys of the same place and over the text keys, in one software
pipeline: a step only chooses which tensor descriptor to load from. A pair of query and key counts when the key's row
and column lie in the query's intervals; the kernels compute these from the place (`_seen`), so that there is neither a
mask nor a list of blocks in memory. Text rows are the same kernel on a grid of one row, in which everybody sees
everybody, with the keys split over programs.

    s = q kᵀ · scale,  p = exp2(s · log2 e − lse),  o = p v                         forward
    dp = do vᵀ,  ds = p (dp − Σ o do),  dq = ds k · scale,  dk = dsᵀ q · scale,  dv = pᵀ do     backward

The backward pass needs no atomics, and so gives the same bits every time: one kernel owns queries (dq), one owns keys
(dk, dv) and walks over the queries that see them (`_seeing`).

Tiles are chosen by counting the keys that are loaded (`tiles`). FLUX 4096², radius 8, 64 queries and 64 keys: query
tiles of 8×8 load 24×24 keys in 9 steps for the 289 that each query needs, guidance keys in 1 or 2 steps for 48 and 512
text keys in 8: 1,184 a query with the borders, .95 TFLOP a layer where .67 are needed, .42 more for text rows.
"""

from functools import cache, lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from hires_kernels import geometry, launches, watching
from hires_kernels.errors import KernelError
from hires_kernels.geometry import Grid, Intervals
from hires_kernels.orders import permutation

Triple = tuple[Tensor, Tensor, Tensor]
LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS = 1056  # wanted where programs share all keys, or all queries: eight waves of an H200


@triton.jit
def _seen(place, length, key_length, reach, neighbours, FORM: tl.constexpr):
    """First and past-the-last key that the query at `place` of an axis sees (geometry.local_spans)."""
    if FORM == "radius":
        low = place - reach
        high = place + reach + 1
    elif FORM == "window":
        low = place // reach * reach
        high = low + reach
    elif FORM == "guidance":
        own = place * key_length // length // reach
        low = (own - neighbours) * reach
        high = (own + neighbours + 1) * reach
    else:
        low = place * 0
        high = low + key_length
    return tl.maximum(low, 0), tl.minimum(high, key_length)


@triton.jit
def _seeing(first, last, length, key_length, reach, neighbours, FORM: tl.constexpr):
    """First and past-the-last query of an axis that sees one of the keys first … last."""
    if FORM == "radius":
        low = first - reach
        high = last + reach + 1
    elif FORM == "window":
        low = first // reach * reach
        high = last // reach * reach + reach
    elif FORM == "guidance":
        low = tl.cdiv(tl.maximum(first // reach - neighbours, 0) * reach * length, key_length)
        high = tl.cdiv((last // reach + neighbours + 1) * reach * length, key_length)
    else:
        low = first * 0
        high = low + length
    return tl.maximum(low, 0), tl.minimum(high, length)


@triton.jit
def _steps(top, bottom, left, right, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Steps in all, and steps across, of tiles over the rectangle top:bottom x left:right; and its corner."""
    across = tl.cdiv(right - left, COLS)
    return tl.cdiv(bottom - top, ROWS) * across, across, top, left


@triton.jit
def _touched(row, col, grid, key_grid, reach, neighbours, FORM: tl.constexpr, QUERY_ROWS, QUERY_COLS, ROWS, COLS):
    """`_steps` over the keys that the queries of the tile at (row, col) see."""
    top, _ = _seen(row, grid[0], key_grid[0], reach[0], neighbours[0], FORM)
    left, _ = _seen(col, grid[1], key_grid[1], reach[1], neighbours[1], FORM)
    last_row = tl.minimum(row + QUERY_ROWS, grid[0]) - 1
    last_col = tl.minimum(col + QUERY_COLS, grid[1]) - 1
    _, bottom = _seen(last_row, grid[0], key_grid[0], reach[0], neighbours[0], FORM)
    _, right = _seen(last_col, grid[1], key_grid[1], reach[1], neighbours[1], FORM)
    return _steps(top, bottom, left, right, ROWS, COLS)


@triton.jit
def _intervals(rows, cols, grid, key_grid, reach, neighbours, FORM: tl.constexpr):
    """What the queries at (rows, cols) see: first key row and number of key rows, the same for columns."""
    top, bottom = _seen(rows, grid[0], key_grid[0], reach[0], neighbours[0], FORM)
    left, right = _seen(cols, grid[1], key_grid[1], reach[1], neighbours[1], FORM)
    return top, bottom - top, left, right - left


@triton.jit
def _walk(step, near, low, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Source of a step (0 image, 1 guidance, 2 text), and the row and column where its tile begins."""
    if step < near[0]:
        source = 0
        row = near[2] + step // near[1] * ROWS
        col = near[3] + step % near[1] * COLS
    elif step < near[0] + low[0]:
        source = 1
        row = low[2] + (step - near[0]) // low[1] * ROWS
        col = low[3] + (step - near[0]) % low[1] * COLS
    else:
        source = 2
        row = (step - near[0] - low[0]) * ROWS
        col = 0
    return source, row, col


@triton.jit
def _ragged(source, row, col, key_grid, text_tokens, FORM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Whether some query doesn't see some key of the tile: it takes a mask."""
    if source == 2:
        ragged = (row + ROWS) * COLS > text_tokens
    else:
        ragged = (FORM != "all") | (row + ROWS > key_grid[0]) | (col + COLS > key_grid[1])
    return ragged


@triton.jit
def _sees(source, row, col, near, low, text_tokens, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Boolean (queries, keys). Text is a row of its own, cut into runs of COLS."""
    key = tl.arange(0, ROWS * COLS)
    key_row = tl.where(source == 2, 0, row + key // COLS)
    key_col = tl.where(source == 2, row * COLS + key, col + key % COLS)
    top = tl.where(source == 2, 0, tl.where(source == 1, low[0], near[0]))
    rows = tl.where(source == 2, 1, tl.where(source == 1, low[1], near[1]))
    left = tl.where(source == 2, 0, tl.where(source == 1, low[2], near[2]))
    cols = tl.where(source == 2, text_tokens, tl.where(source == 1, low[3], near[3]))
    return _inside(key_row[None, :], top[:, None], rows[:, None]) & _inside(
        key_col[None, :], left[:, None], cols[:, None]
    )


@triton.jit
def _inside(place, first, count):
    """first <= place < first + count, in one comparison: a negative difference is a large unsigned number."""
    return (place - first).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def _place(tile, grid, ROWS: tl.constexpr, COLS: tl.constexpr):
    """First row and column of a tile, and of each of its tokens row, column, raster index and whether it exists."""
    across = tl.cdiv(grid[1], COLS)
    row = tile // across * ROWS
    col = tile % across * COLS
    rows = row + tl.arange(0, ROWS * COLS) // COLS
    cols = col + tl.arange(0, ROWS * COLS) % COLS
    return row, col, rows, cols, rows * grid[1] + cols, (rows < grid[0]) & (cols < grid[1])


@triton.jit
def _forward(
    query, near_key, near_value, low_key, low_value, text_key, text_value, output, lse, order,
    heads, grid, key_grid, reach, low_grid, low_reach, low_neighbours, text_tokens, steps, scale,
    FORM: tl.constexpr, GUIDANCE: tl.constexpr, QUERY_ROWS: tl.constexpr, QUERY_COLS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`scale` includes log2 e. Split z serves the steps from z · steps on and writes its own output and `lse`."""
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    split = tl.program_id(2)
    tile = tl.load(order + tl.program_id(0))
    row, col, rows, cols, token, exists = _place(tile, grid, QUERY_ROWS, QUERY_COLS)

    near = _touched(row, col, grid, key_grid, reach, (0, 0), FORM, QUERY_ROWS, QUERY_COLS, ROWS, COLS)
    near_seen = _intervals(rows, cols, grid, key_grid, reach, (0, 0), FORM)
    if GUIDANCE:
        low = _touched(
            row, col, grid, low_grid, low_reach, low_neighbours, "guidance", QUERY_ROWS, QUERY_COLS, ROWS, COLS
        )
        low_seen = _intervals(rows, cols, grid, low_grid, low_reach, low_neighbours, "guidance")
    else:
        low = (0, 1, 0, 0)
        low_seen = near_seen
    first = split * steps
    last = tl.minimum(first + steps, near[0] + low[0] + tl.cdiv(text_tokens, ROWS * COLS))

    queries = query.load([batch, head, row, col, 0]).reshape(QUERY_ROWS * QUERY_COLS, DIM)
    top = tl.full([QUERY_ROWS * QUERY_COLS], -1e30, tl.float32)
    total = tl.zeros([QUERY_ROWS * QUERY_COLS], tl.float32)
    result = tl.zeros([QUERY_ROWS * QUERY_COLS, DIM], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        source, key_row, key_col = _walk(step, near, low, ROWS, COLS)
        key = near_key
        value = near_value
        if source == 1:
            key = low_key
            value = low_value
        elif source == 2:
            key = text_key
            value = text_value
        keys = key.load([batch, head, key_row, key_col, 0]).reshape(ROWS * COLS, DIM)
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)
        if _ragged(source, key_row, key_col, key_grid, text_tokens, FORM, ROWS, COLS):
            seen = _sees(source, key_row, key_col, near_seen, low_seen, text_tokens, ROWS, COLS)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        values = value.load([batch, head, key_row, key_col, 0]).reshape(ROWS * COLS, DIM)
        result = tl.dot(weights.to(values.dtype), values, result * shrink[:, None], input_precision=PRECISION)
        top = higher

    tokens = grid[0] * grid[1]
    part = (split * tl.num_programs(1) // heads + batch).to(tl.int64)
    tl.store(lse + (part * heads + head) * tokens + token, top + tl.log2(total), exists)
    places = output + ((part * tokens + token) * heads + head)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(places, (result / total[:, None]).to(output.dtype.element_ty), exists[:, None])


@triton.jit
def _combine(parts, part_lse, output, lse, tokens, heads, splits, TOKENS: tl.constexpr, DIM: tl.constexpr):
    """Splits of the keys into one: outputs weighted by their sums of exponentials."""
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = token < tokens
    top = tl.full([TOKENS], -1e30, tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    result = tl.zeros([TOKENS, DIM], tl.float32)
    for split in range(splits):
        part = (split * tl.num_programs(1) // heads + batch).to(tl.int64)
        one = tl.load(part_lse + (part * heads + head) * tokens + token, exists, 0.0)
        places = ((part * tokens + token) * heads + head)[:, None] * DIM + tl.arange(0, DIM)[None, :]
        higher = tl.maximum(top, one)
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(one - higher)
        total = total * shrink + weight
        result = result * shrink[:, None] + weight[:, None] * tl.load(parts + places, exists[:, None], 0.0)
        top = higher
    tl.store(lse + tl.program_id(1).to(tl.int64) * tokens + token, top + tl.log2(total), exists)
    places = ((batch.to(tl.int64) * tokens + token) * heads + head)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(output + places, (result / total[:, None]).to(output.dtype.element_ty), exists[:, None])


@triton.jit
def _query_gradient(
    query, output, grad, near_key, near_value, low_key, low_value, text_key, text_value, lse, delta, grad_query, order,
    heads, grid, key_grid, reach, low_grid, low_reach, low_neighbours, text_tokens, steps, scale,
    FORM: tl.constexpr, GUIDANCE: tl.constexpr, QUERY_ROWS: tl.constexpr, QUERY_COLS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks like `_forward`. Writes delta = Σ o do, and the part of dq that each split's keys give."""
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    split = tl.program_id(2)
    tile = tl.load(order + tl.program_id(0))
    row, col, rows, cols, token, exists = _place(tile, grid, QUERY_ROWS, QUERY_COLS)

    near = _touched(row, col, grid, key_grid, reach, (0, 0), FORM, QUERY_ROWS, QUERY_COLS, ROWS, COLS)
    near_seen = _intervals(rows, cols, grid, key_grid, reach, (0, 0), FORM)
    if GUIDANCE:
        low = _touched(
            row, col, grid, low_grid, low_reach, low_neighbours, "guidance", QUERY_ROWS, QUERY_COLS, ROWS, COLS
        )
        low_seen = _intervals(rows, cols, grid, low_grid, low_reach, low_neighbours, "guidance")
    else:
        low = (0, 1, 0, 0)
        low_seen = near_seen
    first = split * steps
    last = tl.minimum(first + steps, near[0] + low[0] + tl.cdiv(text_tokens, ROWS * COLS))

    tokens = grid[0] * grid[1]
    sums = tl.program_id(1).to(tl.int64) * tokens + token
    queries = query.load([batch, head, row, col, 0]).reshape(QUERY_ROWS * QUERY_COLS, DIM)
    grads = grad.load([batch, head, row, col, 0]).reshape(QUERY_ROWS * QUERY_COLS, DIM)
    outputs = output.load([batch, head, row, col, 0]).reshape(QUERY_ROWS * QUERY_COLS, DIM)
    mean = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    if split == 0:
        tl.store(delta + sums, mean, exists)
    level = tl.load(lse + sums, exists, float("inf"))
    result = tl.zeros([QUERY_ROWS * QUERY_COLS, DIM], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        source, key_row, key_col = _walk(step, near, low, ROWS, COLS)
        key = near_key
        value = near_value
        if source == 1:
            key = low_key
            value = low_value
        elif source == 2:
            key = text_key
            value = text_value
        keys = key.load([batch, head, key_row, key_col, 0]).reshape(ROWS * COLS, DIM)
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)
        weights = tl.exp2(scores * scale - level[:, None])
        if _ragged(source, key_row, key_col, key_grid, text_tokens, FORM, ROWS, COLS):
            seen = _sees(source, key_row, key_col, near_seen, low_seen, text_tokens, ROWS, COLS)
            weights = tl.where(seen, weights, 0.0)
        values = value.load([batch, head, key_row, key_col, 0]).reshape(ROWS * COLS, DIM)
        changes = weights * (tl.dot(grads, values.T, input_precision=PRECISION) - mean[:, None])
        result = tl.dot(changes.to(keys.dtype), keys, result, input_precision=PRECISION)

    part = (split * tl.num_programs(1) // heads + batch).to(tl.int64)
    places = grad_query + ((part * tokens + token) * heads + head)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(places, (result * (scale / LOG2_E)).to(grad_query.dtype.element_ty), exists[:, None])


@triton.jit
def _key_and_value_gradient(
    query, grad, text_query, text_grad, key, value, lse, delta, text_lse, text_delta, grad_key, grad_value,
    heads, grid, key_grid, reach, neighbours, text_tokens, steps, scale,
    FORM: tl.constexpr, QUERY_ROWS: tl.constexpr, QUERY_COLS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys walk over the image queries that see them, then over the text queries. Scores are (keys, queries)."""
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    split = tl.program_id(2)
    row, col, rows, cols, token, exists = _place(tl.program_id(0), key_grid, ROWS, COLS)
    last_row = tl.minimum(row + ROWS, key_grid[0]) - 1
    last_col = tl.minimum(col + COLS, key_grid[1]) - 1
    top, bottom = _seeing(row, last_row, grid[0], key_grid[0], reach[0], neighbours[0], FORM)
    left, right = _seeing(col, last_col, grid[1], key_grid[1], reach[1], neighbours[1], FORM)
    near = _steps(top, bottom, left, right, QUERY_ROWS, QUERY_COLS)
    first = split * steps
    last = tl.minimum(first + steps, near[0] + tl.cdiv(text_tokens, QUERY_ROWS * QUERY_COLS))

    sums = tl.program_id(1).to(tl.int64) * (grid[0] * grid[1])
    text_sums = tl.program_id(1).to(tl.int64) * text_tokens
    place = tl.arange(0, QUERY_ROWS * QUERY_COLS)
    keys = key.load([batch, head, row, col, 0]).reshape(ROWS * COLS, DIM)
    values = value.load([batch, head, row, col, 0]).reshape(ROWS * COLS, DIM)
    result_key = tl.zeros([ROWS * COLS, DIM], tl.float32)
    result_value = tl.zeros([ROWS * COLS, DIM], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        source, query_row, query_col = _walk(step, near, (0, 1, 0, 0), QUERY_ROWS, QUERY_COLS)
        query_rows = query_row + place // QUERY_COLS
        query_cols = query_col + place % QUERY_COLS
        if source == 0:
            query_now = query
            grad_now = grad
            there = query_rows * grid[1] + query_cols
            known = (query_rows < grid[0]) & (query_cols < grid[1])
            lse_now = lse + sums
            delta_now = delta + sums
        else:
            query_now = text_query
            grad_now = text_grad
            there = query_row * QUERY_COLS + place
            known = there < text_tokens
            lse_now = text_lse + text_sums
            delta_now = text_delta + text_sums
        queries = query_now.load([batch, head, query_row, query_col, 0]).reshape(QUERY_ROWS * QUERY_COLS, DIM)
        scores = tl.dot(keys, queries.T, input_precision=PRECISION)
        weights = tl.exp2(scores * scale - tl.load(lse_now + there, known, float("inf"))[None, :])
        if (FORM != "all") & (source == 0):
            seen = _intervals(query_rows, query_cols, grid, key_grid, reach, neighbours, FORM)
            in_rows = _inside(rows[:, None], seen[0][None, :], seen[1][None, :])
            in_cols = _inside(cols[:, None], seen[2][None, :], seen[3][None, :])
            weights = tl.where(in_rows & in_cols, weights, 0.0)
        grads = grad_now.load([batch, head, query_row, query_col, 0]).reshape(QUERY_ROWS * QUERY_COLS, DIM)
        result_value = tl.dot(weights.to(grads.dtype), grads, result_value, input_precision=PRECISION)
        changes = tl.dot(values, grads.T, input_precision=PRECISION)
        changes = weights * (changes - tl.load(delta_now + there, known, 0.0)[None, :])
        result_key = tl.dot(changes.to(queries.dtype), queries, result_key, input_precision=PRECISION)

    part = (split * tl.num_programs(1) // heads + batch).to(tl.int64)
    places = ((part * (key_grid[0] * key_grid[1]) + token) * heads + head)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    result_key *= scale / LOG2_E
    tl.store(grad_key + places, result_key.to(grad_key.dtype.element_ty), exists[:, None])
    tl.store(grad_value + places, result_value.to(grad_value.dtype.element_ty), exists[:, None])


class Config(NamedTuple):
    """Queries and keys of a tile, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def config(kernel: str, query: Tensor) -> Config:
    """The launch of a kernel for a tensor's device and head dim. float32 is for the interpreter."""
    if query.dtype == torch.float32:
        return Config(32, 32, 4, 1)
    return Config(**launches.launch(kernel, query.shape[-1], query.device))


class View(NamedTuple):
    """How the queries of one grid see the keys of another."""

    grid: Grid
    key_grid: Grid
    form: str  # "radius" | "window" | "guidance" | "all"
    reach: int = 1  # in tokens of `grid`
    neighbours: Grid = (0, 0)

    @property
    def sides(self) -> Grid:
        """`reach` along each axis in the unit that the kernels take: guidance windows are counted in keys."""
        if self.form != "guidance":
            return self.reach, self.reach
        rows, cols = (max(1, self.reach * keys // length) for length, keys in zip(self.grid, self.key_grid))
        return rows, cols

    def seen(self, axis: int) -> Intervals:
        """The keys of every query along an axis."""
        length, key_length = self.grid[axis], self.key_grid[axis]
        if self.form == "all":
            return Intervals(torch.zeros(length, dtype=torch.long), torch.full((length,), key_length))
        if self.form == "guidance":
            return geometry.guidance(length, key_length, self.reach, self.neighbours[axis])
        return (geometry.box if self.form == "radius" else geometry.blocks)(length, self.reach)

    def seeing(self, axis: int) -> Intervals:
        """The queries of every key along an axis: interval ends never decrease."""
        seen, key = self.seen(axis), torch.arange(self.key_grid[axis])
        return Intervals(torch.searchsorted(seen.high, key, right=True), torch.searchsorted(seen.low, key, right=True))


class Tiles(NamedTuple):
    """Shape of the tiles that own a program and of those that it walks over, number of owners, steps of all owners."""

    owner: Grid
    walked: Grid
    owners: Grid
    steps: int


@lru_cache(maxsize=4096)
def tiles(owner: int, walked: int, views: tuple[View, ...], dense: int, keys_own: bool = False) -> Tiles:
    """The tiles of `owner` and `walked` tokens, powers of two a side, that take the fewest steps.

    Counted, not estimated: a row of owners takes as many steps down as tiles fit over the union of its intervals,
    the same across, and the sum over all owners is a product. Each owner walks over `dense` tokens more. Among equals
    the first with the widest tiles wins, whose tokens lie together in memory.
    """
    axes = [[view.seeing(axis) if keys_own else view.seen(axis) for axis in (0, 1)] for view in views]
    sides = len(axes[0][0].low), len(axes[0][1].low)

    @cache
    def along(view: int, axis: int, side: int, step: int) -> int:
        low, high = axes[view][axis]
        ends = torch.arange(side, sides[axis] + side, side).clamp(max=sides[axis]) - 1
        return int((high[ends] - low[::side] + step - 1).div(step, rounding_mode="floor").sum())

    def shapes(tokens: int) -> list[Grid]:
        return [(1 << i, tokens >> i) for i in range(tokens.bit_length())]

    options = []
    for mine, other in product(shapes(owner), shapes(walked)):
        owners = -(-sides[0] // mine[0]), -(-sides[1] // mine[1])
        steps = sum(along(i, 0, mine[0], other[0]) * along(i, 1, mine[1], other[1]) for i in range(len(views)))
        options.append(Tiles(mine, other, owners, steps + prod(owners) * -(-dense // walked)))
    return min(options, key=lambda option: option.steps)


class Options(NamedTuple):
    """The options of `hires_kernels.local_attention`, checked."""

    grid: Grid
    form: str
    reach: int
    guidance_grid: Grid | None
    guidance_neighbours: str
    order: str
    scale: float

    @property
    def near(self) -> View:
        return View(self.grid, self.grid, self.form, self.reach)

    @property
    def guidance(self) -> View | None:
        if self.guidance_grid is None:
            return None
        around = (1 if self.guidance_neighbours == "all" else 0, 1)
        return View(self.grid, self.guidance_grid, "guidance", geometry.local_side(self.form, self.reach), around)


class Launch(NamedTuple):
    """How a kernel runs: its tiles, its programs (owners, samples and heads, splits), steps of a split, constants."""

    tiles: Tiles
    programs: tuple[int, int, int]
    steps: int
    constants: dict[str, Any]


def launch(kernel: str, views: tuple[View, ...], dense: int, query: Tensor) -> Launch:
    """Where owners share all that they walk over, their steps are split until about PROGRAMS programs are at work.

    Nothing here depends on the batch, so neither do the bits.
    """
    batch, _, heads, dim = query.shape
    chosen = config(kernel, query)
    keys_own = kernel == "local_key_gradients"
    sizes = (chosen.keys, chosen.queries) if keys_own else (chosen.queries, chosen.keys)
    shapes = tiles(*sizes, views, dense, keys_own)
    owners, steps, splits = prod(shapes.owners), shapes.steps, 1
    if views[0].form == "all":
        each = shapes.steps // owners
        steps = -(-each // max(1, round(PROGRAMS / (owners * heads))))
        splits = -(-each // steps)
    queries, keys = (shapes.walked, shapes.owner) if keys_own else (shapes.owner, shapes.walked)
    constants = {
        "FORM": views[0].form,
        "QUERY_ROWS": queries[0],
        "QUERY_COLS": queries[1],
        "ROWS": keys[0],
        "COLS": keys[1],
        "DIM": dim,
        "STAGES": chosen.stages,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }
    watching.launched(f"fused.{kernel}", splits=splits, **constants)
    return Launch(shapes, (owners, batch * heads, splits), steps, constants)


def _visits(order: str, shapes: Tiles, view: View, device: torch.device) -> Tensor:
    side = view.reach if view.form == "window" else 2 * view.reach
    rows, cols = (max(1, side // tile) for tile in shapes.owner)
    return _order(order, shapes.owners, (rows, cols), device)


@lru_cache(maxsize=256)
def _order(order: str, owners: Grid, window: Grid, device: torch.device) -> Tensor:
    return permutation(order, owners, window).to(device, torch.int32)


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def _loadable(x: Tensor) -> Tensor:
    """`x` itself where the copy engine can address it: channels together, other strides multiples of 16 bytes."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1]) if size > 1]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    return x if fits and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides) else x.contiguous()


def _tile(x: Tensor, grid: Grid, shape: Grid) -> TensorDescriptor:
    """x (batch, tokens, heads, head_dim) as (batch, heads, rows, columns, head_dim), loaded in tiles of `shape`."""
    batch, _, heads, dim = x.shape
    strides = [
        x.stride(0) if batch > 1 else dim,
        x.stride(2) if heads > 1 else dim,
        grid[1] * x.stride(1) if grid[0] > 1 else dim,
        x.stride(1) if grid[1] > 1 else dim,
        1,
    ]
    return TensorDescriptor(x, [batch, heads, *grid, dim], strides, [1, 1, *shape, dim])


def _text_tile(x: Tensor, shape: Grid) -> TensorDescriptor:
    """Text as a grid of whole rows, as wide as a tile."""
    missing = -x.shape[1] % shape[1]
    if missing:
        x = _loadable(pad(x, (0, 0, 0, 0, 0, missing)))
    return _tile(x, (x.shape[1] // shape[1], shape[1]), shape)


class Inputs(NamedTuple):
    """The tensors of `hires_kernels.local_attention`, loadable. Text has one token at least."""

    query: Tensor
    key: Tensor
    value: Tensor
    text: Triple | None
    guidance: tuple[Tensor, Tensor] | None

    @property
    def text_tokens(self) -> int:
        return self.text[0].shape[1] if self.text else 0


class Attended(NamedTuple):
    """Output of queries, and log2-sum-exp2 of their scores, (batch, heads, tokens), for the backward pass."""

    output: Tensor
    lse: Tensor


def _sources(inputs: Inputs, near: View, low: View | None, shape: Grid) -> list[TensorDescriptor]:
    """Keys and values of image, guidance and text; the image's stand in for what isn't there."""
    image = [_tile(x, near.key_grid, shape) for x in (inputs.key, inputs.value)]
    guidance = text = image
    if inputs.guidance and low:
        guidance = [_tile(x, low.key_grid, shape) for x in inputs.guidance]
    if inputs.text:
        text = [_text_tile(x, shape) for x in inputs.text[1:]]
    return [*image, *guidance, *text]


def _numbers(near: View, low: View | None, text_tokens: int, steps: int, scale: float) -> tuple:
    """What `_forward` and `_query_gradient` take between their tensors and their constants."""
    low_grid, sides, around = (low.key_grid, low.sides, low.neighbours) if low else ((1, 1), (1, 1), (0, 0))
    return near.grid, near.key_grid, near.sides, low_grid, sides, around, text_tokens, steps, scale * LOG2_E.value


def _attend(query: Tensor, inputs: Inputs, near: View, low: View | None, options: Options) -> Attended:
    """Of the queries of near.grid."""
    batch, tokens, heads, dim = query.shape
    run = launch("local_forward", (near, low) if low else (near,), inputs.text_tokens, query)
    splits = run.programs[2]
    output = query.new_empty(splits, *query.shape, dtype=torch.float32 if splits > 1 else query.dtype)
    lse = query.new_empty(splits, batch, heads, tokens, dtype=torch.float32)
    _forward[run.programs](
        _tile(query, near.grid, run.tiles.owner),
        *_sources(inputs, near, low, run.tiles.walked),
        output,
        lse,
        _visits(options.order, run.tiles, near, query.device),
        heads,
        *_numbers(near, low, inputs.text_tokens, run.steps, options.scale),
        GUIDANCE=low is not None,
        **run.constants,
    )
    if splits == 1:
        return Attended(output[0], lse[0])
    whole = Attended(query.new_empty(query.shape), torch.empty_like(lse[0]))
    programs = -(-tokens // 16), batch * heads
    _combine[programs](output, lse, *whole, tokens, heads, splits, TOKENS=16, DIM=dim)
    return whole


class Rows(NamedTuple):
    """Queries and the gradient of their outputs; `lse` and delta = Σ o do are (batch, heads, tokens)."""

    query: Tensor
    grad: Tensor
    lse: Tensor
    delta: Tensor


def _query_gradients(
    rows: Rows, output: Tensor, inputs: Inputs, near: View, low: View | None, options: Options
) -> Tensor:
    """Gradient of the queries; fills rows.delta."""
    run = launch("local_query_gradient", (near, low) if low else (near,), inputs.text_tokens, rows.query)
    splits = run.programs[2]
    dtype = torch.float32 if splits > 1 else rows.query.dtype
    result = rows.query.new_empty(splits, *rows.query.shape, dtype=dtype)
    _query_gradient[run.programs](
        *(_tile(x, near.grid, run.tiles.owner) for x in (rows.query, output, rows.grad)),
        *_sources(inputs, near, low, run.tiles.walked),
        rows.lse,
        rows.delta,
        result,
        _visits(options.order, run.tiles, near, result.device),
        rows.query.shape[2],
        *_numbers(near, low, inputs.text_tokens, run.steps, options.scale),
        GUIDANCE=low is not None,
        **run.constants,
    )
    return _sum(result, rows.query.dtype)


def _key_gradients(
    key: Tensor, value: Tensor, image: Rows, text: Rows | None, view: View, options: Options
) -> tuple[Tensor, Tensor]:
    """Gradients of the keys and values of view.key_grid, seen by image queries through `view`, by all text queries."""
    text_tokens = text.lse.shape[-1] if text else 0
    run = launch("local_key_gradients", (view,), text_tokens, key)
    splits = run.programs[2]
    dtype = torch.float32 if splits > 1 else key.dtype
    grads = [key.new_empty(splits, *key.shape, dtype=dtype) for _ in range(2)]
    queries = [_tile(x, view.grid, run.tiles.walked) for x in (image.query, image.grad)]
    text_queries = [_text_tile(x, run.tiles.walked) for x in (text.query, text.grad)] if text else queries
    _key_and_value_gradient[run.programs](
        *queries,
        *text_queries,
        *(_tile(x, view.key_grid, run.tiles.owner) for x in (key, value)),
        *(image.lse, image.delta),
        *((text or image).lse, (text or image).delta),
        *grads,
        key.shape[2],
        view.grid,
        view.key_grid,
        view.sides,
        view.neighbours,
        text_tokens,
        run.steps,
        options.scale * LOG2_E.value,
        **run.constants,
    )
    return _sum(grads[0], key.dtype), _sum(grads[1], key.dtype)


def _text_views(options: Options, text_tokens: int) -> tuple[View, View]:
    """Text queries and image keys, image queries and text keys: each as one row, all see all."""
    row, text_row = (1, prod(options.grid)), (1, text_tokens)
    return View(text_row, row, "all"), View(row, text_row, "all")


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text: Triple | None,
    guidance: tuple[Tensor, Tensor] | None,
    scale: float,
    **options: Any,
) -> tuple[Inputs, Options]:
    if scale <= 0:
        raise KernelError(f"scale {scale}: backend 'triton' needs a positive one")
    if text:
        text = (_loadable(text[0]), _loadable(text[1]), _loadable(text[2])) if text[0].shape[1] else None
    if guidance:
        guidance = _loadable(guidance[0]), _loadable(guidance[1])
    inputs = Inputs(_loadable(query), _loadable(key), _loadable(value), text, guidance)
    return inputs, Options(scale=scale, **options)


def local_attention_with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, *, text: Triple | None, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Image rows, text rows, and log2-sum-exp2 of the scores (batch, heads, image tokens + text tokens), float32."""
    inputs, settings = _checked(query, key, value, text=text, **options)
    with torch.cuda.device_of(query):
        image = _attend(inputs.query, inputs, settings.near, settings.guidance, settings)
        if inputs.text is None:
            return image.output, text and torch.empty_like(text[0]), image.lse
        from_text, _ = _text_views(settings, inputs.text_tokens)
        text_rows = _attend(inputs.text[0], inputs, from_text, None, settings)
    return image.output, text_rows.output, torch.cat([image.lse, text_rows.lse], -1)


def local_attention(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    return local_attention_with_logsumexp(*tensors, **options)[:2]


def local_attention_backward(
    grad_image: Tensor,
    grad_text: Tensor,
    image: Tensor,
    text_output: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text: Triple | None,
    guidance: tuple[Tensor, Tensor] | None,
    **options: Any,
) -> list[Tensor]:
    """Gradients of query, key, value, of the text's and of the guidance's tensors, as far as there are any."""
    inputs, settings = _checked(query, key, value, text=text, guidance=guidance, **options)
    near, low = settings.near, settings.guidance
    lse, text_lse = (x.contiguous() for x in logsumexp.tensor_split([query.shape[1]], -1))
    image_rows = Rows(inputs.query, _loadable(grad_image), lse, torch.empty_like(lse))
    text_rows, text_grads = None, [torch.zeros_like(x) for x in text or ()]
    guidance_grads: tuple[Tensor, ...] = ()
    with torch.cuda.device_of(query):
        grad_query = _query_gradients(image_rows, image, inputs, near, low, settings)
        if inputs.text:
            from_text, to_text = _text_views(settings, inputs.text_tokens)
            text_rows = Rows(inputs.text[0], _loadable(grad_text), text_lse, torch.empty_like(text_lse))
            text_grads = [_query_gradients(text_rows, text_output, inputs, from_text, None, settings)]
            text_grads += _key_gradients(*inputs.text[1:], image_rows, text_rows, to_text, settings)
        image_grads = _key_gradients(inputs.key, inputs.value, image_rows, text_rows, near, settings)
        if inputs.guidance and low:
            guidance_grads = _key_gradients(*inputs.guidance, image_rows, None, low, settings)
    return [grad_query, *image_grads, *text_grads, *guidance_grads]
