"""Neighborhood Patch Attention for Hopper: the kernel of `hires_kernels.fused.npa`, its warps specialised by hand.

One warp loads: K and V tiles of the window come by TMA straight out of the token grid, text tiles are further steps
of the same loop. Warpgroups of 64 query rows each multiply. The grid is persistent: barriers carry their phases from
one item to the next, and loads run ahead across items.

Two warpgroups take turns: while one is in its softmax, the matrix unit is the other's. Within a warpgroup the scores of
the next step are issued before the values of this one, so that its own softmax overlaps as well (the schedule of
FlashAttention-3, arXiv 2407.08608, section 3). At head dim 64 registers have room for four, which halve what is loaded.

In bfloat16 what is subtracted from a row's scores is the maximum of its first step, whatever follows: softmax doesn't
depend on it, and weights have room for 2 ** 100 times the first ones. Weights are positive, so that sums tell where
this was not enough; such rows are not written, and a second launch, with running maxima, does their items again.
Float16 has room for 2 ** 16, which one row in a hundred passes in a trained U-Net: its maxima run. A launch with
`staged` writes outputs by way of shared memory.
"""

from math import ceil

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hires_kernels import launches, watching
from hires_kernels.fused.npa import LOG2_E, Patches, Triple, described, tile_shape

_synchronise = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # renamed after Triton 3.6


@gluon.jit
def _number(item, listed):
    """The number of the `item`-th item of those `listed` to be done again, which can be none; `item` without a list."""
    if listed is not None:
        item = gl.load(listed + 1 + 2 * gl.maximum(item, 0))
    return item


@gluon.jit
def _item(item, shift, shape, SHIFTED: gl.constexpr):
    """What work item number `item` is: its place, and that of its patch and window.

    Past the end it is the last one again: what is loaded ahead for it is not used.
    """
    listed, grid, window, side, margin, patches, heads, _, _, _, image_tiles, text_tiles, items = shape
    item = _number(gl.minimum(item, items - 1), listed)
    tiles = image_tiles + text_tiles
    count = patches[0] * patches[1]
    tile = item % tiles
    patch = item // tiles % count
    head = item // (tiles * count) % heads
    batch = item // (tiles * count * heads)
    row = patch // patches[1] * side[0]
    col = patch % patches[1] * side[1]
    if SHIFTED:
        row -= gl.load(shift + batch * 2)
        col -= gl.load(shift + batch * 2 + 1)
    window_row = gl.minimum(gl.maximum(row - margin[0], 0), grid[0] - window[0])
    window_col = gl.minimum(gl.maximum(col - margin[1], 0), grid[1] - window[1])
    # the part of the patch inside the grid
    first_row, first_col = gl.maximum(row, 0), gl.maximum(col, 0)
    down = gl.maximum(gl.minimum(row + side[0], grid[0]) - first_row, 0)
    across = gl.maximum(gl.minimum(col + side[1], grid[1]) - first_col, 0)
    return batch, head, patch, tile, window_row, window_col, first_row, first_col, down, across


@gluon.jit
def _steps(tile, down, across, shape, QUERIES: gl.constexpr):
    """Steps over image keys and over text keys of an item. One, of which nothing is kept, for a tile of padding.

    Called where they are needed: Triton 3.6 takes for dead what a loop carries for the bound of an inner loop alone.
    """
    _, _, _, _, _, _, _, _, image_steps, text_steps, image_tiles, _, _ = shape
    padding = (tile < image_tiles) & (tile * QUERIES >= down * across)
    return gl.where(padding, 1, image_steps), gl.where(padding, 0, text_steps)


