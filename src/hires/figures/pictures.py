"""Images beside each other, with zoomed crops, and their spectra."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from hires.figures.style import PAGE_WIDTH, label, style

_BOX = "#e8222f"
_GAP, _CAPTION = 0.03, 0.16  # inches


def busiest(image: Image.Image, side: float = 0.25) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom; pixels) of relative side `side` with the strongest luminance gradients."""
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    rows, columns = np.gradient(grey)
    total = np.pad((rows**2 + columns**2).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = round(grey.shape[0] * side), round(grey.shape[1] * side)
    sums = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return int(left), int(top), int(left) + width, int(top) + height


def comparison(
    rows: Sequence[tuple[str, Mapping[str, Image.Image]]], columns: Sequence[str], crop_side: float | None = 0.25
) -> Figure:
    """A grid: for each (caption, images by column name) a row of whole images and, below it, the crops framed in them.

    The crop lies where the last column's image of the row is busiest, at the same relative place in all columns. A
    missing image leaves its place empty. `crop_side` (relative to the image) None: whole images only.
    """
    image = next(iter(rows[0][1].values()))
    cell = max(PAGE_WIDTH / len(columns), 1.05)  # inches
    heights = [cell * image.height / image.width, *([] if crop_side is None else [cell])]
    step, head = sum(heights) + _GAP * len(heights) + _CAPTION, 0.32
    size = (cell * len(columns), head + step * len(rows))
    with style():
        figure = plt.figure(figsize=size)
        for column, name in enumerate(columns):
            x = (column + 0.5) * cell / size[0]
            figure.text(x, 1 - (head - 0.05) / size[1], _broken(label(name)), ha="center", va="bottom", fontsize=7)
        for row, (caption, images) in enumerate(rows):
            top = head + row * step
            guide = images[next(name for name in reversed(columns) if name in images)]
            box = None if crop_side is None else [edge / guide.width for edge in busiest(guide, crop_side)]
            for column, name in enumerate(columns):
                for panel, height in enumerate(heights if name in images else []):
                    bottom = size[1] - top - sum(heights[: panel + 1]) - panel * _GAP
                    left, wide, high = column * cell + _GAP / 2, cell - _GAP, height - _GAP / 2
                    place = (left / size[0], bottom / size[1], wide / size[0], high / size[1])
                    _draw(figure.add_axes(place), images[name], box, crop=panel == 1)
            y = 1 - (top + step - _CAPTION + 0.02) / size[1]
            figure.text(_GAP / size[0], y, _shortened(caption), ha="left", va="top", fontsize=6, color="#444444")
    return figure


def radial_power(image: Image.Image, bins: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Mean power of the luminance (in [0, 1]) over rings of equal log-width, up to the Nyquist frequency.

    A Hann window keeps the picture's borders out of the spectrum. Returns the ring centres in cycles/pixel and their
    power; rings without a coefficient are left out.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float64) / 255
    height, width = grey.shape
    window = np.hanning(height)[:, None] * np.hanning(width)[None, :]
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2 / (window**2).sum()
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    edges = np.geomspace(2 / min(height, width), 0.5, bins + 1)
    ring = np.digitize(radius.ravel(), edges) - 1
    inside = (ring >= 0) & (ring < bins)
    count = np.bincount(ring[inside], minlength=bins)
    total = np.bincount(ring[inside], weights=power.ravel()[inside], minlength=bins)
    filled = count > 0
    return np.sqrt(edges[1:] * edges[:-1])[filled], total[filled] / count[filled]


def _draw(axis: Axes, image: Image.Image, box: Sequence[float] | None, crop: bool) -> None:
    """The whole image with the box (relative to its width) framed, or what is inside the box."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set(visible=crop, color=_BOX, linewidth=0.8)
    left, top, right, bottom = (round(edge * image.width) for edge in box or (0, 0, 0, 0))
    if crop:
        axis.imshow(image.crop((left, top, right, bottom)), interpolation="nearest")
        return
    axis.imshow(image, interpolation="lanczos")
    if box:
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=_BOX, lw=0.8))


def _broken(name: str) -> str:
    return name.replace(" (", "\n(").replace("-direct", "\ndirect").replace("multidiffusion+", "multidiffusion\n+")


def _shortened(caption: str, length: int = 150) -> str:
    return caption if len(caption) <= length else caption[: length - 1].rsplit(" ", 1)[0] + " …"
