"""The layers that are measured: FLUX and SDXL at three sizes, and small ones that run anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from hires_kernels import flops
from hires_kernels.geometry import Grid

from hires.errors import HiresError, unknown

# What of a layer is measured. "image": the image rows without text; "all": with text keys, and with text rows as they
# are defined; "global": with the cheaper text rows; "layer": "all" with RMSNorm and RoPE before; "prologue": these two.
PARTS = ("image", "all", "global", "layer", "prologue")


@dataclass(frozen=True)
class Shape:
    """One attention layer. `name` is <method>-<model>-<image side>; a grid and a window are (rows, columns)."""

    name: str
    method: str  # "npa", "local"
    grid: Grid
    heads: int
    head_dim: int
    dtype: str
    parts: tuple[str, ...]
    batch: int = 1
    text: int = 0
    window: Grid = (0, 0)
    radius: int = 0
    guidance_grid: Grid | None = None

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def flop(self, part: str, dense: bool = False) -> int:
        """What the method needs, or dense attention over image and text. The pre-pass counts nothing."""
        size: dict[str, Any] = {"batch": self.batch, "heads": self.heads, "head_dim": self.head_dim}
        text = 0 if part == "image" else self.text
        if part == "prologue":
            return 0
        if dense:
            return flops.dense_attention(self.tokens + text, **size)
        if self.method == "local":
            guidance = self.guidance_grid
            return sum(
                flops.local_attention(self.grid, "radius", self.radius, **size, text=text, guidance_grid=guidance)
            )
        rows = "global" if part == "global" else "patch"
        return sum(flops.neighborhood_patch_attention(self.grid, self.window, **size, text=text, text_rows=rows))


def _shapes() -> list[Shape]:
    flux = Shape("", "npa", (0, 0), 24, 128, "bfloat16", PARTS, text=512, window=(64, 64))
    sdxl = Shape("", "npa", (0, 0), 0, 64, "float16", ("image",), batch=2)
    found = []
    for pixels in (2048, 4096, 8192):
        side = pixels // 16
        found.append(replace(flux, name=f"npa-flux-{pixels}", grid=(side, side)))
        for level, heads, window in ((1, 10, 64), (2, 20, 32)):
            side = pixels // 8 >> level
            size: dict[str, Any] = {"grid": (side, side), "heads": heads, "window": (window, window)}
            found.append(replace(sdxl, name=f"npa-sdxl{level}-{pixels}", **size))
    for pixels in (2048, 4096, 8192):
        side, low = pixels // 16, pixels // 64
        local: dict[str, Any] = {"method": "local", "window": (0, 0), "radius": 8, "parts": ("image", "all")}
        found.append(replace(flux, name=f"local-flux-{pixels}", grid=(side, side), guidance_grid=(low, low), **local))
    tiny: dict[str, Any] = {"heads": 1, "head_dim": 32, "dtype": "float32", "text": 3}
    found.append(replace(flux, name="npa-tiny-0", grid=(6, 8), window=(4, 6), **tiny))
    found.append(
        replace(flux, name="local-tiny-0", grid=(6, 8), guidance_grid=(3, 4), **(local | {"radius": 2}), **tiny)
    )
    return found


SHAPES = {shape.name: shape for shape in _shapes()}


def choose(items: Sequence[str]) -> list[Shape]:
    """The shapes that an item names: a pattern ("npa-*-4096") or one of the three words of a name ("flux").

    Without items all but the tiny ones. HiresError where an item fits none.
    """
    for item in items:
        if not any(_fits(name, item) for name in SHAPES):
            raise HiresError(f"no shape fits {item!r}: allowed: a pattern or a word of {', '.join(SHAPES)}")
    if not items:
        return [shape for name, shape in SHAPES.items() if "tiny" not in name]
    return [shape for name, shape in SHAPES.items() if any(_fits(name, item) for item in items)]


def device_for(shapes: Sequence[Shape], device: str) -> torch.device:
    """The device "cuda" or "cpu". HiresError for another one, a GPU that isn't there, and a CPU but for tiny shapes."""
    if device not in ("cuda", "cpu"):
        raise unknown("device", device, ("cuda", "cpu"))
    if device == "cpu" and not all("tiny" in shape.name for shape in shapes):
        raise HiresError("--device cpu measures --shapes tiny only: the others take hours there")
    if device == "cuda" and not torch.cuda.is_available():
        raise HiresError("no CUDA device: run it on a GPU, or try the command with --device cpu --shapes tiny")
    return torch.device(device)


def _fits(name: str, item: str) -> bool:
    return fnmatch(name, item) or item in name.split("-")