@gluon.jit
def _tokens(place, tile, first_row, first_col, down, across, width, text_tokens, image_tiles, QUERIES):
    """Tokens of the queries at `place` of a tile, and which of them exist."""
    is_text = tile >= image_tiles
    place += gl.where(is_text, tile - image_tiles, tile) * QUERIES
    wide = gl.maximum(across, 1)
    image_token = (first_row + place // wide) * width + first_col + place % wide
    token = gl.where(is_text, place, image_token)
    return token.to(gl.int64), place < gl.where(is_text, text_tokens, down * across)


@gluon.jit
def _produce(
    key, value, text_key, text_value, shift, walks, shape, k_tiles, v_tiles, barriers,
    QUERIES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, DIM: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    TURNED: gl.constexpr, SHIFTED: gl.constexpr, HAS_TEXT: gl.constexpr, FREE_TOGETHER: gl.constexpr,
):  # fmt: skip
    KEYS: gl.constexpr = ROWS * COLS
    BYTES: gl.constexpr = KEYS * DIM * 2
    key_walk, value_walk, text_key_walk, text_value_walk = walks
    _, _, window, _, _, patches, _, _, _, _, _, _, items = shape
    k_ready, k_free, v_ready, v_free = barriers
    if FREE_TOGETHER:
        k_free = v_free
    done = gl.to_tensor(0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head, patch, tile, window_row, window_col, _, _, down, across = _item(item, shift, shape, SHIFTED)
        image_steps, text_steps = _steps(tile, down, across, shape, QUERIES)
        wide = gl.cdiv(window[1], COLS)
        key_row = batch * key_walk[0] + head * key_walk[1] + window_row
        value_row = batch * value_walk[0] + head * value_walk[1] + window_row
        for step in range(image_steps):
            stage, phase = done % K_STAGES, done // K_STAGES & 1 ^ 1
            below, right = step // wide * ROWS, window_col + step % wide * COLS
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), BYTES)
            place = [key_row + below, right, head * key_walk[2]]
            tma.async_copy_global_to_shared(key, place, k_ready.index(stage), k_tiles.index(stage))
            stage, phase = done % V_STAGES, done // V_STAGES & 1 ^ 1
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_ready.index(stage), BYTES)
            place = [value_row + below, right, head * value_walk[2]]
            tma.async_copy_global_to_shared(value, place, v_ready.index(stage), v_tiles.index(stage))
            done += 1
        if HAS_TEXT:
            text_batch = batch
            if TURNED:
                text_batch = batch * (patches[0] * patches[1]) + patch
            key_row = text_batch * text_key_walk[0] + head * text_key_walk[1]
            value_row = batch * text_value_walk[0] + head * text_value_walk[1]
            for step in range(text_steps):
                stage, phase = done % K_STAGES, done // K_STAGES & 1 ^ 1
                mbarrier.wait(k_free.index(stage), phase)
                mbarrier.expect(k_ready.index(stage), BYTES)
                place = [key_row + step * KEYS, 0, head * text_key_walk[2]]
                target = k_tiles.index(stage).reshape([KEYS, 1, DIM])
                tma.async_copy_global_to_shared(text_key, place, k_ready.index(stage), target)
                stage, phase = done % V_STAGES, done // V_STAGES & 1 ^ 1
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.expect(v_ready.index(stage), BYTES)
                place = [value_row + step * KEYS, 0, head * text_value_walk[2]]
                target = v_tiles.index(stage).reshape([KEYS, 1, DIM])
                tma.async_copy_global_to_shared(text_value, place, v_ready.index(stage), target)
                done += 1


