"""What backgrounds and materials look like: colour, relief and gloss at a point, at any pixel size.

Each function takes coordinates in its own frame (scene units for backgrounds, radii for materials), the
pixel's side in them, an int32 seed, and the smallest of the pixels.
"""

from collections.abc import Callable
from math import cos, pi, sin, tau
from typing import NamedTuple

import torch
from torch import Tensor

from hires.scenes.noise import fade, fbm, lattice, smoothstep, value_noise


class Surface(NamedTuple):
    """A mix of three colours (`second` and `accent` are shares over the main one), brightness, relief, gloss."""

    second: Tensor | float
    accent: Tensor | float
    value: Tensor | float
    slope_x: Tensor
    slope_y: Tensor
    gloss: Tensor | float


Painter = Callable[[Tensor, Tensor, Tensor, Tensor, float], Surface]


def _step(low: float, high: float, x: Tensor, pixel: Tensor) -> Tensor:
    """A linear ramp from 0 at `low` to 1 at `high`, widened by a pixel."""
    return ((x - low + 0.5 * pixel) / (high - low + pixel)).clamp(0, 1)


def _cells(x: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Index (int32) of the cell that holds x and the signed distance from the cell's middle."""
    index = (x / size).floor()
    return index.to(torch.int32), x - (index + 0.5) * size


def _specks(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Scattered round grains, one cell in ten bright and one in ten dark: their coverages."""
    (column, u), (row, v) = _cells(x, size), _cells(y, size)
    du = u - 0.2 * size * lattice(column, row, seed)
    dv = v - 0.2 * size * lattice(column, row, seed + 1)
    radius = (0.28 * size - (du * du + dv * dv).sqrt()) / (0.12 * size + pixel)
    cover, kind = (radius + 0.5).clamp(0, 1) * fade(size, pixel), lattice(column, row, seed + 2)
    return cover * (kind > 0.8), cover * (kind < -0.8)


def brick(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    width, height = 0.27, 0.118
    rough, rx, ry = fbm(x, y, seed, pixel, 0.10, 0.55, finest=finest)
    row, v = _cells(y + 0.003 * rough, height)
    column, u = _cells(x + 0.003 * rough + 0.5 * width * (row & 1) + 0.04 * lattice(row, row, seed), width)
    tone, kiln = lattice(column, row, seed + 11), lattice(column, row, seed + 12)
    edge_x, edge_y = 0.5 * width - u.abs(), 0.5 * height - v.abs()
    edge = torch.minimum(edge_x, edge_y)
    mortar = 1 - _step(0.005, 0.009, edge, pixel)
    bevel = (1 - edge / 0.022).clamp(0, 1) * (1 - mortar) * 0.9
    beside = edge_x < edge_y
    pits = smoothstep(0.45, 0.9, rough)
    relief = 0.0085 + 0.006 * mortar
    return Surface(
        (0.45 + 0.55 * kiln + 0.25 * rough).clamp(0, 1) * (1 - mortar),
        mortar,
        (1 + 0.13 * tone + 0.10 * rough - 0.22 * pits) * (1 - 0.28 * smoothstep(0.012, 0.004, edge)),
        relief * rx + torch.where(beside, -u.sign() * bevel, 0.0),
        relief * ry + torch.where(beside, 0.0, -v.sign() * bevel),
        0.0,
    )


def sand(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    dune, dx, dy = fbm(x, y, seed, pixel, 0.42, 0.45, 3, finest=finest)
    wave = 0.062
    phase = (y + 0.25 * x + 0.045 * dune) * (tau / wave)
    ripple, slope = phase.sin(), phase.cos()
    slope = 0.30 * (slope + 0.45 * (2 * phase).cos()) * (0.65 + 0.45 * dune) * fade(wave / 2, pixel)
    patch, _, _ = fbm(x, y, seed + 3, pixel, 0.05, 0.6, 4, finest=finest)
    grain, gx, gy = fbm(x, y, seed + 5, pixel, 0.0075, 0.72, finest=finest)
    bright, dark = _specks(x, y, pixel, seed + 6, 0.0042)
    return Surface(
        (0.42 - 0.20 * ripple + 0.20 * dune + 0.10 * patch + 0.22 * grain).clamp(0, 1),
        0.7 * bright,
        1 + 0.06 * dune + 0.05 * patch + 0.08 * grain - 0.3 * dark,
        slope * (0.25 + 0.045 * dx) + 0.04 * dx + 0.0008 * gx,
        slope * (1 + 0.045 * dy) + 0.04 * dy + 0.0008 * gy,
        0.0,
    )


def grass(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    clump, cx, cy = fbm(x, y, seed, pixel, 0.22, 0.5, 4, finest=finest)
    top: list[Tensor] = []
    for layer, angle in enumerate((-0.42, 0.38, 0.04)):
        c, s = cos(angle), sin(angle)
        across, along = (c * x + s * y) + 0.020 * clump, c * y - s * x + 0.02 * layer
        blade, bx, by = fbm(across, along * 0.15, seed + 3 + layer, pixel, 0.013, 0.55, turn=0, finest=finest)
        rank, _, _ = value_noise(across / 0.022, along / 0.10, seed + 9 + layer)
        slopes = (c * bx - s * by * 0.15, s * bx + c * by * 0.15)
        fields = [0.55 * blade + 0.8 * rank + 0.10 * layer, blade, *slopes]
        if top:
            above = fields[0] > top[0]
            fields = [torch.where(above, new, old) for new, old in zip(fields, top)]
        top = fields
    height, blade, sx, sy = top
    depth = smoothstep(1.0, -0.15, height)
    return Surface(
        (0.85 * depth + 0.15 - 0.2 * clump).clamp(0, 1),
        0.75 * smoothstep(0.75, 1.45, height + 0.25 * clump),
        1 + 0.12 * clump + 0.14 * blade,
        0.0042 * sx + 0.03 * cx,
        0.0042 * sy + 0.03 * cy,
        0.05,
    )


def _grain(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wood along x: year rings in [-1, 1], fibres, and the fibres' slopes; a board is about 1 wide."""
    warp, _, _ = fbm(x * 0.55, y * 1.4, seed, pixel, 1.0, 0.45, 3, turn=0, finest=finest)
    rings = ((y * 3.1 + 0.85 * warp) * tau).sin() * fade(0.16, pixel)
    fibre, fx, fy = fbm(x * 0.06, y, seed + 7, pixel, 0.11, 0.66, turn=0, finest=finest)
    return rings, fibre, fx * 0.06, fy


def planks(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    width, length = 0.176, 1.1
    row, v = _cells(y, width)
    column, u = _cells(x + length * lattice(row, row, seed + 1), length)
    tone = lattice(column, row, seed + 2)
    own = seed + row * 7919 + column * 104729
    rings, fibre, fx, fy = _grain(u / width, v / width + 0.6 * tone, pixel / width, own, finest / width)
    edge = torch.minimum(0.5 * width - v.abs(), 0.5 * length - u.abs())
    gap = 1 - _step(0.0014, 0.0034, edge, pixel)
    bevel = (1 - edge / 0.009).clamp(0, 1) * (1 - gap) * 0.8
    return Surface(
        (0.40 + 0.34 * rings + 0.26 * fibre).clamp(0, 1),
        0.85 * gap,
        (1 + 0.14 * tone + 0.08 * fibre) * (1 - 0.22 * smoothstep(0.014, 0.002, edge)),
        0.012 * fx,
        0.012 * fy - v.sign() * bevel,
        0.06,
    )


def water(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    swell, sx, sy = fbm(x, y * 1.3, seed, pixel, 0.40, 0.5, 3, finest=finest)
    bend, _, _ = fbm(x, y, seed + 1, pixel, 0.16, 0.5, 3, finest=finest)
    # light gathers along the zero lines of two drifting waves
    u, v = x + 0.055 * bend + 0.05 * swell, y * 1.45 - 0.055 * bend
    wave, wx, wy = fbm(u, v, seed + 3, pixel * 1.45, 0.125, 0.30, 3, finest=1.45 * finest)
    chop, cx, cy = fbm(u - 0.3 * v, v + 0.2 * u, seed + 4, pixel * 1.6, 0.070, 0.36, finest=1.6 * finest)
    line, thin = (1 - 3.2 * wave.abs()).clamp(0, 1), (1 - 3.4 * chop.abs()).clamp(0, 1)
    caustic = line * line * (0.45 + 0.55 * thin) + 0.35 * thin * thin * thin
    ring, rx, ry = fbm(u, v, seed + 6, pixel * 1.45, 0.024, 0.62, finest=1.45 * finest)
    return Surface(
        (0.52 - 0.45 * swell - 0.22 * wave - 0.12 * chop).clamp(0, 1),
        (0.62 * caustic * (0.8 + 0.4 * swell + 0.30 * ring)).clamp(0, 0.75),
        1 + 0.05 * swell + 0.05 * ring,
        0.012 * sx + 0.011 * wx + 0.0045 * cx + 0.0008 * rx,
        0.016 * sy + 0.016 * wy + 0.0070 * cy + 0.0012 * ry,
        0.32,
    )


def snow(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    drift, dx, dy = fbm(x, y * 1.25, seed, pixel, 0.36, 0.36, 5, finest=finest)
    crust, kx, ky = fbm(x, y, seed + 4, pixel, 0.020, 0.66, finest=finest)
    glint, _ = _specks(x, y, pixel, seed + 8, 0.004)
    hollow = smoothstep(0.35, -1.0, drift + 0.12 * crust)
    return Surface(
        0.85 * hollow + 0.05,
        0.7 * glint,
        0.97 + 0.02 * crust,
        0.072 * dx + 0.0010 * kx,
        0.090 * dy + 0.0010 * ky,
        0.10,
    )


def wooden(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    rings, fibre, fx, fy = _grain(x * 0.9, y * 0.9, pixel * 0.9, seed, finest * 0.9)
    pores = smoothstep(0.65, 1.25, fibre)
    return Surface(
        (0.45 + 0.50 * rings + 0.24 * fibre).clamp(0, 1),
        0.55 * pores,
        1 + 0.06 * fibre,
        0.015 * fx,
        0.015 * fy,
        0.10,
    )


def knitted(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    wide, tall, lean = 0.40, 0.20, 1.15
    wobble, _, _ = value_noise(x * 2.5, y * 2.5, seed)
    _, u = _cells(x + 0.02 * wobble, wide)
    side = u.sign()
    arm = u.abs() - 0.25 * wide  # across one arm of the V
    _, v = _cells(y + 0.02 * wobble + lean * u.abs(), tall)
    visible = fade(0.08, pixel)
    # each arm is a cushion: full along its middle, falling off to the next arm and the next row
    a, b = (0.25 * wide - arm.abs()) / (0.22 * wide), (0.5 * tall - v.abs()) / (0.36 * tall)
    fall_a, fall_b = (1 - a).clamp(0, 1), (1 - b).clamp(0, 1)
    cushion = (1 - fall_a * fall_a) * (1 - fall_b * fall_b)
    thread = ((v - 0.9 * arm) * (tau / 0.067)).sin() * fade(0.033, pixel)
    fuzz, fx, fy = fbm(x, y, seed + 2, pixel, 0.05, 0.7, finest=finest)
    across = -0.75 * arm.sign() * fall_a * visible
    along = -0.85 * v.sign() * fall_b * visible + 0.16 * thread
    return Surface(
        visible * smoothstep(0.75, 0.05, cushion) + 0.10 * (1 - visible),
        visible * (0.30 * smoothstep(0.6, 1.0, cushion)),
        1 + 0.07 * thread * cushion + 0.06 * fuzz,
        side * (across + lean * along) + 0.005 * fx,
        along + 0.005 * fy,
        0.0,
    )


def dotted(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    step = 0.46
    row, v = _cells(y + 0.23, step * 0.866)
    _, u = _cells(x + 0.5 * step * (row & 1) + 0.23, step)
    distance = (u * u + v * v).sqrt()
    dot = (1 - _step(0.130, 0.150, distance, pixel)) * fade(0.12, pixel)
    dome = dot * smoothstep(0.0, 0.14, distance) * 0.75 / distance.clamp_min(1e-3)
    weave = 0.028
    cloth = fade(weave, pixel)
    warp, weft = (x * (pi / weave)).sin() * cloth, (y * (pi / weave)).sin() * cloth
    fuzz, fx, fy = fbm(x, y, seed, pixel, 0.16, 0.6, finest=finest)
    return Surface(
        0.20 * (0.5 - 0.5 * warp * weft) * (1 - dot) + 0.10,
        dot,
        1 + 0.05 * fuzz + 0.10 * warp * weft * (1 - dot),
        dome * u + 0.005 * fx + 0.25 * (1 - dot) * warp,
        dome * v + 0.005 * fy + 0.25 * (1 - dot) * weft,
        0.12 * dot,
    )


def striped(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    step = 0.50
    fuzz, fx, fy = fbm(x, y, seed, pixel, 0.30, 0.55, finest=finest)
    _, u = _cells(x + 0.008 * fuzz, step)
    dark = (1 - _step(0.115, 0.135, u.abs(), pixel)) * fade(0.12, pixel)
    cord = 0.0625
    ribs = (u * (tau / cord)).cos() * fade(cord / 2, pixel)
    lean = -(u * (tau / cord)).sin() * fade(cord / 2, pixel)
    twist = ((y + 0.9 * u.abs()) * (tau / 0.03)).sin() * fade(0.015, pixel)
    return Surface(
        dark,
        0.12 * (1 - dark) * (0.5 + 0.5 * ribs),
        1 + 0.07 * ribs + 0.05 * twist + 0.05 * fuzz,
        0.36 * lean + 0.012 * fx,
        0.012 * fy + 0.06 * twist,
        0.06,
    )


def metal(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    size = 0.36
    cx, cy = (x / size).floor(), (y / size).floor()
    best = torch.full_like(x, 9.0)
    second = best
    to_x, to_y = torch.zeros_like(x), torch.zeros_like(x)
    for j in (-1, 0, 1):
        for i in (-1, 0, 1):
            gx, gy = cx + i, cy + j
            ix, iy = gx.to(torch.int32), gy.to(torch.int32)
            px = (gx + 0.5 + 0.32 * lattice(ix, iy, seed)) * size - x
            py = (gy + 0.5 + 0.32 * lattice(ix, iy, seed + 1)) * size - y
            distance = px * px + py * py
            nearer = distance < best
            second = torch.where(nearer, best, torch.minimum(second, distance))
            best = torch.where(nearer, distance, best)
            to_x, to_y = torch.where(nearer, px, to_x), torch.where(nearer, py, to_y)
    ridge = (second.sqrt() - best.sqrt()) / size
    scratch, sx, sy = fbm(x * 0.05, y, seed + 4, pixel, 0.045, 0.62, turn=0, finest=finest)
    dent = fade(0.15, pixel) * 2.2
    return Surface(
        0.35 * smoothstep(0.25, 0.0, ridge) + 0.10 + 0.10 * scratch,
        0.10 + 0.25 * smoothstep(0.45, 0.9, ridge),
        1 + 0.05 * scratch,
        -dent * to_x + 0.0001 * sx,
        -dent * to_y + 0.0020 * sy,
        0.75,
    )


def marble(x: Tensor, y: Tensor, pixel: Tensor, seed: Tensor, finest: float) -> Surface:
    cloud, _, _ = fbm(x, y, seed, pixel, 0.9, 0.5, 5, finest=finest)
    vein, _, _ = fbm(x + 0.30 * cloud, y - 0.30 * cloud, seed + 3, pixel, 0.75, 0.52, finest=finest)
    thin, tx, ty = fbm(x - 0.12 * cloud, y + 0.1 * cloud, seed + 6, pixel, 0.22, 0.6, finest=finest)
    wide, narrow = 0.16 + 1.5 * pixel, 0.10 + 3 * pixel
    broad = (1 - vein.abs() / wide).clamp(0, 1) * (0.16 / wide)
    fine = (1 - thin.abs() / narrow).clamp(0, 1) * (0.10 / narrow)
    return Surface(
        (0.45 - 0.55 * cloud + 0.10 * thin).clamp(0, 1),
        (1.0 * broad * broad + 0.40 * fine * fine * (0.5 + 0.5 * cloud).clamp(0, 1)).clamp(0, 1),
        1 + 0.03 * thin,
        0.002 * tx,
        0.002 * ty,
        0.45,
    )


GROUNDS: dict[str, Painter] = {
    "brick": brick,
    "sand": sand,
    "grass": grass,
    "planks": planks,
    "water": water,
    "snow": snow,
}
FINISHES: dict[str, Painter] = {
    "wooden": wooden,
    "knitted": knitted,
    "dotted": dotted,
    "striped": striped,
    "metal": metal,
    "marble": marble,
}
# (second, accent) colour of a material: the object's colour times a brightness, then a share of white.
SHADES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "wooden": ((0.62, 0.0), (0.35, 0.0)),
    "knitted": ((0.48, 0.0), (1.0, 0.22)),
    "dotted": ((0.50, 0.0), (1.0, 0.34)),
    "striped": ((0.46, 0.0), (1.0, 0.20)),
    "metal": ((0.52, 0.0), (1.0, 0.12)),
    "marble": ((0.60, 0.0), (1.0, 0.50)),
}
