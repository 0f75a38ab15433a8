"""Scenes to pixels, vectorised over images: distances to shapes, surfaces, light and shadow."""

from collections.abc import Sequence
from math import cos, pi, sin, sqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hires.errors import HiresError
from hires.scenes.noise import smoothstep
from hires.scenes.surfaces import FINISHES, GROUNDS, SHADES, Surface
from hires.scenes.world import COLOURS, PALETTES, WHOLE, Camera, Object, Scene, scene

PIXELS_PER_PASS = {"cpu": 2**18, "cuda": 2**24}
AMBIENT = 0.44  # share of the light that has no direction
SHININESS = 32

# Family, then: round = (radius of the middle line, half width), polygon = (corners, inner radius, scale)
OUTLINES: dict[str, tuple[int, float, float, float]] = {
    "disc": (0, 0.0, 1.0, 1.0),
    "ring": (0, 0.70, 0.30, 1.0),
    "triangle": (1, 3, 0.5, 1.10),
    "square": (1, 4, sqrt(0.5), 1.10),
    "star": (1, 5, 0.47, 1.10),
    "cross": (2, 0.34, 0.98, 1.0),
}


def _round(x: Tensor, y: Tensor, p: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    length = (x * x + y * y).sqrt().clamp_min(1e-6)
    side = torch.where(length < p, -1.0, 1.0) / length
    return (length - p).abs() - q, x * side, y * side


def _polygon(x: Tensor, y: Tensor, p: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A regular polygon or star with a corner upwards, folded into half of one of its corners."""
    half = pi / p
    angle = torch.atan2(x, -y)
    corner = (angle / (2 * half)).round() * (2 * half)
    c, s = corner.cos(), corner.sin()
    along, across = s * x - c * y, c * x + s * y
    nx, ny = q * half.sin(), scale - q * scale * half.cos()  # edge from (scale, 0) to the inner corner
    nx = nx * scale
    norm = (nx * nx + ny * ny).sqrt()
    nx, ny = nx / norm, ny / norm
    side = across.sign()
    distance = (along - scale) * nx + across.abs() * ny
    return distance, s * nx + c * side * ny, s * side * ny - c * nx


def _cross(x: Tensor, y: Tensor, p: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ax, ay = x.abs(), y.abs()
    lying = torch.maximum(ax - q, ay - p)
    standing = torch.maximum(ax - p, ay - q)
    distance = torch.minimum(lying, standing)
    along_x = (distance == ax - p) | (distance == ax - q)
    return distance, torch.where(along_x, x.sign(), 0.0), torch.where(along_x, 0.0, y.sign())


FAMILIES = (_round, _polygon, _cross)


class _Tables:
    """The numbers of a batch of scenes as tensors: one row per image, one per object.

    Objects are sorted by outline family, so that each family is a slice.
    """

    def __init__(self, scenes: Sequence[Scene], pixels: list[float], aspect: float, device: torch.device) -> None:
        wide, tall = sqrt(aspect), 1 / sqrt(aspect)
        short = min(wide, tall)

        def table(rows: list, columns: int) -> Tensor:
            return torch.tensor(rows, dtype=torch.float32, device=device).reshape(-1, columns)

        def seeds(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.images = table([_image_row(s) for s in scenes], 15)
        self.image_seeds = seeds([s.seed for s in scenes])
        owned = [(i, o) for i, s in enumerate(scenes) for o in s.objects]
        owned.sort(key=lambda pair: OUTLINES[pair[1].shape][0])
        self.families = [sum(OUTLINES[o.shape][0] == f for _, o in owned) for f in range(len(FAMILIES))]
        self.owners = torch.tensor([i for i, _ in owned], dtype=torch.int64, device=device)
        self.objects = table([_object_row(o, wide, tall) for _, o in owned], 17)
        self.object_seeds = seeds([o.seed for _, o in owned])

        # the k-th objects of those images that have as many
        places: list[list[tuple[int, int]]] = []
        seen = [0] * len(scenes)
        for row, (image, _) in enumerate(owned):
            if seen[image] == len(places):
                places.append([])
            places[seen[image]].append((image, row))
            seen[image] += 1
        self.slots = [torch.tensor(place, device=device).unbind(1) for place in places]

        # members of each kind, and the smallest pixel among them in the units of their surface
        self.grounds: dict[str, tuple[Tensor, float]] = {}
        for name in {s.background for s in scenes}:
            members = [i for i, s in enumerate(scenes) if s.background == name]
            finest = min(pixels[i] / scenes[i].scale for i in members)
            self.grounds[name] = torch.tensor(members, device=device), finest
        self.finishes: dict[str, tuple[Tensor, float]] = {}
        for name in {o.material for _, o in owned}:
            members = [k for k, (_, o) in enumerate(owned) if o.material == name]
            finest = min(pixels[owned[k][0]] / (owned[k][1].radius * short) for k in members)
            self.finishes[name] = torch.tensor(members, device=device), finest


def _image_row(scene: Scene) -> tuple[float, ...]:
    flat = cos(scene.elevation)
    return (
        scene.scale,
        cos(scene.turn),
        sin(scene.turn),
        cos(scene.light) * flat,
        sin(scene.light) * flat,
        sin(scene.elevation),
        *(value for colour in PALETTES[scene.background][scene.palette] for value in colour),
    )


def _object_row(item: Object, wide: float, tall: float) -> tuple[float, ...]:
    rgb = COLOURS[item.colour]
    (dark, dark_white), (light, light_white) = SHADES[item.material]
    return (
        item.x * wide,
        item.y * tall,
        item.radius * min(wide, tall),
        cos(item.angle),
        sin(item.angle),
        *OUTLINES[item.shape][1:],
        *rgb,
        *(v * dark + (1 - v * dark) * dark_white for v in rgb),
        *(v * light + (1 - v * light) * light_white for v in rgb),
    )


def _colour(surface: Surface, palette: Sequence[Tensor]) -> Tensor:
    """(3, ...) colour of a surface from the nine numbers of its palette."""
    second, accent = surface.second, surface.accent
    channels = []
    for main, other, top in zip(palette[0:3], palette[3:6], palette[6:9]):
        channel = main + (other - main) * second
        channels.append((channel + (top - channel) * accent) * surface.value)
    return torch.stack(channels)


def _lit(colour: Tensor, slope_x: Tensor, slope_y: Tensor, gloss: Tensor | float, light: Sequence[Tensor]) -> Tensor:
    """Diffuse and glossy light from direction `light` on a relief with these slopes; flat ground stays as is."""
    lx, ly, lz = light
    upright = (slope_x * slope_x + slope_y * slope_y + 1).rsqrt()
    facing = ((lz - slope_x * lx - slope_y * ly) * upright).clamp_min(0)
    middle = 1 / (2 + 2 * lz).sqrt()
    mirror = ((lz + 1 - slope_x * lx - slope_y * ly) * upright * middle).clamp_min(0)
    for _ in range(SHININESS.bit_length() - 1):
        mirror = mirror * mirror
    return colour * (AMBIENT + (1 - AMBIENT) * facing / lz) + 0.6 * gloss * mirror


def _ground(tables: _Tables, x: Tensor, y: Tensor, pixel: Tensor) -> Tensor:
    """(3, n, height, width): the lit background, without shadows."""
    n, height, width = x.shape[0], y.shape[1], x.shape[2]
    out = x.new_empty(3, n, height, width)
    for name, (rows, finest) in tables.grounds.items():
        p = [v[:, None, None] for v in tables.images[rows].unbind(1)]
        scale, c, s = p[0], p[1], p[2]
        gx, gy = x[rows], y[rows]
        side = pixel[rows] / scale
        surface = GROUNDS[name](
            (c * gx + s * gy) / scale,
            (c * gy - s * gx) / scale,
            side,
            tables.image_seeds[rows][:, None, None],
            finest,
        )
        sx, sy = surface.slope_x, surface.slope_y
        lit = _lit(_colour(surface, p[6:15]), c * sx - s * sy, s * sx + c * sy, surface.gloss, p[3:6])
        out[:, rows] = lit
    return out


def _distances(tables: _Tables, x: Tensor, y: Tensor) -> Tensor:
    """(objects, height, width): signed distance of each object's outline at its own (x, y), scene units."""
    parts, start = [], 0
    for family, count in zip(FAMILIES, tables.families):
        rows = slice(start, start + count)
        start += count
        cx, cy, r, c, s, a, b, scale = (v[:, None, None] for v in tables.objects[rows, :8].unbind(1))
        dx, dy = (x[rows] - cx) / r, (y[rows] - cy) / r
        parts.append(family(c * dx + s * dy, c * dy - s * dx, a, b, scale)[0] * r)
    return torch.cat(parts)


def _paint_objects(canvas: Tensor, tables: _Tables, distance: Tensor, x: Tensor, y: Tensor, pixel: Tensor) -> None:
    """Every object over `canvas` (3, n, height, width), touching only the pixels that it covers."""
    starts = np.cumsum([0, *tables.families])
    for name, (rows, finest) in tables.finishes.items():
        owner = tables.owners[rows]
        inside = distance[rows] < 0.5 * pixel[owner]
        which, i, j = inside.nonzero(as_tuple=True)
        if len(which) == 0:
            continue
        row, image = rows[which], owner[which]
        p = tables.objects[row].unbind(1)
        radius, c, s = p[2], p[3], p[4]
        light = [v for v in tables.images[:, 3:6][image].unbind(1)]
        dx, dy = (x[image, 0, j] - p[0]) / radius, (y[image, i, 0] - p[1]) / radius
        qx, qy = c * dx + s * dy, c * dy - s * dx
        side = pixel[image, 0, 0] / radius
        surface = FINISHES[name](qx, qy, side, tables.object_seeds[row], finest)

        shapes = [family(qx, qy, p[5], p[6], p[7]) for family in FAMILIES]
        d, nx, ny = shapes[0]
        for k in (1, 2):
            member = (row >= int(starts[k])) & (row < int(starts[k + 1]))
            d, nx, ny = (torch.where(member, new, old) for new, old in zip(shapes[k], (d, nx, ny)))
        depth = -d
        bevel = (1 - depth / 0.20).clamp(0, 1)
        bevel = 1.25 * bevel * bevel
        sx, sy = surface.slope_x + bevel * nx + 0.16 * qx, surface.slope_y + bevel * ny + 0.16 * qy
        rim = 0.72 + 0.28 * smoothstep(-0.01, 0.09, depth)
        colour = _colour(surface, p[8:17]) * rim
        lit = _lit(colour, c * sx - s * sy, s * sx + c * sy, surface.gloss, light).clamp(0, 1)
        cover = (0.5 - d / side).clamp(0, 1)
        below = canvas[:, image, i, j]
        canvas[:, image, i, j] = below + (lit - below) * cover


def _pass(tables: _Tables, x: Tensor, y: Tensor, pixel: Tensor, unit: tuple[float, float]) -> Tensor:
    """One band of every image: (n, 3, rows, width)."""
    lx, ly, lz = (v[:, None, None] for v in tables.images[:, 3:6].unbind(1))
    canvas = _ground(tables, x, y, pixel)
    distance = _distances(tables, x[tables.owners], y[tables.owners])
    radius = tables.objects[:, 2][:, None, None]
    owner = tables.owners
    reach = (0.24 * radius + 0.008) / lz[owner]
    cast = _distances(tables, x[owner] + lx[owner] * reach, y[owner] + ly[owner] * reach)
    blur = 0.10 * radius + 0.012
    shadow = 1 - 0.52 * smoothstep(1.0, -1.0, cast / blur)
    shadow = shadow * (1 - 0.34 * smoothstep(1.0, -0.2, distance / (0.16 * radius)))
    shade = torch.ones_like(canvas[0])
    for images, objects in tables.slots:
        shade[images] *= shadow[objects]
    canvas *= shade
    _paint_objects(canvas, tables, distance, x, y, pixel)
    # the room grows darker away from the light
    falloff = 1.03 + 0.16 * (lx * (x / unit[0] - 0.5) + ly * (y / unit[1] - 0.5))
    canvas *= falloff
    return canvas.clamp_(0, 1).transpose(0, 1)


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    height: int,
    width: int,
    cameras: Sequence[Camera] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw scenes at any size: (n, 3, height, width) in [0, 1], RGB.

    Args:
        scenes: what to draw, one image each.
        height, width: in pixels. Layouts stretch with the aspect ratio, shapes and textures do not:
            objects keep their size relative to the shorter side.
        cameras: one per scene; the whole scene if not given.
        device, dtype: of the result; the maths is float32.
    """
    if height < 1 or width < 1:
        raise HiresError(f"image size {height}x{width}: height and width must be at least 1 pixel")
    cameras = [WHOLE] * len(scenes) if cameras is None else cameras
    if len(cameras) != len(scenes):
        raise HiresError(f"{len(cameras)} cameras for {len(scenes)} scenes: give one camera per scene")
    device = torch.device(device)
    out = torch.empty(len(scenes), 3, height, width, device=device, dtype=dtype)
    budget = PIXELS_PER_PASS.get(device.type, 2**20)
    count = max(1, budget // (height * width))
    rows = max(1, min(height, budget // width))
    unit = (sqrt(width / height), sqrt(height / width))
    for start in range(0, len(scenes), count):
        part, views = scenes[start : start + count], cameras[start : start + count]
        pixels = [1 / (sqrt(height * width) * view.zoom) for view in views]
        tables = _Tables(part, pixels, width / height, device)
        zoom, cx, cy = (
            torch.tensor([getattr(v, f) for v in views], dtype=torch.float64, device=device)[:, None, None]
            for f in ("zoom", "x", "y")
        )
        pixel = (1 / (sqrt(height * width) * zoom)).float()
        u = (torch.arange(width, device=device, dtype=torch.float64) + 0.5) / width - 0.5
        v = (torch.arange(height, device=device, dtype=torch.float64) + 0.5) / height - 0.5
        x = ((cx + u[None, None, :] / zoom) * unit[0]).float()
        y = ((cy + v[None, :, None] / zoom) * unit[1]).float()
        for top in range(0, height, rows):
            band = slice(top, top + rows)
            out[start : start + count, :, band] = _pass(tables, x, y[:, band], pixel, unit)
    return out


def reference_image(scene_id: int, height: int, width: int, camera: Camera = WHOLE) -> Image.Image:
    """The true picture of a scene as an 8-bit RGB image."""
    pixels = render([scene(scene_id)], height, width, [camera])[0]
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
