"""The world: what a scene holds, drawn from its id alone, and the cameras that look at it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log, pi, tau

import numpy as np

from hires.errors import HiresError

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.10, 0.10),
    "orange": (0.96, 0.47, 0.05),
    "yellow": (0.97, 0.81, 0.08),
    "green": (0.12, 0.60, 0.18),
    "teal": (0.04, 0.66, 0.66),
    "blue": (0.10, 0.29, 0.88),
    "purple": (0.50, 0.15, 0.76),
    "pink": (0.97, 0.26, 0.60),
}
SHAPES = ("disc", "ring", "triangle", "square", "star", "cross")
MATERIALS = ("wooden", "knitted", "dotted", "striped", "metal", "marble")
BACKGROUNDS = ("brick", "sand", "grass", "planks", "water", "snow")
SIZES = ("small", "medium", "large")

RADII = {"small": (0.088, 0.102), "medium": (0.114, 0.130), "large": (0.160, 0.195)}
REACH = 1.1  # farthest point of any shape from its centre, in radii
GAP = 0.012  # least distance of a shape from the border of its cell

# Per background: (main, second, accent) colours. Their hues are those of the objects; they are paler.
PALETTES: dict[str, tuple[tuple[tuple[float, float, float], ...], ...]] = {
    "brick": (
        ((0.62, 0.36, 0.30), (0.47, 0.27, 0.24), (0.74, 0.71, 0.66)),
        ((0.70, 0.49, 0.36), (0.58, 0.39, 0.29), (0.60, 0.57, 0.53)),
        ((0.50, 0.46, 0.53), (0.39, 0.36, 0.43), (0.68, 0.67, 0.68)),
        ((0.77, 0.70, 0.53), (0.66, 0.58, 0.42), (0.55, 0.52, 0.48)),
    ),
    "sand": (
        ((0.85, 0.73, 0.52), (0.71, 0.58, 0.39), (0.95, 0.88, 0.74)),
        ((0.82, 0.62, 0.46), (0.68, 0.49, 0.36), (0.93, 0.80, 0.68)),
        ((0.83, 0.68, 0.62), (0.69, 0.53, 0.49), (0.95, 0.86, 0.82)),
        ((0.66, 0.64, 0.60), (0.52, 0.50, 0.47), (0.84, 0.82, 0.79)),
    ),
    "grass": (
        ((0.42, 0.55, 0.30), (0.23, 0.33, 0.18), (0.60, 0.68, 0.44)),
        ((0.61, 0.59, 0.36), (0.38, 0.36, 0.21), (0.76, 0.73, 0.52)),
        ((0.34, 0.52, 0.43), (0.19, 0.32, 0.27), (0.52, 0.66, 0.58)),
    ),
    "planks": (
        ((0.55, 0.41, 0.30), (0.40, 0.29, 0.21), (0.10, 0.08, 0.07)),
        ((0.76, 0.60, 0.41), (0.60, 0.45, 0.30), (0.16, 0.11, 0.08)),
        ((0.43, 0.52, 0.62), (0.32, 0.40, 0.49), (0.10, 0.11, 0.13)),
        ((0.46, 0.57, 0.48), (0.35, 0.45, 0.38), (0.09, 0.11, 0.09)),
        ((0.72, 0.54, 0.57), (0.58, 0.42, 0.45), (0.14, 0.10, 0.11)),
    ),
    "water": (
        ((0.33, 0.48, 0.62), (0.21, 0.32, 0.43), (0.80, 0.88, 0.95)),
        ((0.32, 0.55, 0.57), (0.21, 0.38, 0.40), (0.80, 0.93, 0.92)),
        ((0.46, 0.44, 0.63), (0.31, 0.30, 0.45), (0.88, 0.86, 0.95)),
        ((0.38, 0.53, 0.42), (0.25, 0.37, 0.29), (0.84, 0.93, 0.85)),
    ),
    "snow": (
        ((0.93, 0.95, 0.98), (0.66, 0.76, 0.90), (1.00, 1.00, 1.00)),
        ((0.97, 0.93, 0.89), (0.86, 0.71, 0.64), (1.00, 0.99, 0.97)),
        ((0.95, 0.93, 0.98), (0.76, 0.69, 0.88), (1.00, 1.00, 1.00)),
    ),
}


@dataclass(frozen=True, slots=True)
class Object:
    """One flat-bottomed thing seen from above.

    `x`, `y` (centre) are fractions of the scene's width and height, `radius` of its shorter side
    (area 1), `angle` is in radians, `seed` numbers its texture.
    """

    shape: str
    colour: str
    material: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    seed: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A background, a light and 1–5 objects, back to front, that never overlap.

    `palette` indexes `PALETTES[background]`, `scale` multiplies the size of the background's structure,
    `turn` rotates it (radians), `light` is the direction the light comes from (radians, clockwise from
    the right, so always from above) and `elevation` its height over the ground (radians).
    """

    id: int
    background: str
    palette: int
    scale: float
    turn: float
    seed: int
    light: float
    elevation: float
    objects: tuple[Object, ...]