@gluon.jit
def _fetch_queries(
    GROUP: gl.constexpr, query, text_query, walks, shape, tile_of_queries,
    batch, head, patch, tile, first_row, first_col, down, across, QUERIES: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """Begin to copy the 64 query rows of one warpgroup into shared memory."""
    query_walk, text_query_walk = walks
    _, grid, _, _, _, patches, _, text_tokens, _, _, image_tiles, _, _ = shape
    DIM: gl.constexpr = tile_of_queries.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    place = GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    token, valid = _tokens(place, tile, first_row, first_col, down, across, grid[1], text_tokens, image_tiles, QUERIES)
    if tile >= image_tiles:
        text_batch = batch
        if TURNED:
            text_batch = batch * (patches[0] * patches[1]) + patch
        first = text_query + text_batch.to(gl.int64) * text_query_walk[0] + head.to(gl.int64) * text_query_walk[2]
        source = first + token * text_query_walk[1]
    else:
        first = query + batch.to(gl.int64) * query_walk[0] + head.to(gl.int64) * query_walk[2]
        source = first + token * query_walk[1]
    source = gl.expand_dims(source, 1) + gl.expand_dims(gl.arange(0, DIM, gl.SliceLayout(0, layout)), 0)
    async_copy.async_copy_global_to_shared(tile_of_queries, source, mask=gl.expand_dims(valid, 1))
    async_copy.commit_group()


@gluon.jit
def _hide(
    scores, step, image_steps, window, text_tokens,
    ROWS: gl.constexpr, COLS: gl.constexpr, MASK_IMAGE: gl.constexpr, MASK_TEXT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Minus infinity for keys of the tile that are past the window or the text."""
    if MASK_IMAGE or MASK_TEXT:
        place = gl.arange(0, ROWS * COLS, gl.SliceLayout(0, LAYOUT))
        wide = gl.cdiv(window[1], COLS)
        rows, cols = step // wide * ROWS + place // COLS, step % wide * COLS + place % COLS
        image = (rows < window[0]) & (cols < window[1])
        text = (step - image_steps) * (ROWS * COLS) + place < text_tokens
        seen = gl.where(step < image_steps, image, text)
        scores = gl.where(gl.expand_dims(seen, 0), scores, float("-inf"))
    return scores


def _shrink_asm(registers: int) -> str:
    """PTX: multiply `registers` sums, pairs of two rows in turn, but not where a whole warp would multiply by one."""
    first, second = f"${2 * registers}", f"${2 * registers + 2}"
    products = "".join(f"mul.f32 ${i}, ${i}, {second if i & 2 else first}; " for i in range(registers))
    return (
        "{ .reg .pred higher; .reg .f32 least; "
        f"min.f32 least, {first}, {second}; setp.lt.f32 higher, least, 0f3F800000; "
        f"vote.sync.any.pred higher, higher, 0xffffffff; @!higher bra KEPT; {products}KEPT: }}"
    )


def _shrink_constraints(registers: int) -> str:
    sums, tied = ["=f"] * registers, [str(i) for i in range(registers)]
    return ",".join(sums + tied + ["f"] * registers)


SHRINK_32 = gl.constexpr(_shrink_asm(32))
SHRINK_64 = gl.constexpr(_shrink_asm(64))
SHRINK_32_OPERANDS = gl.constexpr(_shrink_constraints(32))
SHRINK_64_OPERANDS = gl.constexpr(_shrink_constraints(64))
RISE = gl.constexpr(8.0)  # weights stay below 2 ** 8, as in FlashAttention-4


@gluon.jit
def _higher(top, candidate):
    """The new maximum of a row: the old one until it is passed by more than `RISE`."""
    return gl.where(candidate > top + RISE, candidate, top)


@gluon.jit
def _shrunk(sums, shrink):
    """Sums so far, rescaled to a new maximum."""
    shrink = gl.expand_dims(shrink, 1)
    if sums.shape[1] == 64:
        return gl.inline_asm_elementwise(SHRINK_32, SHRINK_32_OPERANDS, [sums, shrink], gl.float32, False, 32)
    else:
        return gl.inline_asm_elementwise(SHRINK_64, SHRINK_64_OPERANDS, [sums, shrink], gl.float32, False, 64)


# What a partial sum must stay below where the maximum is the first step's: float32 accumulators then have room for
# values up to 2 ** 25.
LIMIT = gl.constexpr(2.0**100)
FIRST_MAXIMA = (torch.bfloat16,)  # dtypes whose maxima are those of first steps


@gluon.jit
def _row_sums(total, RUNNING: gl.constexpr):
    """Sums of rows from partial ones; of first maxima NaN where one of these is not below the limit."""
    if not RUNNING:
        total = gl.where(total < LIMIT, total, float("nan"))
    return gl.sum(total, 1)


@gluon.jit
def _note(GROUP: gl.constexpr, sums, item, again):
    """Whether the sums of a warpgroup's rows are all there. If not, note that they are to be done again.

    again: a count of items, then pairs: the number of one of these, and warpgroups (bits) of the item with the pair's
    own number.
    """
    right = gl.min(gl.where(sums == sums, 1, 0), 0)
    if right == 0:
        before = gl.atomic_or(again + 2 + 2 * item, 1 << GROUP)
        if before == 0:
            gl.store(again + 1 + 2 * gl.atomic_add(again, 1), item)
    return right != 0


@gluon.jit
def _noted(GROUP: gl.constexpr, item, again):
    """Whether `_note` has noted a warpgroup of an item. Others' text rows may have taken the place of their queries."""
    return (gl.load(again + 2 + 2 * item) >> GROUP & 1) != 0


@gluon.jit
def _partial_sums(weights, LAYOUT: gl.constexpr):
    """(64, 4): sums of each row by the four threads that hold it, which are added up at the end of an item."""
    pairs = gl.reshape(weights, [64, weights.shape[1] // 8, 4, 2])
    return gl.convert_layout(gl.sum(gl.sum(pairs, 3), 1), LAYOUT)


@gluon.jit
def _write(
    GROUP: gl.constexpr, outputs, queries, output, text_output, shape, wanted,
    batch, head, patch, tile, first_row, first_col, down, across,
    QUERIES: gl.constexpr, STAGED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Rows of one warpgroup to where they belong, if `wanted`. STAGED: by way of the item's own queries, whole rows."""
    _, grid, _, _, _, patches, heads, text_tokens, _, _, image_tiles, _, _ = shape
    DIM: gl.constexpr = outputs.shape[1]
    if STAGED:
        queries.store(outputs)
        _synchronise()
        outputs = queries.load(LAYOUT)
        _synchronise()
    place = GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    token, valid = _tokens(place, tile, first_row, first_col, down, across, grid[1], text_tokens, image_tiles, QUERIES)
    long_batch = batch.to(gl.int64)
    if tile >= image_tiles:
        first = text_output + (long_batch * (patches[0] * patches[1]) + patch) * text_tokens * heads * DIM
    else:
        first = output + long_batch * grid[0] * grid[1] * heads * DIM
    result = gl.expand_dims(first + head * DIM + token * (heads * DIM), 1)
    result += gl.expand_dims(gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT)), 0)
    gl.store(result, outputs, mask=gl.expand_dims(valid & wanted, 1))


@gluon.jit
def _consume(
    GROUP: gl.constexpr, rest,
    QUERIES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, DIM: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    TURNED: gl.constexpr, SHIFTED: gl.constexpr, MASK_IMAGE: gl.constexpr, MASK_TEXT: gl.constexpr,
    GROUPS: gl.constexpr, FREE_TOGETHER: gl.constexpr, STAGED: gl.constexpr, RUNNING: gl.constexpr,
    AGAIN: gl.constexpr,
):  # fmt: skip
    """One of two warpgroups. First scores of an item are issued together with the last values of the one before it."""
    query, output, text_query, text_output, shift, walks, shape, scale, again = rest[:9]
    q_tiles, k_tiles, v_tiles, barriers, turns = rest[9:]
    listed, _, window, _, _, _, _, text_tokens, image_steps, _, _, _, items = shape
    k_ready, k_free, v_ready, v_free = barriers
    KEYS: gl.constexpr = ROWS * COLS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    PARTS: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OUTPUTS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0]) if STAGED else SUMS
    dtype: gl.constexpr = q_tiles.dtype
    no_scores = gl.zeros([64, KEYS], gl.float32, SCORES)
    stride = gl.num_programs(0)
    item = gl.program_id(0)

    # this item and the next: their queries have a buffer each
    batch, head, patch, tile, _, _, first_row, first_col, down, across = _item(item, shift, shape, SHIFTED)
    _fetch_queries(
        GROUP, query, text_query, walks, shape, q_tiles.index(GROUP),
        batch, head, patch, tile, first_row, first_col, down, across, QUERIES, TURNED,
    )  # fmt: skip
    batch1, head1, patch1, tile1, _, _, first_row1, first_col1, down1, across1 = _item(
        item + stride, shift, shape, SHIFTED
    )
    _fetch_queries(
        GROUP, query, text_query, walks, shape, q_tiles.index(GROUPS + GROUP),
        batch1, head1, patch1, tile1, first_row1, first_col1, down1, across1, QUERIES, TURNED,
    )  # fmt: skip
    async_copy.wait_group(1)
    fence_async_shared()
    _synchronise()
    begins = item < items
    mbarrier.wait(k_ready.index(0), 0, begins)
    keys = k_tiles.index(0).reshape([KEYS, DIM]).permute((1, 0))
    scores = warpgroup_mma(q_tiles.index(GROUP), keys, no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    if not FREE_TOGETHER:
        mbarrier.arrive(k_free.index(0), pred=begins)
    scores = _hide(scores, 0, image_steps, window, text_tokens, ROWS, COLS, MASK_IMAGE, MASK_TEXT, SCORES)
    top = gl.max(scores, 1) * scale
    weights = gl.exp2(scores * scale - gl.expand_dims(top, 1))
    total = _partial_sums(weights, PARTS)
    operand = gl.convert_layout(weights.to(dtype), WEIGHTS)

    done = gl.to_tensor(0)  # steps of all items whose values have been added
    buffer = gl.to_tensor(0)
    for item in range(gl.program_id(0), items, stride):
        sums = gl.zeros([64, DIM], gl.float32, SUMS)
        queries = q_tiles.index(GROUPS * buffer + GROUP)
        first_steps, last_steps = _steps(tile, down, across, shape, QUERIES)
        for step in range(1, first_steps + last_steps):
            stage, phase = done % V_STAGES, done // V_STAGES & 1
            next_stage, next_phase = (done + 1) % K_STAGES, (done + 1) // K_STAGES & 1
            mbarrier.wait(k_ready.index(next_stage), next_phase)
            mbarrier.wait(turns.index(GROUP), done & 1 ^ (GROUP == 0))
            keys = k_tiles.index(next_stage).reshape([KEYS, DIM]).permute((1, 0))
            scores = warpgroup_mma(queries, keys, no_scores, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(stage), phase)
            values = v_tiles.index(stage).reshape([KEYS, DIM])
            sums = warpgroup_mma(operand, values, sums, is_async=True)
            mbarrier.arrive(turns.index((GROUP + 1) % GROUPS))
            scores = warpgroup_mma_wait(1, [scores])
            if not FREE_TOGETHER:
                mbarrier.arrive(k_free.index(next_stage))

            scores = _hide(scores, step, image_steps, window, text_tokens, ROWS, COLS, MASK_IMAGE, MASK_TEXT, SCORES)
            if RUNNING:
                higher = _higher(top, gl.max(scores, 1) * scale)
                shrink = gl.exp2(top - higher)
                total *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, PARTS)), 1)
                top = higher
            weights = gl.exp2(scores * scale - gl.expand_dims(top, 1))
            total += _partial_sums(weights, PARTS)
            mbarrier.wait(v_ready.index(stage), phase)  # as before: ptxas moves no softmax across a branch
            sums, operand = warpgroup_mma_wait(0, [sums, operand])
            mbarrier.arrive(v_free.index(stage))
            if RUNNING:
                sums = _shrunk(sums, gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)))
            operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
            done += 1

        # last values of this item, first scores of the next
        follows = item + stride < items
        stage, phase = done % V_STAGES, done // V_STAGES & 1
        next_stage, next_phase = (done + 1) % K_STAGES, (done + 1) // K_STAGES & 1
        async_copy.wait_group(0)
        fence_async_shared()
        _synchronise()
        mbarrier.wait(k_ready.index(next_stage), next_phase, follows)
        mbarrier.wait(turns.index(GROUP), done & 1 ^ (GROUP == 0))
        keys = k_tiles.index(next_stage).reshape([KEYS, DIM]).permute((1, 0))
        scores = warpgroup_mma(
            q_tiles.index(GROUPS * (1 - buffer) + GROUP), keys, no_scores, use_acc=False, is_async=True
        )
        mbarrier.wait(v_ready.index(stage), phase)
        sums = warpgroup_mma(operand, v_tiles.index(stage).reshape([KEYS, DIM]), sums, is_async=True)
        mbarrier.arrive(turns.index((GROUP + 1) % GROUPS))
        scores = warpgroup_mma_wait(1, [scores])
        if not FREE_TOGETHER:
            mbarrier.arrive(k_free.index(next_stage), pred=follows)
        scores = _hide(scores, 0, image_steps, window, text_tokens, ROWS, COLS, MASK_IMAGE, MASK_TEXT, SCORES)
        last_total = _row_sums(total, RUNNING)
        top = gl.max(scores, 1) * scale
        weights = gl.exp2(scores * scale - gl.expand_dims(top, 1))
        total = _partial_sums(weights, PARTS)
        mbarrier.wait(v_ready.index(stage), phase)
        sums, operand = warpgroup_mma_wait(0, [sums, operand])
        mbarrier.arrive(v_free.index(stage))
        operand = gl.convert_layout(weights.to(dtype), WEIGHTS)

        wanted = True
        if not RUNNING:
            wanted = _note(GROUP, last_total, item, again)
        if AGAIN:
            wanted = _noted(GROUP, _number(item, listed), again)
        sums *= gl.expand_dims(1.0 / gl.convert_layout(last_total, gl.SliceLayout(1, SUMS)), 1)
        _write(
            GROUP, sums.to(dtype), queries, output, text_output, shape, wanted,
            batch, head, patch, tile, first_row, first_col, down, across, QUERIES, STAGED, OUTPUTS,
        )  # fmt: skip

        batch2, head2, patch2, tile2, _, _, first_row2, first_col2, down2, across2 = _item(
            item + 2 * stride, shift, shape, SHIFTED
        )
        _fetch_queries(
            GROUP, query, text_query, walks, shape, queries,
            batch2, head2, patch2, tile2, first_row2, first_col2, down2, across2, QUERIES, TURNED,
        )  # fmt: skip
        batch, head, patch, tile, first_row, first_col = batch1, head1, patch1, tile1, first_row1, first_col1
        down, across = down1, across1
        batch1, head1, patch1, tile1, first_row1, first_col1 = batch2, head2, patch2, tile2, first_row2, first_col2
        down1, across1 = down2, across2
        buffer = 1 - buffer
        done += 1


