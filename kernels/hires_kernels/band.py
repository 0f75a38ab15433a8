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
EXCHANGING = 4  # multiprocessors for NCCL's transfers alone
NCCL = {  # what makes them enough, in the environment before NCCL starts
    "NCCL_MAX_P2P_NCHANNELS": str(2 * EXCHANGING),  # of which a message of up to 64 MiB takes half
    "NCCL_CGA_CLUSTER_SIZE": "0",  # or its blocks start by fours, on neighbours, which those that are free needn't be
}


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
    Called by all processes together. Kernels leave `EXCHANGING` multiprocessors to NCCL's transfers, which should take
    no more (`NCCL`).

    Args:
        query, key, value: (batch, rows · width, heads, head_dim) of the band, query and key rotated.
        grid, window: (rows, columns) of the whole image in tokens.
        edges: the row at which each process's band begins, a multiple of window // 2, and the number of rows.
        text: (query, key, value), each (batch, text tokens, heads, head_dim), not rotated.
        rope: (cos, sin) of the rows that the band sees (`seen_rows`), each (rows · width, head_dim).

    Raises:
        KernelError: the shapes don't fit.
    """
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


class Share:
    """What a process has of an image: rows first … last − 1 of a grid, whole patches.

    Attributes:
        inner: rows of patches whose windows lie in the band, one after the other. Where the band ends inside the image
            none of these windows is moved inwards: in a grid that is the band alone they are the same.
        outer: the other rows of patches.
        low, high: first row and last + 1 of all windows.
    """

    def __init__(self, grid: Grid, window: Grid, first: int, last: int) -> None:
        self.width, self.window, self.first, self.last = grid[1], window, first, last
        own = [patch for patch in patches(grid[0], window[0]) if first <= patch.start < last]
        self.inner = [patch for patch in own if first <= patch.window and patch.window + window[0] <= last]
        self.outer = [patch for patch in own if patch not in self.inner]
        self.low, self.high = own[0].window, own[-1].window + window[0]

    def check(self, query: Tensor, rope: Sequence[Tensor]) -> None:
        """KernelError unless these have the band's rows, and those of all windows."""
        for name, found, rows in (
            ("query", query.shape[1], self.last - self.first),
            ("rope", len(rope[0]), self.high - self.low),
        ):
            if found != rows * self.width:
                raise KernelError(
                    f"{name} of {found} tokens: rows {self.first} … {self.last - 1} need {rows}x{self.width}"
                )

    def tokens(self, start: int, stop: int) -> slice:
        """Places of the rows start … stop − 1 of the grid among the band's tokens."""
        return slice((start - self.first) * self.width, (stop - self.first) * self.width)

    def held(self, patch: Patch) -> tuple[int, int]:
        """First row and last + 1 of those of a patch's window that this band holds; none if the second isn't larger."""
        return max(patch.window, self.first), min(patch.window + self.window[0], self.last)


def shares(grid: Grid, window: Grid, edges: Sequence[int]) -> list[Share]:
    return [Share(grid, window, first, last) for first, last in pairwise(edges)]


