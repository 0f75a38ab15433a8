"""Neighborhood Patch Attention of one image on several devices of a host: each has a band of rows, whole patches.

Windows of the patches at a band's inner edges reach into other bands. While the keys and values of those rows are on
their way, the patches whose windows lie in the band are run, all together and in place. Each row of patches at an edge
then has a small grid of its own, the rows of its windows.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

from hires_kernels import fused, hopper
from hires_kernels.backends import Problem, choose
from hires_kernels.errors import KernelError
from hires_kernels.geometry import Grid, Patch, patches

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
EXCHANGING = 4  # multiprocessors that NCCL's transfers between two devices have for themselves


def band_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    window: Grid,
    edges: Sequence[int],
    text: Triple,
    rope: Pair,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`neighborhood_patch_attention` of an image by all processes of torch.distributed: (image rows, text).

    The image rows are those of this process's band; the text rows, means over all patches, are the same everywhere.
    Called by all processes together. NCCL must have at most `EXCHANGING` channels (NCCL_MAX_P2P_NCHANNELS): kernels
    leave it as many multiprocessors.

    Args:
        query, key, value: (batch, rows · width, heads, head_dim) of the band, query and key rotated.
        grid, window: (rows, columns) of the whole image in tokens.
        edges: the row at which each process's band begins, a multiple of window // 2, and the number of rows.
        text: (query, key, value), each (batch, text tokens, heads, head_dim), not rotated.
        rope: (cos, sin) of the rows that the band sees (`seen_rows`), each (rows · width, head_dim).

    Raises:
        KernelError: the shapes don't fit.
    """
    check_edges(grid[0], window[0], edges)
    first, last = band_of(edges, dist.get_rank())
    low, high = seen_rows(grid[0], window[0], first, last)
    for name, x, rows in (("query", query, last - first), ("rope", rope[0][None], high - low)):
        if x.shape[1] != rows * grid[1]:
            raise KernelError(f"{name} of {x.shape[1]} tokens: rows {first} … {last - 1} need {rows}x{grid[1]}")
    return _band_attention(
        query, key, value, list(text), list(rope), list(grid), list(window), list(edges),
        query.shape[-1] ** -0.5 if scale is None else scale, backend,
    )  # fmt: skip


def check_edges(height: int, window: int, edges: Sequence[int]) -> None:
    """KernelError unless bands are whole patches and hold all rows."""
    side = window // 2
    rising = all(first < last for first, last in pairwise(edges))
    if edges[0] != 0 or edges[-1] != height or not rising or any(edge % side for edge in edges[:-1]):
        raise KernelError(f"edges {list(edges)} of {height} rows: bands are whole patches of {side} rows, 0 … {height}")


def band_of(edges: Sequence[int], rank: int) -> tuple[int, int]:
    """First row and last + 1 of a process."""
    return edges[rank], edges[rank + 1]


def seen_rows(height: int, window: int, first: int, last: int) -> tuple[int, int]:
    """(first, last + 1) row of the keys that the query rows first … last − 1 see, whole patches from row `first`."""
    inner, outer = rows_of_patches(height, window, first, last)
    windows = [patch.window for patch in (*inner, *outer)]
    return min(windows), max(windows) + window


def rows_of_patches(height: int, window: int, first: int, last: int) -> tuple[list[Patch], list[Patch]]:
    """A band's rows of patches: those whose windows lie in the band, one after the other, and those at inner edges.

    Where bands end inside the image no window of the former is moved inwards: alone, a band has the same windows.
    """
    own = [patch for patch in patches(height, window) if first <= patch.start < last]
    inner = [patch for patch in own if first <= patch.window and patch.window + window <= last]
    return inner, [patch for patch in own if patch not in inner]


@custom_op("hires::band_attention", mutates_args=())
def _band_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: Sequence[Tensor],
    rope: Sequence[Tensor],
    grid: Sequence[int],
    window: Sequence[int],
    edges: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    width, rank = grid[1], dist.get_rank()
    fetched, transfers = transfers_of(key, value, width, window[0], edges, rank)
    works = dist.batch_isend_irecv(transfers) if transfers else []

    def wait() -> list[Pair]:
        for work in works:
            work.wait()
        return fetched

    image, edge_rows, total = attend(query, key, value, text, rope, grid, window, edges, rank, scale, backend, wait)
    summing = dist.all_reduce(total, async_op=True)
    for tokens, rows in edge_rows:
        image[tokens] = rows
    summing.wait()
    return image, total.to(text[0].dtype)


@_band_attention.register_fake
def _(query, key, value, text, *_):
    return query.new_empty(query.shape), text[0].new_empty(text[0].shape)