@gluon.jit
def _step_in_turn(
    queries, k_tiles, v_tiles, barriers, sums, total, top, done, step, image_steps, window, text_tokens, scale,
    ROWS: gl.constexpr, COLS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    MASK_IMAGE: gl.constexpr, MASK_TEXT: gl.constexpr, FREE_TOGETHER: gl.constexpr, MAXIMUM: gl.constexpr,
):  # fmt: skip
    """Add the keys and values of a step, without MAXIMUM by the maxima that there are."""
    DIM: gl.constexpr = queries.shape[1]
    dtype: gl.constexpr = queries.dtype
    KEYS: gl.constexpr = ROWS * COLS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    PARTS: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    no_scores = gl.zeros([64, KEYS], gl.float32, SCORES)
    k_ready, k_free, v_ready, v_free = barriers
    stage, phase = done % K_STAGES, done // K_STAGES & 1
    mbarrier.wait(k_ready.index(stage), phase)
    keys = k_tiles.index(stage).reshape([KEYS, DIM]).permute((1, 0))
    scores = warpgroup_mma(queries, keys, no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    if not FREE_TOGETHER:
        mbarrier.arrive(k_free.index(stage))
    scores = _hide(scores, step, image_steps, window, text_tokens, ROWS, COLS, MASK_IMAGE, MASK_TEXT, SCORES)
    if MAXIMUM:
        higher = _higher(top, gl.max(scores, 1) * scale)
        shrink = gl.exp2(top - higher)
        sums = _shrunk(sums, gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)))
        total *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, PARTS)), 1)
        top = higher
    weights = gl.exp2(scores * scale - gl.expand_dims(top, 1))
    total += _partial_sums(weights, PARTS)
    operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
    stage, phase = done % V_STAGES, done // V_STAGES & 1
    mbarrier.wait(v_ready.index(stage), phase)
    sums = warpgroup_mma(operand, v_tiles.index(stage).reshape([KEYS, DIM]), sums, is_async=True)
    sums, operand = warpgroup_mma_wait(0, [sums, operand])
    mbarrier.arrive(v_free.index(stage))
    return sums, total, top


