"""The seam score: gradient energy on the borders of attention's patches against that of other token borders."""

from dataclasses import dataclass

import numpy as np
from hires_kernels.geometry import patches
from numpy.typing import NDArray
from torch import Tensor

from hires.sizes import patch_side, scaled_window

# Pixels a side of a token of the finest windowed layer: FLUX packs 2×2 latents, SDXL attends from level 1 on.
TOKEN = 16


@dataclass(frozen=True)
class Borders:
    """Where patches, and where tokens meet, in pixels: the first row, or column, behind each border."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    token: int = TOKEN


def patch_borders(size: tuple[int, int], base: tuple[int, int], scale: float = 1.0, overlap: float = 0.5) -> Borders:
    """Borders of NPA's query patches in the finest windowed layer; sizes (height, width) in pixels.

    `base`: the size whose token grid is the window at `scale` 1; `overlap`: of neighbouring windows.
    """

    def axis(length: int, side: int) -> tuple[int, ...]:
        grid = length // TOKEN
        window = scaled_window(side // TOKEN, grid, scale)
        cut = [] if window >= grid else patches(grid, window, side=patch_side(window, overlap))
        return tuple(TOKEN * patch.start for patch in cut[1:])

    return Borders(axis(size[0], base[0]), axis(size[1], base[1]))


def seams(row_steps: Tensor, column_steps: Tensor, borders: Borders) -> NDArray[np.float64] | None:
    """log₁₀ of the gradient energy on patch borders over that on other token borders, one number per image (n,).

    0: borders look like any other place; .3: twice the energy. Other token borders, not all other lines, are what
    patch borders are compared with, as a decoder may leave the grid of latents in every image. Steps: (n, H − 1) and
    (n, W − 1) of `pixels.line_steps`. None where there are no patches, or no other token borders.
    """
    sums = np.zeros((2, len(row_steps)))
    lines = np.zeros((2, 1))
    for steps, found, across in (
        (row_steps, borders.rows, column_steps.shape[1] + 1),
        (column_steps, borders.columns, row_steps.shape[1] + 1),
    ):
        tokens = range(borders.token, steps.shape[1] + 1, borders.token)
        for kind, places in enumerate((found, [place for place in tokens if place not in found])):
            sums[kind] += across * steps[:, [place - 1 for place in places]].double().sum(1).numpy()
            lines[kind] += across * len(places)
    return np.log10(sums[0] / lines[0]) - np.log10(sums[1] / lines[1]) if lines.all() else None