def seen_rows(height: int, window: int, first: int, last: int) -> tuple[int, int]:
    """(first, last + 1) row of the keys that the query rows first … last − 1 see, whole patches from row `first`."""
    share = Share((height, 1), (window, 1), first, last)
    return share.low, share.high


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
    check_edges(grid[0], window[0], edges)
    rank, every = dist.get_rank(), shares((grid[0], grid[1]), (window[0], window[1]), edges)
    every[rank].check(query, rope)
    problem = Problem("neighborhood_patch_attention", query.device, query.dtype, query.shape[-1])
    module = choose(backend, problem)  # refused by all processes, before one waits for another
    fetched, transfers = transfers_of(key, value, every, rank)
    works = dist.batch_isend_irecv(transfers) if transfers else []

    def wait() -> list[Pair]:
        for work in works:
            work.wait()
        return fetched

    image, later, total = attend(every[rank], query, key, value, text, rope, scale, module, wait)
    total /= ceil(grid[0] / (window[0] // 2))
    summing = dist.all_reduce(total, async_op=True)
    for place, rows in later:
        image[place] = rows
    summing.wait()
    return image, total.to(text[0].dtype)


@_band_attention.register_fake
def _(query, key, value, text, *_):
    return query.new_empty(query.shape), text[0].new_empty(text[0].shape)


def transfers_of(key: Tensor, value: Tensor, every: list[Share], rank: int) -> tuple[list[Pair], list[Any]]:
    """Keys and values that the `outer` rows of patches of a process see, and the transfers that complete them.

    Own rows are there at once, other processes' come straight to their place: sample by sample, for a sample's rows lie
    together. Both sides list what they exchange in the same order.
    """
    own, fetched, transfers = every[rank], [], []
    for other, share in enumerate(every):
        for patch in share.outer if other != rank else ():
            start, stop = own.held(patch)
            for x in (key, value) if start < stop else ():
                rows = x[:, own.tokens(start, stop)]
                transfers += [dist.P2POp(dist.isend, sample.contiguous(), other) for sample in rows]
    for patch in own.outer:
        shape = len(key), own.window[0] * own.width, *key.shape[2:]
        seen = key.new_empty(shape), value.new_empty(shape)
        for owner, share in enumerate(every):
            start, stop = share.held(patch)
            place = slice((start - patch.window) * own.width, (stop - patch.window) * own.width)
            for x, windows in zip((key, value), seen) if start < stop else ():
                if owner == rank:
                    windows[:, place] = x[:, own.tokens(start, stop)]
                else:
                    transfers += [dist.P2POp(dist.irecv, sample[place], owner) for sample in windows]
        fetched.append(seen)
    return fetched, transfers


BY_ROWS = (fused, hopper)  # backends that run some rows of patches of a grid


def attend(
    share: Share,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: Sequence[Tensor],
    rope: Sequence[Tensor],
    scale: float,
    module: ModuleType,
    wait: Callable[[], list[Pair]],
) -> tuple[Tensor, list[tuple[Any, Tensor]], Tensor]:
    """What one process computes: image rows, then others with their places among these, and text.

    The text is a sum over rows of patches, float32, of the means over each. `wait` gives the keys and values that the
    `outer` rows of patches see; it is called when all others are queued.
    """
    options: dict[str, Any] = {"window": share.window, "shift": None, "text_rows": "patch", "scale": scale}
    total = torch.zeros(text[0].shape, dtype=torch.float32, device=query.device)
    later: list[tuple[Any, Tensor]] = []

    def turned(start: int, stop: int) -> Pair:
        cos, sin = (part[(start - share.low) * share.width : (stop - share.low) * share.width] for part in rope)
        return cos, sin

    def run(patch: Patch, keys: Tensor, values: Tensor) -> None:
        place = share.tokens(patch.start, patch.stop)
        turn = turned(patch.window, patch.window + share.window[0])
        for sample in range(len(query)):
            one = slice(sample, sample + 1)
            rows, text_rows = _row_of_patches(
                module, query[one, place], keys[one], values[one], grid=(share.window[0], share.width),
                text=tuple(x[one] for x in text), rope=turn, **options,
            )  # fmt: skip
            later.append(((one, place), rows[:, : place.stop - place.start]))
            total[one] += text_rows

    if share.inner and module in BY_ROWS:
        first, last = share.first, share.last
        image, text_rows = module.neighborhood_patch_attention(
            query, key, value, grid=(last - first, share.width), text=tuple(text), rope=turned(first, last),
            rows=(share.inner[0].start - first, share.inner[-1].stop - first), spared=EXCHANGING, **options,
        )  # fmt: skip
        total += text_rows.float() * len(share.inner)
    else:
        image = torch.empty_like(query, memory_format=torch.contiguous_format)
        for patch in share.inner:
            seen = share.tokens(patch.window, patch.window + share.window[0])
            run(patch, key[:, seen], value[:, seen])
    for patch, (keys, values) in zip(share.outer, wait(), strict=True):
        run(patch, keys, values)
    return image, later, total


def _row_of_patches(module: ModuleType, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Pair:
    """A row of patches that share their window's rows, `grid`: at its top. What follows them in the output is padding.

    The grid has no other rows for windows, so that it doesn't matter where in it the queries stand.
    """
    (height, width), side = options["grid"], options["window"][0] // 2
    rows = {"rows": (0, side)} if module in BY_ROWS else {}
    missing = (side if rows else height) * width - query.shape[1]
    query = pad(query, (0, 0, 0, 0, 0, missing)) if missing else query
    image, text = module.neighborhood_patch_attention(query, key, value, **options, **rows)
    return image, text