@gluon.jit
def _consume_in_turn(
    GROUP: gl.constexpr, rest,
    QUERIES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, DIM: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    TURNED: gl.constexpr, SHIFTED: gl.constexpr, MASK_IMAGE: gl.constexpr, MASK_TEXT: gl.constexpr,
    GROUPS: gl.constexpr, FREE_TOGETHER: gl.constexpr, STAGED: gl.constexpr, RUNNING: gl.constexpr,
    AGAIN: gl.constexpr,
):  # fmt: skip
    """One of four warpgroups, which overlap with each other alone: scores and weights share their registers."""
    query, output, text_query, text_output, shift, walks, shape, scale, again = rest[:9]
    q_tiles, k_tiles, v_tiles, barriers, _ = rest[9:]
    listed, _, window, _, _, _, _, text_tokens, image_steps, _, _, _, items = shape
    KEYS: gl.constexpr = ROWS * COLS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    PARTS: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    OUTPUTS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0]) if STAGED else SUMS
    dtype: gl.constexpr = q_tiles.dtype
    stride = gl.num_programs(0)

    batch, head, patch, tile, _, _, first_row, first_col, down, across = _item(gl.program_id(0), shift, shape, SHIFTED)
    _fetch_queries(
        GROUP, query, text_query, walks, shape, q_tiles.index(GROUP),
        batch, head, patch, tile, first_row, first_col, down, across, QUERIES, TURNED,
    )  # fmt: skip
    done = gl.to_tensor(0)
    buffer = gl.to_tensor(0)
    for item in range(gl.program_id(0), items, stride):
        queries = q_tiles.index(GROUPS * buffer + GROUP)
        async_copy.wait_group(0)
        fence_async_shared()
        _synchronise()
        batch, head, patch, tile, _, _, first_row, first_col, down, across = _item(item + stride, shift, shape, SHIFTED)
        _fetch_queries(
            GROUP, query, text_query, walks, shape, q_tiles.index(GROUPS * (1 - buffer) + GROUP),
            batch, head, patch, tile, first_row, first_col, down, across, QUERIES, TURNED,
        )  # fmt: skip

        sums = gl.zeros([64, DIM], gl.float32, SUMS)
        total = gl.zeros([64, 4], gl.float32, PARTS)
        top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        batch, head, patch, tile, _, _, first_row, first_col, down, across = _item(item, shift, shape, SHIFTED)
        first_steps, last_steps = _steps(tile, down, across, shape, QUERIES)
        if not RUNNING:
            sums, total, top = _step_in_turn(
                queries, k_tiles, v_tiles, barriers, sums, total, top,
                done, 0, image_steps, window, text_tokens, scale,
                ROWS, COLS, K_STAGES, V_STAGES, MASK_IMAGE, MASK_TEXT, FREE_TOGETHER, True,
            )  # fmt: skip
            done += 1
        for step in range(0 if RUNNING else 1, first_steps + last_steps):
            sums, total, top = _step_in_turn(
                queries, k_tiles, v_tiles, barriers, sums, total, top,
                done, step, image_steps, window, text_tokens, scale,
                ROWS, COLS, K_STAGES, V_STAGES, MASK_IMAGE, MASK_TEXT, FREE_TOGETHER, RUNNING,
            )  # fmt: skip
            done += 1

        batch, head, patch, tile, _, _, first_row, first_col, down, across = _item(item, shift, shape, SHIFTED)
        last_total = _row_sums(total, RUNNING)
        wanted = True
        if not RUNNING:
            wanted = _note(GROUP, last_total, item, again)
        if AGAIN:
            wanted = _noted(GROUP, _number(item, listed), again)
        sums *= gl.expand_dims(1.0 / gl.convert_layout(last_total, gl.SliceLayout(1, SUMS)), 1)
        _write(
            GROUP, sums.to(dtype), queries, output, text_output, shape, wanted,
            batch, head, patch, tile, first_row, first_col, down, across, QUERIES, STAGED, OUTPUTS,
        )  # fmt: skip
        buffer = 1 - buffer


