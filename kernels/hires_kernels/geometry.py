"""Which keys a query sees, one axis at a time: every set of keys here is a product of two intervals.

Neighborhood Patch Attention follows ScaleDiff (arXiv 2510.25818, section 3.1 and appendix B.1), local and
guidance intervals Scale-DiT (arXiv 2510.16325, section 3.2).
"""

from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]


class Patch(NamedTuple):
    """Queries start:stop of one axis and the first key of their window."""

    start: int
    stop: int
    window: int


def patches(length: int, window: int, offset: int | None = None, side: int | None = None) -> list[Patch]:
    """Query patches of side window // 2 along an axis, in order; the last is shorter where the side doesn't divide.

    The window of a patch begins window // 4 before it and is moved inwards at the border, so that every query
    sees exactly `window` keys. Patches of another `side` lie in the middle of their windows. `offset` in 0 … side moves
    the patches back by as much (random shifting): the axis is padded by one patch in total, `offset` tokens of it in
    front. A patch may then hold padding only (start == stop); it has a window all the same.
    """
    margin = window // 4 if side is None else (window - side) // 2
    side = side or window // 2
    first, padded = (0, length) if offset is None else (-offset, length + side)
    starts = range(first, first + padded, side)
    return [
        Patch(
            start=min(max(start, 0), length),
            stop=min(max(start + side, 0), length),
            window=min(max(start - margin, 0), length - window),
        )
        for start in starts
    ]


class Intervals(NamedTuple):
    """For every query of an axis the half-open interval of the keys that it sees: two integer tensors (length,)."""

    low: Tensor
    high: Tensor

    def mask(self, length: int) -> Tensor:
        """Boolean (queries, length): true where a query sees a key."""
        keys = torch.arange(length)
        return (self.low[:, None] <= keys) & (keys < self.high[:, None])


def box(length: int, radius: int) -> Intervals:
    """Keys at most `radius` away from the query."""
    place = torch.arange(length)
    return Intervals((place - radius).clamp(min=0), (place + radius + 1).clamp(max=length))


def blocks(length: int, window: int) -> Intervals:
    """Keys of the query's own window in a fixed tiling; the last window is shorter where `window` doesn't divide."""
    low = torch.arange(length) // window * window
    return Intervals(low, (low + window).clamp(max=length))


def guidance(length: int, guidance_length: int, reach: int, neighbours: int) -> Intervals:
    """Low-resolution keys: the window that holds the query's place, and `neighbours` windows on either side.

    A window of `reach` high-resolution tokens is as wide as max(1, reach / s) low-resolution ones, s being
    length / guidance_length.
    """
    side = max(1, reach * guidance_length // length)
    own = torch.arange(length) * guidance_length // length // side
    low = ((own - neighbours) * side).clamp(min=0)
    return Intervals(low, ((own + neighbours + 1) * side).clamp(max=guidance_length))


Spans = tuple[Intervals, Intervals]  # rows, columns


def local_spans(grid: Grid, form: str, reach: int, guidance_grid: Grid | None, neighbours: str) -> list[Spans]:
    """What the queries of `grid` see of the image and, where there is a guidance grid, of the guidance.

    `form` is "radius" (a box of radius `reach` around the query) or "window" (a tiling of side `reach`). Guidance
    neighbours are the windows to the left and right ("row") or all eight around ("all").
    """
    height, width = grid
    if form == "window":
        spans = [(blocks(height, reach), blocks(width, reach))]
    else:
        spans = [(box(height, reach), box(width, reach))]
    if guidance_grid is not None:
        side = local_side(form, reach)
        rows = guidance(height, guidance_grid[0], side, neighbours=1 if neighbours == "all" else 0)
        spans.append((rows, guidance(width, guidance_grid[1], side, neighbours=1)))
    return spans


def local_side(form: str, reach: int) -> int:
    """Side of the windows in high-resolution tokens; a box of radius r counts as 2r."""
    return reach if form == "window" else 2 * reach