@dataclass(frozen=True, slots=True)
class Camera:
    """A view of 1 / `zoom` of the scene's width and height around (`x`, `y`), in scene coordinates."""

    zoom: float
    x: float
    y: float

    def __post_init__(self) -> None:
        half = 0.5 / self.zoom if self.zoom >= 1 else 1.0
        if not (half - 1e-6 <= self.x <= 1 - half + 1e-6 and half - 1e-6 <= self.y <= 1 - half + 1e-6):
            raise HiresError(f"{self} looks outside the scene: zoom must be ≥ 1 and x, y in [0.5/zoom, 1 - 0.5/zoom]")


WHOLE = Camera(1.0, 0.5, 0.5)


def stream_of(scene_id: int, stream: int) -> np.random.Generator:
    """One of a scene's independent streams of draws: 0 the scene, 1 its caption, 2 its data set row, 3 its
    close-up."""
    return np.random.Generator(np.random.Philox(key=np.array([scene_id, stream], dtype=np.uint64)))


def _pick(options: Sequence[str], u: float) -> str:
    return options[int(u * len(options))]


def scene(scene_id: int) -> Scene:
    """The scene with this id (0 ≤ id < 2⁶³): the same on every machine."""
    if not 0 <= scene_id < 2**63:
        raise HiresError(f"scene id {scene_id}: allowed are whole numbers from 0 to 2**63 - 1")
    draws = iter(stream_of(scene_id, 0).random(80).tolist())
    u = draws.__next__

    total = 1 + int(5 * u())
    kinds = min(total, 1 + (u() < 0.62) + (u() < 0.35))
    cuts = [0, *sorted({1 + int(u() * (total - 1)) for _ in range(kinds - 1)}), total]
    sizes = SIZES if total < 5 else SIZES[:2]
    groups: dict[tuple[str, str, str], tuple[str, int]] = {}
    for start, stop in pairwise(cuts):
        kind = (_pick(SHAPES, u()), _pick(tuple(COLOURS), u()), _pick(MATERIALS, u()))
        size = _pick(sizes, u())
        if kind not in groups:
            groups[kind] = (size, stop - start)
    total = sum(count for _, count in groups.values())

    large = any(size == "large" for size, _ in groups.values())
    grid = 2 if large or (total < 5 and u() < 0.3) else 3
    cells = [(u(), row, column) for row in range(grid) for column in range(grid)]
    cells = sorted(cells)[:total]
    order = u()
    if order < 0.4:
        cells.sort(key=lambda cell: cell[2])
    elif order < 0.7:
        cells.sort(key=lambda cell: cell[1])
    objects, cell = [], iter(cells)
    for (shape, colour, material), (size, count) in groups.items():
        low, high = RADII[size]
        for _ in range(count):
            _, row, column = next(cell)
            radius = low + (high - low) * u()
            free = 0.5 / grid - REACH * radius - GAP
            x, y = (column + 0.5) / grid + free * (2 * u() - 1), (row + 0.5) / grid + free * (2 * u() - 1)
            turn = (u() - 0.5) * (pi / 3 if shape in ("square", "cross", "triangle") else tau)
            objects.append(
                Object(shape, colour, material, size, x, y, radius, turn, int(u() * 2**31)),
            )
    background = _pick(BACKGROUNDS, u())
    return Scene(
        scene_id,
        background,
        int(u() * len(PALETTES[background])),
        scale=exp(log(0.8) + log(1.25 / 0.8) * u()),
        turn=(u() - 0.5) * 0.14,
        seed=int(u() * 2**31),
        light=pi * (1.15 + 0.7 * u()),
        elevation=pi * (0.24 + 0.06 * u()),
        objects=tuple(objects),
    )


def split(scene_id: int) -> str:
    """`"held-out"` for one id in ten (by a hash of the id), else `"train"`."""
    mixed = (scene_id + 1) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    return "held-out" if (mixed ^ mixed >> 27) % 10 == 0 else "train"


def scene_ids(name: str, n: int, start: int = 0) -> list[int]:
    """The first `n` ids from `start` on that belong to the split `name` ("train" or "held-out")."""
    if name not in ("train", "held-out"):
        raise HiresError(f"unknown split {name!r}: allowed are 'train' and 'held-out'")
    found: list[int] = []
    while len(found) < n:
        if split(start) == name:
            found.append(start)
        start += 1
    return found


def close_up(scene: Scene) -> Camera:
    """A scene's own close-up: aimed at one of its objects, zoom 2 to 4; it follows from the id."""
    return random_camera(stream_of(scene.id, 3), scene, (2.0, 4.0), close_up=True)


def random_camera(
    rng: np.random.Generator, scene: Scene, zoom: tuple[float, float] = (1.0, 8.0), close_up: bool = False
) -> Camera:
    """A camera with log-uniform `zoom` inside the scene: anywhere, or aimed at an object (`close_up`)."""
    low, high = zoom
    factor = low * (high / low) ** rng.random()
    x, y = rng.random(), rng.random()
    if close_up:
        target = scene.objects[int(rng.integers(len(scene.objects)))]
        x = target.x + target.radius * (2 * x - 1) * 0.7
        y = target.y + target.radius * (2 * y - 1) * 0.7
    half = 0.5 / factor
    return Camera(factor, min(max(x, half), 1 - half), min(max(y, half), 1 - half))