def transfers_of(
    key: Tensor, value: Tensor, width: int, window: int, edges: Sequence[int], rank: int
) -> tuple[list[Pair], list[Any]]:
    """What the rows of patches at inner edges see, (keys, values) each, and the transfers that complete it.

    Own rows are there at once, other processes' come straight to their place: sample by sample, for a sample's rows lie
    together. Both sides list what they exchange in the same order.
    """
    processes = range(len(edges) - 1)
    outer = [rows_of_patches(edges[-1], window, *band_of(edges, process))[1] for process in processes]
    fetched, transfers = [], []
    for other in processes:
        for patch in outer[other] if other != rank else ():
            rows = _overlap(patch, window, band_of(edges, rank))
            for x in (key, value) if rows else ():
                sent = x[:, _tokens(rows, edges[rank], width)]
                transfers += [dist.P2POp(dist.isend, sample.contiguous(), other) for sample in sent]
    for patch in outer[rank]:
        seen = (
            key.new_empty(len(key), window * width, *key.shape[2:]),
            value.new_empty(len(value), window * width, *value.shape[2:]),
        )
        for owner in processes:
            rows = _overlap(patch, window, band_of(edges, owner))
            for x, place in zip((key, value), seen) if rows else ():
                part = place[:, _tokens(rows, patch.window, width)]
                if owner == rank:
                    part.copy_(x[:, _tokens(rows, edges[rank], width)])
                else:
                    transfers += [dist.P2POp(dist.irecv, sample, owner) for sample in part]
        fetched.append(seen)
    return fetched, transfers


def _overlap(patch: Patch, window: int, band: tuple[int, int]) -> range:
    return range(max(patch.window, band[0]), min(patch.window + window, band[1]))


def _tokens(rows: range, first: int, width: int) -> slice:
    return slice((rows.start - first) * width, (rows.stop - first) * width)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: Sequence[Tensor],
    rope: Sequence[Tensor],
    grid: Sequence[int],
    window: Sequence[int],
    edges: Sequence[int],
    rank: int,
    scale: float,
    backend: str,
    wait: Callable[[], list[Pair]],
) -> tuple[Tensor, list[tuple[Any, Tensor]], Tensor]:
    """What one process computes: image rows, those at inner edges apart with their places, and its part of the text.

    wait: gives keys and values of the rows of patches at inner edges, when all others are queued. The sum of all
    processes' text parts, float32, is the mean over the patches.
    """
    problem = Problem("neighborhood_patch_attention", query.device, query.dtype, query.shape[-1])
    module, width = choose(backend, problem), grid[1]
    (first, last), side = band_of(edges, rank), window[0] // 2
    inner, outer = rows_of_patches(grid[0], window[0], first, last)
    low = seen_rows(grid[0], window[0], first, last)[0]
    options: dict[str, Any] = {"window": tuple(window), "shift": None, "text_rows": "patch", "scale": scale}
    image, edge_rows = torch.empty_like(query, memory_format=torch.contiguous_format), []
    total = torch.zeros(text[0].shape, dtype=torch.float32, device=query.device)

    def turned(rows: range) -> Pair:
        cos, sin = (part[_tokens(rows, low, width)] for part in rope)
        return cos, sin

    def run(patch: Patch, keys: Tensor, values: Tensor) -> None:
        """The patches of a row: their queries stand at the top of a grid that holds the windows and nothing else."""
        seen = range(patch.window, patch.window + window[0])
        place = _tokens(range(patch.start, patch.stop), first, width)
        for sample in range(len(query)):
            one = slice(sample, sample + 1)
            found, text_rows = _row_of_patches(
                module, query[one, place], keys[one], values[one], grid=(window[0], width),
                text=tuple(x[one] for x in text), rope=turned(seen), **options,
            )  # fmt: skip
            edge_rows.append(((one, place), found[:, : place.stop - place.start]))
            total[one] += text_rows

    if inner and module in BY_ROWS:
        image, text_rows = module.neighborhood_patch_attention(
            query, key, value, grid=(last - first, width), text=tuple(text), rope=turned(range(first, last)),
            rows=(inner[0].start - first, inner[-1].stop - first), spared=EXCHANGING, **options,
        )  # fmt: skip
        total += text_rows.float() * len(inner)
    else:
        for patch in inner:
            seen = _tokens(range(patch.window, patch.window + window[0]), first, width)
            run(patch, key[:, seen], value[:, seen])
    for patch, (keys, values) in zip(outer, wait(), strict=True):
        run(patch, keys, values)
    return image, edge_rows, total / ceil(grid[0] / side)


BY_ROWS = (fused, hopper)  # backends that run some rows of patches of a grid


def _row_of_patches(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Pair:
    """The row of patches at the top of a grid as high as the window; what follows them in the output is padding."""
    (height, width), side = options["grid"], options["window"][0] // 2
    rows = {"rows": (0, side)} if module in BY_ROWS else {}
    missing = (side if rows else height) * width - query.shape[1]
    query = pad(query, (0, 0, 0, 0, 0, missing)) if missing else query
    image, text = module.neighborhood_patch_attention(query, key, value, **options, **rows)
    return image, text
