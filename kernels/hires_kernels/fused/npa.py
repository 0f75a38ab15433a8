"""Neighborhood Patch Attention (ScaleDiff, arXiv 2510.25818, section 3.1) in one persistent kernel, forward only.

A work item is a tile of the queries of one patch, or of the text queries on behalf of one patch. Both run the same
online softmax over two segments of keys, the patch's window and the text, each a grid that is walked in
two-dimensional tiles: windows need no gather. Items are numbered head by head, so that the keys of one head stay in
the L2 cache while its patches are served.

Text stands at the top-left token of the window: a pre-pass rotates the text's queries and keys for every patch. The
outputs of the text rows of a patch replace its queries, in the input's precision, and their mean is taken in float32
and in a fixed order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import starmap
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hires_kernels import launches, watching
from hires_kernels.errors import KernelError
from hires_kernels.geometry import Grid

Triple = tuple[Tensor, Tensor, Tensor]
LOG2_E = 1.4426950408889634


@triton.jit
def _tokens(
    source, walk, batch, head, row, col,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tokens (row … row + ROWS) × (col … col + COLS) of one head: (ROWS · COLS, DIM). Past the grid: any numbers."""
    if TMA:
        row += batch * walk[0] + head * walk[1]
        x = source.load([row, col, head * walk[2]]).reshape([ROWS * COLS, DIM])
    else:
        place = tl.arange(0, ROWS * COLS)
        rows = tl.minimum(row + place // COLS, walk[4] - 1).to(tl.int64)
        cols = tl.minimum(col + place % COLS, walk[5] - 1).to(tl.int64)
        first = source + batch.to(tl.int64) * walk[0] + head.to(tl.int64) * walk[1]
        places = rows * walk[2] + cols * walk[3]
        x = tl.load(first + places[:, None] + tl.arange(0, DIM)[None, :])
    return x


@triton.jit
def _segment(
    total, top, output, query, scale, key, value, key_walk, value_walk, key_batch, value_batch, head,
    row, col, rows, cols,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys (row … row + rows) × (col … col + cols): returns total, top, output."""
    across = tl.cdiv(cols, COLS)
    place = tl.arange(0, ROWS * COLS)
    for step in range(tl.cdiv(rows, ROWS) * across):
        down = step // across * ROWS
        right = step % across * COLS
        keys = _tokens(key, key_walk, key_batch, head, row + down, col + right, ROWS, COLS, DIM, TMA)
        scores = tl.dot(query, keys.T, input_precision=PRECISION)
        if MASK:
            seen = (down + place // COLS < rows) & (right + place % COLS < cols)
            scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        values = _tokens(value, value_walk, value_batch, head, row + down, col + right, ROWS, COLS, DIM, TMA)
        output = tl.dot(weights.to(values.dtype), values, output * shrink[:, None], input_precision=PRECISION)
        top = higher
    return total, top, output


@triton.jit
def _place(patch, batch, patches, grid, window, side, margin, shift):
    """First row and column of a patch, before clipping, and of its window, which begins `margin` before."""
    row = patch // patches[1] * side[0]
    col = patch % patches[1] * side[1]
    if shift is not None:
        row -= tl.load(shift + batch * 2)
        col -= tl.load(shift + batch * 2 + 1)
    window_row = tl.minimum(tl.maximum(row - margin[0], 0), grid[0] - window[0])
    window_col = tl.minimum(tl.maximum(col - margin[1], 0), grid[1] - window[1])
    return row, col, window_row, window_col


@triton.jit
def _turn(
    x, output, cos, sin, shift, walk, grid, window, side, margin, patches, tokens, heads,
    DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """output (batch, patches, tokens, heads, DIM): x (batch, tokens, heads, DIM) at the corner of each window."""
    patch = tl.program_id(0)
    batch = tl.program_id(2)
    _, _, window_row, window_col = _place(patch, batch, patches, grid, window, side, margin, shift)
    pair = tl.arange(0, DIM // 2)
    corner = (window_row * grid[1] + window_col).to(tl.int64) * DIM + 2 * pair
    turn_cos = tl.load(cos + corner).to(tl.float32)[None, :]
    turn_sin = tl.load(sin + corner).to(tl.float32)[None, :]

    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = (place < tokens * heads)[:, None]
    first = batch.to(tl.int64) * walk[0] + (place // heads).to(tl.int64) * walk[1] + place % heads * walk[2]
    channel = tl.arange(0, DIM)[None, :]
    values = tl.load(x + first[:, None] + channel, mask=valid, other=0.0).to(tl.float32)
    real, imaginary = tl.split(values.reshape([ROWS, DIM // 2, 2]))
    turned = tl.join(real * turn_cos - imaginary * turn_sin, imaginary * turn_cos + real * turn_sin)
    first = (batch.to(tl.int64) * patches[0] * patches[1] + patch) * tokens * heads + place
    tl.store(
        output + first[:, None] * DIM + channel, turned.reshape([ROWS, DIM]).to(output.dtype.element_ty), mask=valid
    )


@triton.jit
def _attend(
    query, key, value, output, text_query, text_key, text_value, text_output, logsums, shift,
    query_walk, key_walk, value_walk, text_query_walk, text_key_walk, text_value_walk,
    grid, window, side, margin, patches, heads, text_tokens, image_tiles, text_tiles, items, scale,
    DIM: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TURNED: tl.constexpr, MASK_IMAGE: tl.constexpr, MASK_TEXT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """TURNED: text queries and keys have an axis of patches. `text_query` and `text_output` may be the same memory.

    With `logsums` the patches are bands: disjoint rows of the grid, of which the first sees the text as well.
    """
    channel = tl.arange(0, DIM)
    tiles = image_tiles + text_tiles
    count = patches[0] * patches[1]
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = item % tiles
        patch = item // tiles % count
        head = item // (tiles * count) % heads
        batch = item // (tiles * count * heads)
        long_head, long_batch = head.to(tl.int64), batch.to(tl.int64)
        text_batch = batch
        if TURNED:
            text_batch = batch * count + patch

        if logsums is not None:
            row, col = patch * window[0], patch * 0
            window_row, window_col = row, col
            rows, text_keys = tl.minimum(window[0], grid[0] - row), tl.where(patch == 0, text_tokens, 0)
        else:
            row, col, window_row, window_col = _place(patch, batch, patches, grid, window, side, margin, shift)
            rows, text_keys = window[0] + patch * 0, text_tokens + patch * 0

        # where the queries of the tile are read and their outputs written
        place = tl.arange(0, QUERIES)
        if tile >= image_tiles:
            place += (tile - image_tiles) * QUERIES
            valid = place < text_tokens
            token = place.to(tl.int64)
            source = text_query + text_batch.to(tl.int64) * text_query_walk[0] + long_head * text_query_walk[2]
            source += token * text_query_walk[1]
            result = text_output + (long_batch * count + patch) * text_tokens * heads * DIM
        else:
            first_row, first_col = tl.maximum(row, 0), tl.maximum(col, 0)
            down = tl.maximum(tl.minimum(row + side[0], grid[0]) - first_row, 0)
            across = tl.maximum(tl.minimum(col + side[1], grid[1]) - first_col, 0)
            if tile * QUERIES >= down * across:  # nothing of this patch is left, or all of it is padding
                rows, text_keys = rows * 0, text_keys * 0
            place += tile * QUERIES
            valid = place < down * across
            across = tl.maximum(across, 1)
            token = ((first_row + place // across) * grid[1] + first_col + place % across).to(tl.int64)
            source = query + long_batch * query_walk[0] + long_head * query_walk[2]
            source += token * query_walk[1]
            result = output + long_batch * grid[0] * grid[1] * heads * DIM
        queries = tl.load(source[:, None] + channel[None, :], mask=valid[:, None], other=0.0)

        total = tl.zeros([QUERIES], tl.float32)
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        sums = tl.zeros([QUERIES, DIM], tl.float32)
        total, top, sums = _segment(
            total, top, sums, queries, scale, key, value, key_walk, value_walk, batch, batch, head,
            window_row, window_col, rows, window[1], ROWS, COLS, DIM, MASK_IMAGE, TMA, PRECISION,
        )  # fmt: skip
        if text_key is not None:
            total, top, sums = _segment(
                total, top, sums, queries, scale, text_key, text_value, text_key_walk, text_value_walk,
                text_batch, batch, head, 0, 0, text_keys, 1, ROWS * COLS, 1, DIM, MASK_TEXT, TMA, PRECISION,
            )  # fmt: skip

        places = result + long_head * DIM + token * (heads * DIM)
        total = tl.where(valid, total, 1.0)  # a tile of padding has seen no key
        sums = (sums / total[:, None]).to(queries.dtype)
        tl.store(places[:, None] + channel[None, :], sums, mask=valid[:, None])
        if logsums is not None:
            first = logsums + (long_batch * count + patch) * text_tokens * heads + long_head
            tl.store(first + token * heads, top + tl.log2(total), mask=valid)


@triton.jit
def _mean(partial, logsums, output, patches, size, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """output (batch, size) of partial (batch, patches, size): the mean, or the mean with weights exp2(logsums)."""
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = place < size
    first = partial + batch * patches * size + place
    total = tl.zeros([BLOCK], tl.float32)
    if logsums is None:
        for _ in range(patches):
            total += tl.load(first, mask=valid, other=0.0).to(tl.float32)
            first += size
        total /= patches
    else:
        rows = logsums + batch * patches * (size // DIM) + place // DIM
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        for patch in range(patches):
            top = tl.maximum(top, tl.load(rows + patch * (size // DIM), mask=valid, other=0.0))
        weights = tl.zeros([BLOCK], tl.float32)
        for _ in range(patches):
            weight = tl.exp2(tl.load(rows, mask=valid, other=0.0) - top)
            total += tl.load(first, mask=valid, other=0.0).to(tl.float32) * weight
            weights += weight
            first += size
            rows += size // DIM
        total /= weights
    tl.store(output + batch * size + place, total.to(output.dtype.element_ty), mask=valid)


class Launch(NamedTuple):
    """How a kernel is launched: queries and keys of a tile, warps, pipeline stages, programs on a multiprocessor."""

    queries: int
    keys: int
    warps: int
    stages: int
    programs: int = 1


def launch(query: Tensor) -> Launch:
    """The launch for a tensor's device and head dim."""
    if query.device.type == "cpu":  # Triton's interpreter
        return Launch(32, 16, 4, 1)
    return Launch(**launches.launch("npa_triton", query.shape[-1], query.device))


@cache
def tile_shape(window: Grid, keys: int) -> Grid:
    """(rows, columns) of the tile of `keys` tokens, powers of two, that covers a window with the fewest tiles."""
    shapes = [(keys // cols, cols) for cols in (2**power for power in range(keys.bit_length())) if cols <= keys]
    return min(shapes, key=lambda shape: (ceil(window[0] / shape[0]) * ceil(window[1] / shape[1]), -shape[1]))


class Source(NamedTuple):
    """Tokens on a grid as the kernel reads them: `pointer` is a tensor or a descriptor, `walk` the way through it."""

    pointer: Any
    walk: tuple[int, ...]


def plain(x: Tensor, grid: Grid) -> Source:
    """x (batch, tokens, heads, dim) by pointers; walk: strides of batch, head, row, column, then the grid."""
    batch, token, head, _ = x.stride()
    return Source(x, (batch, head, grid[1] * token, token, *grid))


def described(x: Tensor, grid: Grid, tile: Grid) -> Source | None:
    """x by a tensor descriptor over (rows, columns, channels), for TMA; None where the strides don't allow one.

    walk: rows from one sample to the next, rows from head to head, channels from head to head.
    """
    batch, _, heads, dim = x.shape
    sample, token, head, _ = x.stride()
    row = grid[1] * token
    if x.numel() == 0 or x.data_ptr() % 16 or token * x.element_size() % 16:
        return None
    if batch > 1 and sample % row:
        return None
    if heads == 1 or head == dim:
        samples = sample // row if batch > 1 else grid[0]
        shape, walk = (samples * (batch - 1) + grid[0], grid[1], heads * dim), (samples, 0, dim)
    elif head % row == 0:
        last = (batch - 1) * sample + (heads - 1) * head
        shape, walk = (last // row + grid[0], grid[1], dim), (sample // row if batch > 1 else 0, head // row, 0)
    else:
        return None
    return Source(TensorDescriptor(x, list(shape), [row, token, 1], [*tile, dim]), walk)


def programs(device: torch.device, launch: Launch, items: int, spared: int = 0) -> int:
    """Size of the persistent launch grid, which leaves `spared` multiprocessors to others."""
    if device.type == "cpu":
        return min(items, 2)
    return min(items, launch.programs * (torch.cuda.get_device_properties(device).multi_processor_count - spared))


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
    rows: tuple[int, int] | None = None,
    spared: int = 0,
    run: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As the operation of this name, which has checked the input; `scale` must be positive.

    With `rows` only the patches that tile these rows of the grid are run (`hires_kernels.band`): other rows of the
    output are not written, and the text rows are the mean over these patches. A single sample's query then needs no
    more rows than up to their end. `spared` multiprocessors are left to what runs beside. `run` computes the image rows
    and the text rows of the patches: `attend`, or one that does the same.
    """
    run = run or attend
    if scale <= 0:
        raise KernelError(f"scale {scale}: fused kernels need a positive one")
    query, key, value = (channels_together(x) for x in (query, key, value))
    with torch.cuda.device_of(query):
        image = new_like(query)
        shift = None if shift is None else shift.to(query.device, torch.int32)
        patches = tiling(grid, window, shift, patch)
        if rows is not None:  # the grid of patches, moved down
            down = query.new_zeros(len(query), 2, dtype=torch.int32)
            down[:, 0] = -rows[0]
            patches = Patches(grid, window, (ceil((rows[1] - rows[0]) / (window[0] // 2)), patches.count[1]), down)
        if text is None or text[0].shape[1] == 0:
            run((query, key, value), None, patches, scale, output=image, spared=spared)
            return image, None if text is None else new_like(text[0])

        text_query, text_key, text_value = (channels_together(x) for x in text)
        text_image = new_like(text_query)
        keys = turn(text_key, rope, patches)
        if text_rows == "patch":
            queries = turn(text_query, rope, patches)
            partial = queries if rope is not None else queries.new_empty(patches.shape(text_query))
            tokens = queries, keys, text_value
            run((query, key, value), tokens, patches, scale, output=image, text_output=partial, spared=spared)
            average(partial, None, text_image)
        else:
            run((query, key, value), (text_query, keys, text_value), patches, scale, output=image, spared=spared)
            global_text_rows((query, key, value), (text_query, text_key, text_value), grid, rope, scale, text_image)
        return image, text_image


@dataclass(frozen=True)
class Patches:
    """The tiling of one call: how many patches along each axis, and the offsets of random shifting.

    Patches of an own `side` lie in the middle of their windows (`hires_kernels.geometry.patches`).
    """

    grid: Grid
    window: Grid
    count: Grid
    shift: Tensor | None
    own: Grid | None = None

    @property
    def side(self) -> Grid:
        return self.own or (self.window[0] // 2, self.window[1] // 2)

    @property
    def margin(self) -> Grid:
        """Of a window before its patch."""
        if self.own is None:
            return self.window[0] // 4, self.window[1] // 4
        return (self.window[0] - self.own[0]) // 2, (self.window[1] - self.own[1]) // 2

    def shape(self, text: Tensor) -> tuple[int, ...]:
        """(batch, patches, text tokens, heads, head_dim)."""
        return len(text), self.count[0] * self.count[1], *text.shape[1:]


def new_like(x: Tensor) -> Tensor:
    """Contiguous, not yet written."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def channels_together(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the channels, which is 1 in every projection."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tiling(grid: Grid, window: Grid, shift: Tensor | None, side: Grid | None) -> Patches:
    """All patches of a grid; random shifting adds one along each axis."""
    sides = side or (window[0] // 2, window[1] // 2)
    rows, cols = (ceil(length / one) + (shift is not None) for length, one in zip(grid, sides))
    return Patches(grid, window, (rows, cols), shift, side)


def turn(x: Tensor, rope: tuple[Tensor, Tensor] | None, patches: Patches) -> Tensor:
    """Text queries or keys rotated for each patch (batch, patches, text tokens, heads, dim); without rope, as given."""
    if rope is None:
        return x
    output = x.new_empty(patches.shape(x))
    batch, tokens, heads, dim = x.shape
    cos, sin = (part.contiguous() for part in rope)
    rows = 32
    _turn[(output.shape[1], ceil(tokens * heads / rows), batch)](
        x, output, cos, sin, patches.shift, x.stride()[:3], patches.grid, patches.window, patches.side, patches.margin,
        patches.count, tokens, heads, DIM=dim, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return output


def global_text_rows(
    image: Triple, text: Triple, grid: Grid, rope: tuple[Tensor, Tensor] | None, scale: float, output: Tensor
) -> None:
    """Text queries at the grid's first token on all keys: on bands of about 4,096 keys, which are then put together."""
    first = Patches(grid, grid, (1, 1), None)
    text_query, text_key = (turn(x, rope, first).view_as(x) if rope is not None else x for x in text[:2])
    rows = min(grid[0], max(1, 4096 // grid[1]))
    bands = Patches(grid, (rows, grid[1]), (ceil(grid[0] / rows), 1), None)
    partial = output.new_empty(bands.shape(output))
    logsums = output.new_empty(partial.shape[:-1], dtype=torch.float32)
    attend(image, (text_query, text_key, text[2]), bands, scale, text_output=partial, logsums=logsums)
    average(partial, logsums, output)


def attend(
    image: Triple,
    text: Triple | None,
    patches: Patches,
    scale: float,
    output: Tensor | None = None,
    text_output: Tensor | None = None,
    logsums: Tensor | None = None,
    spared: int = 0,
) -> None:
    """Write `output` (batch, tokens, heads, dim) and `text_output` (batch, patches, text tokens, heads, dim)."""
    query, key, value = image
    batch, _, heads, dim = query.shape
    grid, window = patches.grid, patches.window
    config = launch(query)
    tile = tile_shape(window, config.keys)

    sources = [(key, grid, tile), (value, grid, tile)]
    text_query, text_tokens, turned = query, 0, False
    if text is not None:
        text_query, text_key, text_value = text
        text_tokens, turned = text_value.shape[1], text_key.dim() == 5
        text_query, text_key = (x.flatten(0, -4) for x in (text_query, text_key))
        sources += [(x, (text_tokens, 1), (config.keys, 1)) for x in (text_key, text_value)]
    found: list[Source] = []
    if query.device.type == "cpu" or torch.cuda.get_device_capability(query.device) >= (9, 0):
        found = [source for source in starmap(described, sources) if source is not None]
    tma = len(found) == len(sources)
    if not tma:
        found = [plain(x, source_grid) for x, source_grid, _ in sources]
    pointers, walks = [source.pointer for source in found], [source.walk for source in found]
    if text is None:
        pointers, walks = [*pointers, None, None], walks + walks

    image_tiles = 0 if output is None else ceil(patches.side[0] * patches.side[1] / config.queries)
    text_tiles = 0 if text_output is None else ceil(text_tokens / config.queries)
    items = batch * heads * patches.count[0] * patches.count[1] * (image_tiles + text_tiles)
    ragged = logsums is not None and grid[0] % window[0] != 0
    watching.launched("fused.npa", **config._asdict(), tile=list(tile), tma=tma)
    _attend[(programs(query.device, config, items, spared),)](
        query, *pointers[:2], query if output is None else output,
        text_query, *pointers[2:], query if text_output is None else text_output, logsums, patches.shift,
        query.stride()[:3], *walks[:2], text_query.stride()[:3], *walks[2:],
        grid, window, patches.side, patches.margin, patches.count, heads, text_tokens, image_tiles, text_tiles, items,
        scale * LOG2_E,
        DIM=dim, QUERIES=config.queries, ROWS=tile[0], COLS=tile[1], TURNED=turned,
        MASK_IMAGE=bool(window[0] % tile[0] or window[1] % tile[1]) or ragged,
        MASK_TEXT=text_tokens % config.keys != 0, TMA=tma,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def average(partial: Tensor, logsums: Tensor | None, output: Tensor) -> None:
    """output (batch, …): the mean of partial (batch, patches, …) over the patches, or what `logsums` make of it."""
    batch, patches = partial.shape[:2]
    size, block = partial[0, 0].numel(), 1024
    _mean[(ceil(size / block), batch)](
        partial, logsums, output, patches, size, DIM=output.shape[-1], BLOCK=block, num_warps=4
    )
