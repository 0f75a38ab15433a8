"""Lattice noise with exact integer hashes and analytic slopes, faded out at the pixel size.

Everything here broadcasts: coordinates may be (n, height, width) grids or flat lists of pixels. A `pixel`
is the side of a pixel in the units of the coordinates; nothing smaller than it is drawn, so a picture is
free of aliasing and each doubling of its size adds an octave.
"""

from math import cos, sin

import torch
from torch import Tensor

OCTAVES = 18  # a cell of 1/4 is 2⁻²⁰ after 18 octaves, far below a pixel of 4096² at zoom 8


def lattice(ix: Tensor, iy: Tensor, seed: Tensor | int) -> Tensor:
    """A hash of int32 lattice points, uniform in [-1, 1); int32 wraps alike on CPU and GPU."""
    h = ix * 668265263
    h = h ^ (iy * 374761393)
    h = h ^ seed
    return _finish(h)


def _finish(h: Tensor) -> Tensor:
    h = h ^ (h >> 15)
    h.mul_(739982445)
    h.bitwise_xor_(h >> 12)
    h.mul_(695872825)
    return h.to(torch.float32).mul_(2.0**-31)


def value_noise(x: Tensor, y: Tensor, seed: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth noise in [-1, 1) on the unit lattice and its slopes (value, d/dx, d/dy)."""
    fx, fy = x.floor(), y.floor()
    hx, hy = fx.to(torch.int32) * 668265263, (fy.to(torch.int32) * 374761393) ^ seed
    hx1, hy1 = hx + 668265263, ((fy.to(torch.int32) + 1) * 374761393) ^ seed
    fx, fy = x - fx, y - fy
    a, b, c, d = _finish(hx ^ hy), _finish(hx1 ^ hy), _finish(hx ^ hy1), _finish(hx1 ^ hy1)
    u, v = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    b.sub_(a)
    d.sub_(c).sub_(b)
    c.sub_(a)
    across = torch.addcmul(b, d, v)
    down = torch.addcmul(c, d, u)
    value = torch.addcmul(torch.addcmul(a, across, u), c, v)
    return value, across.mul_(fx * (1 - fx)).mul_(6), down.mul_(fy * (1 - fy)).mul_(6)


def fade(cell: float, pixel: Tensor) -> Tensor:
    """How much of a structure of this cell size is drawn: none below one pixel, all from two on."""
    return (cell / pixel - 1).clamp(0, 1)


def fbm(
    x: Tensor,
    y: Tensor,
    seed: Tensor,
    pixel: Tensor,
    cell: float,
    gain: float = 0.5,
    octaves: int = OCTAVES,
    turn: float = 0.6,
    finest: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fractal noise: octave k has cells of cell · 2⁻ᵏ and amplitude gainᵏ, turned by k · turn radians.

    `finest` is the smallest pixel among `pixel` (found if not given). Returns value and slopes.
    """
    finest = float(pixel.min()) if finest is None else finest
    value, slope_x, slope_y = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for k in range(octaves):
        size = cell * 2.0**-k
        if k and size <= finest:
            break
        weight = fade(size, pixel) * gain**k
        c, s = cos(k * turn) / size, sin(k * turn) / size
        noise, dx, dy = value_noise(c * x - s * y, s * x + c * y, seed + k * 1013904223 % 2**31)
        value = torch.addcmul(value, noise, weight)
        slope_x = torch.addcmul(slope_x, c * dx + s * dy, weight)
        slope_y = torch.addcmul(slope_y, c * dy - s * dx, weight)
    return value, slope_x, slope_y


def smoothstep(low: float, high: float, x: Tensor) -> Tensor:
    """0 below `low`, 1 above `high`, smooth between."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)
