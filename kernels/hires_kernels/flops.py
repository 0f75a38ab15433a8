"""How many floating-point operations the methods need: 4 · head_dim for each pair of a query and a key, no softmax."""

from hires_kernels.geometry import Grid, Intervals, local_spans, patches


def neighborhood_patch_attention(
    grid: Grid,
    window: Grid,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    text: int = 0,
    text_rows: str = "patch",
    shifted: bool = False,
    patch: Grid | None = None,
) -> tuple[int, int]:
    """(image rows, text rows). An axis whose window covers it counts as one patch: its patches are the same."""
    pair = 4 * batch * heads * head_dim
    keys = window[0] * window[1] + text
    image = grid[0] * grid[1] * keys
    if text_rows == "global":
        return pair * image, pair * text * (grid[0] * grid[1] + text)
    offset = 0 if shifted else None
    rows, cols = (
        1 if side == length else len(patches(length, side, offset, own))
        for length, side, own in zip(grid, window, patch or (None, None), strict=True)
    )
    return pair * image, pair * rows * cols * text * keys


def local_attention(
    grid: Grid,
    form: str,
    reach: int,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    text: int = 0,
    guidance_grid: Grid | None = None,
    guidance_neighbours: str = "row",
) -> tuple[int, int]:
    """(image rows, text rows). Keys are counted one by one: a kernel that works on blocks does more."""
    pair = 4 * batch * heads * head_dim
    tokens = grid[0] * grid[1]
    spans = local_spans(grid, form, reach, guidance_grid, guidance_neighbours)
    seen = sum(_pairs(rows) * _pairs(cols) for rows, cols in spans)
    return pair * (seen + tokens * text), pair * text * (tokens + text)


def dense_attention(tokens: int, *, batch: int, heads: int, head_dim: int) -> int:
    """All tokens see all tokens."""
    return 4 * batch * heads * head_dim * tokens**2


def _pairs(axis: Intervals) -> int:
    return int((axis.high - axis.low).sum())
