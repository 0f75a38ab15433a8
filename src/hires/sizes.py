"""Which sizes a cascade passes through on its way to the target.

The base has exactly the target's aspect ratio and the area nearest to the one that the model was trained at; every
side is a multiple of `multiple` pixels; stages double, and the last one grows by any factor in (1, 2].
A base of less than half or more than twice the training area is none: such a target is refused.
"""

import re
from collections.abc import Iterator
from math import gcd, isqrt
from typing import Literal

from hires.errors import HiresError

Size = tuple[int, int]  # (height, width), in pixels where nothing else is said


def base_size(height: int, width: int, base_resolution: int, multiple: int) -> Size | None:
    """The base of a target, in pixels, or None where the size rule has none.

    With target = n·(p, q) and p, q coprime in units of `multiple`, the candidates are k·(p, q) for k = 1 … n.
    """
    if height % multiple or width % multiple or min(height, width) < multiple:
        return None
    n = gcd(height, width) // multiple
    p, q = height // n, width // n
    area = base_resolution**2
    below = isqrt(area // (p * q))
    k = min((min(max(k, 1), n) for k in (below, below + 1)), key=lambda k: abs(k * k * p * q - area))
    return (k * p, k * q) if area <= 2 * k * k * p * q <= 4 * area else None


def stage_sizes(
    height: int,
    width: int,
    base_resolution: int,
    multiple: int,
    stages: Literal["doubling", "single"] = "doubling",
) -> list[Size]:
    """Sizes (height, width) in pixels of every stage: the base first, the target last.

    A target that is its own base gives a list of one. HiresError names the two nearest sizes that are allowed.
    """
    base = base_size(height, width, base_resolution, multiple)
    if base is None:
        first, second = nearest_sizes(height, width, base_resolution, multiple)
        raise HiresError(
            f"size {height}x{width} (height x width) has no base of the same aspect near {base_resolution}x"
            f"{base_resolution} with sides in multiples of {multiple}: the nearest allowed sizes are "
            f"{first[0]}x{first[1]} and {second[0]}x{second[1]}"
        )
    sizes = [base]
    while stages == "doubling" and 2 * sizes[-1][0] < height:
        sizes.append((2 * sizes[-1][0], 2 * sizes[-1][1]))
    return sizes if sizes[-1] == (height, width) else [*sizes, (height, width)]


def nearest_sizes(height: int, width: int, base_resolution: int, multiple: int) -> tuple[Size, Size]:
    """The two allowed sizes nearest to (height, width) by Euclidean distance in pixels; HiresError where none is."""
    if multiple**2 > 2 * base_resolution**2:
        raise HiresError(
            f"no size is a multiple of {multiple} px with a base near {base_resolution}x{base_resolution}: lower "
            "size_multiple, or raise base_resolution"
        )

    def distance(size: Size) -> int:
        return (size[0] - height) ** 2 + (size[1] - width) ** 2

    for reach in (4 * multiple, 16 * multiple, 64 * multiple):
        found = [
            (h, w)
            for h in _multiples(height, reach, multiple)
            for w in _multiples(width, reach, multiple)
            if base_size(h, w, base_resolution, multiple)
        ]
        nearest = sorted(found, key=lambda size: (distance(size), size))[:2]
        if len(nearest) == 2 and distance(nearest[1]) <= reach**2:
            return nearest[0], nearest[1]
    first, second = sorted(
        _by_aspect(height, width, base_resolution, multiple), key=lambda size: (distance(size), size)
    )[:2]
    return first, second


def _by_aspect(height: int, width: int, base_resolution: int, multiple: int) -> Iterator[Size]:
    """Of every aspect ratio that has a base, the two allowed sizes nearest to (height, width)."""
    area = base_resolution**2
    most = 2 * area // multiple**2
    for p in range(1, most + 1):
        for q in range(1, most // p + 1):
            if gcd(p, q) == 1:
                least = isqrt((area - 1) // (2 * p * q * multiple**2)) + 1
                n = max((height * p + width * q) // ((p * p + q * q) * multiple), least)
                sizes = [(m * p * multiple, m * q * multiple) for m in (n, n + 1)]
                yield from (size for size in sizes if base_size(*size, base_resolution, multiple))


def _multiples(side: int, reach: int, multiple: int) -> range:
    low = max(side - reach, multiple)
    return range(low + -low % multiple, max(side, multiple) + reach + 1, multiple)


def check_multiple(height: int, width: int, multiple: int) -> None:
    """HiresError unless both sides are positive multiples of `multiple` pixels: all that a start from noise needs."""
    if height % multiple or width % multiple or min(height, width) < multiple:
        h, w = (max(round(side / multiple), 1) * multiple for side in (height, width))
        raise HiresError(
            f"size {height}x{width} (height x width): sides must be multiples of {multiple} px, for example {h}x{w}"
        )


def low_resolution_size(size: Size, ratio: float) -> Size:
    """Size of the image that guides a Scale-DiT stage, both in latent pixels; HiresError unless it has whole tokens."""
    low = size[0] / ratio, size[1] / ratio
    if any(side < 2 or side % 2 for side in low):
        raise HiresError(
            f"lr_ratio = {ratio:g}: a stage of {size[0]}x{size[1]} latent pixels would be guided by "
            f"{low[0]:g}x{low[1]:g}: sides must be even; choose another size or ratio"
        )
    return int(low[0]), int(low[1])


def parse_size(text: str) -> Size:
    """ "512" -> (512, 512), "512x768" -> (512, 768): height x width in pixels."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,5}", side) for side in sides):
        raise HiresError(f"size {text!r}: give HEIGHTxWIDTH in pixels, for example 512x768, or one side of a square")
    return int(sides[0]), int(sides[-1])


def scaled_window(base: int, grid: int, scale: float) -> int:
    """Side in tokens of an NPA window, along an axis of `grid` tokens whose base has `base`; at most the grid's."""
    return base if scale == 1 else min(grid, round(base * scale))


def patch_side(window: int, overlap: float) -> int:
    """Side in tokens of NPA's query patches, so the stride of its windows, which overlap by this share of theirs."""
    return window // 2 if overlap == 0.5 else max(1, round(window * (1 - overlap)))