@gluon.jit
def _attend(
    query, key, value, output, text_query, text_key, text_value, text_output, shift, again,
    query_walks, key_walks, shape, scale,
    QUERIES: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, DIM: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    TURNED: gl.constexpr, SHIFTED: gl.constexpr, HAS_TEXT: gl.constexpr, MASK_IMAGE: gl.constexpr,
    MASK_TEXT: gl.constexpr, GROUPS: gl.constexpr, FREE_TOGETHER: gl.constexpr, STAGED: gl.constexpr,
    RUNNING: gl.constexpr, AGAIN: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = key.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [QUERIES // 32, 64, DIM], q_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [K_STAGES, ROWS, COLS, DIM], key.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [V_STAGES, ROWS, COLS, DIM], value.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(K_STAGES):
        mbarrier.init(k_ready.index(stage), 1)
        mbarrier.init(k_free.index(stage), GROUPS)
    for stage in gl.static_range(V_STAGES):
        mbarrier.init(v_ready.index(stage), 1)
        mbarrier.init(v_free.index(stage), GROUPS)
    for group in gl.static_range(GROUPS):
        mbarrier.init(turns.index(group), 1)
    fence_async_shared()

    shape = shape[:]  # of ones among its pairs, which are constants, Triton 3.6 has lost the value in the tuple's type
    if AGAIN:
        shape = (again,) + shape[1:12] + (gl.load(again),)  # noqa: RUF005 (Gluon has no starred tuples)
    barriers = (k_ready, k_free, v_ready, v_free)
    rest = (
        query, output, text_query, text_output, shift, query_walks, shape, scale, again,
        q_tiles, k_tiles, v_tiles, barriers, turns,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (
                0, rest,
                QUERIES, ROWS, COLS, DIM, K_STAGES, V_STAGES, TURNED, SHIFTED, MASK_IMAGE, MASK_TEXT, GROUPS,
                FREE_TOGETHER, STAGED, RUNNING, AGAIN,
            )),
            (_consume, (
                1, rest,
                QUERIES, ROWS, COLS, DIM, K_STAGES, V_STAGES, TURNED, SHIFTED, MASK_IMAGE, MASK_TEXT, GROUPS,
                FREE_TOGETHER, STAGED, RUNNING, AGAIN,
            )),
            (_produce, (
                key, value, text_key, text_value, shift, key_walks, shape, k_tiles, v_tiles, barriers,
                QUERIES, ROWS, COLS, DIM, K_STAGES, V_STAGES, TURNED, SHIFTED, HAS_TEXT, FREE_TOGETHER,
            )),
        ], worker_num_warps=[4, 1], worker_num_regs=[240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume_in_turn, (
                0, rest,
                QUERIES, ROWS, COLS, DIM, K_STAGES, V_STAGES, TURNED, SHIFTED, MASK_IMAGE, MASK_TEXT, GROUPS,
                FREE_TOGETHER, STAGED, RUNNING, AGAIN,
            )),
            (_consume_in_turn, (
                1, rest,
                QUERIES, ROWS, COLS, DIM, K_STAGES, V_STAGES, TURNED, SHIFTED, MASK_IMAGE, MASK_TEXT, GROUPS,
                FREE_TOGETHER, STAGED, RUNNING, AGAIN,
            )),
            (_consume_in_turn, (
                2, rest,
                QUERIES, ROWS, COLS, DIM, K_STAGES, V_STAGES, TURNED, SHIFTED, MASK_IMAGE, MASK_TEXT, GROUPS,
                FREE_TOGETHER, STAGED, RUNNING, AGAIN,
            )),
            (_consume_in_turn, (
                3, rest,
                QUERIES, ROWS, COLS, DIM, K_STAGES, V_STAGES, TURNED, SHIFTED, MASK_IMAGE, MASK_TEXT, GROUPS,
                FREE_TOGETHER, STAGED, RUNNING, AGAIN,
            )),
            (_produce, (
                key, value, text_key, text_value, shift, key_walks, shape, k_tiles, v_tiles, barriers,
                QUERIES, ROWS, COLS, DIM, K_STAGES, V_STAGES, TURNED, SHIFTED, HAS_TEXT, FREE_TOGETHER,
            )),
        ], worker_num_warps=[4, 4, 4, 1], worker_num_regs=[112, 112, 112, 24])  # fmt: skip


