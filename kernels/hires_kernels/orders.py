"""Token orders of a row-major grid. Attention doesn't depend on them; the time of a kernel does."""

import torch
from torch import Tensor

from hires_kernels.geometry import Grid

ORDERS = ("hilbert", "window", "raster", "morton")


def permutation(order: str, grid: Grid, window: Grid = (1, 1)) -> Tensor:
    """Integer tensor (tokens,): the raster index of the token at each place of the order.

    `raster` is row by row, `window` goes through windows row by row and through the tokens of each likewise,
    `hilbert` and `morton` follow the curves of the smallest power-of-two square around the grid, so that every
    aligned power-of-two window is one contiguous run; on the first each token is the last one's neighbour.
    """
    height, width = grid
    row = torch.arange(height)[:, None].expand(grid).flatten()
    col = torch.arange(width)[None, :].expand(grid).flatten()
    if order == "raster":
        return torch.arange(height * width)
    if order == "window":
        across = -(-width // window[1])
        return torch.argsort(row // window[0] * across + col // window[1], stable=True)
    index = _hilbert_index if order == "hilbert" else _morton_index
    return torch.argsort(index(row, col, 1 << (max(grid) - 1).bit_length()))


def inverse(order: Tensor) -> Tensor:
    """The place of every raster index: permutation[inverse] and inverse[permutation] are both 0, 1, 2, …"""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places


def _hilbert_index(row: Tensor, col: Tensor, side: int) -> Tensor:
    """Distance along the Hilbert curve of a square of power-of-two side (Hilbert 1891), from coarse to fine."""
    index = torch.zeros_like(row)
    half = side // 2
    while half:
        down, right = (row & half).bool(), (col & half).bool()
        index += half * half * ((3 * right) ^ down.long())
        mirrored = right & ~down
        row, col = torch.where(mirrored, side - 1 - row, row), torch.where(mirrored, side - 1 - col, col)
        row, col = torch.where(down, row, col), torch.where(down, col, row)
        half //= 2
    return index


def _morton_index(row: Tensor, col: Tensor, side: int) -> Tensor:
    """The bits of row and column in turns (Morton 1966): quadrants in the order of reading, each likewise."""
    index = torch.zeros_like(row)
    bit = 1
    while bit < side:
        index += (2 * (row & bit) + (col & bit)) * bit
        bit *= 2
    return index