def attend(
    image: Triple,
    text: Triple | None,
    patches: Patches,
    scale: float,
    output: Tensor,
    text_output: Tensor | None = None,
    spared: int = 0,
) -> None:
    """As `hires_kernels.fused.npa.attend`, without bands. Keys and values that TMA can't read in place are copied."""
    query = image[0]
    batch, _, heads, dim = query.shape
    grid, window = patches.grid, patches.window
    launch = launches.launch("npa_gluon", dim, query.device)
    groups = launch["groups"]
    queries, keys = 64 * groups, 256 // groups  # what registers hold
    tile = tile_shape(window, keys)

    sources = [(x, grid, tile) for x in image[1:]]
    text_query, text_tokens, turned = query, 0, False
    if text is not None:
        text_tokens, turned = text[2].shape[1], text[1].dim() == 5
        text_query, text_key = (x.flatten(0, -4) for x in text[:2])
        sources += [(x, (text_tokens, 1), (keys, 1)) for x in (text_key, text[2])]
    pointers, walks = [], []
    for x, source_grid, block in sources:
        found = described(x, source_grid, block) or described(x.contiguous(), source_grid, block)
        assert found is not None  # a contiguous tensor has a descriptor
        dtype = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
        layout = gl.NVMMASharedLayout.get_default_for(found.pointer.block_shape, dtype)
        plain = found.pointer
        pointers.append(TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout))
        walks.append(found.walk)
    if text is None:
        pointers, walks = pointers + pointers, walks + walks

    image_tiles = ceil(patches.side[0] * patches.side[1] / queries)
    text_tiles = 0 if text_output is None else ceil(text_tokens / queries)
    items = batch * heads * patches.count[0] * patches.count[1] * (image_tiles + text_tiles)
    image_steps, text_steps = ceil(window[0] / tile[0]) * ceil(window[1] / tile[1]), ceil(text_tokens / keys)
    places = grid, window, patches.side, patches.margin, patches.count
    shape = None, *places, heads, text_tokens, image_steps, text_steps, image_tiles, text_tiles, items
    programs = min(items, torch.cuda.get_device_properties(query.device).multi_processor_count - spared)
    watching.launched("hopper.npa", queries=queries, keys=keys, **launch, tile=list(tile), programs=programs)
    again, passes = None, [(True, False)]
    if query.dtype in FIRST_MAXIMA:
        again = torch.zeros(1 + 2 * items, dtype=torch.int32, device=query.device)
        passes = [(False, False), (True, True)]
    for running, redo in passes:
        _attend[(programs,)](
            query, *pointers[:2], output,
            text_query, *pointers[2:], output if text_output is None else text_output,
            query if patches.shift is None else patches.shift, again,
            (query.stride()[:3], text_query.stride()[:3]), tuple(walks), shape, scale * LOG2_E,
            QUERIES=queries, ROWS=tile[0], COLS=tile[1], DIM=dim,
            K_STAGES=launch["k_stages"], V_STAGES=launch["v_stages"], TURNED=turned,
            SHIFTED=patches.shift is not None, HAS_TEXT=text is not None,
            MASK_IMAGE=bool(window[0] % tile[0] or window[1] % tile[1]), MASK_TEXT=text_tokens % keys != 0,
            GROUPS=groups, FREE_TOGETHER=launch["free_together"], STAGED=launch["staged"],
            RUNNING=running, AGAIN=redo, num_warps=4,
        )  # fmt: skip
