"""Images beside each other, with zoomed crops, and their spectra."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from hires.analysis.results import TRUE, Results, read_image, where
from hires.figures.style import PAGE_WIDTH, label, style

MOST = 1000  # images of one spectrum
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
    cell = min(max(PAGE_WIDTH / len(columns), 1.05), 1.5)  # inches
    heights = [cell * image.height / image.width, *([] if crop_side is None else [cell])]
    step, head = sum(heights) + _GAP * len(heights) + _CAPTION, 0.32
    size = (cell * len(columns), head + step * len(rows))
    with style():
        figure = plt.figure(figsize=size)
        plt.close(figure)
        for column, name in enumerate(columns):
            x = (column + 0.5) * cell / size[0]
            figure.text(
                x,
                1 - (head - 0.05) / size[1],
                _broken(label(name)),
                ha="center",
                va="bottom",
                fontsize=7,
                parse_math=False,
            )
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
            figure.text(
                _GAP / size[0],
                y,
                _shortened(caption),
                ha="left",
                va="top",
                fontsize=6,
                color="#444444",
                parse_math=False,
            )
    return figure


def ring_power(field: np.ndarray, bins: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Mean power of a field (H, W) over rings of equal log-width, up to the Nyquist frequency.

    A Hann window keeps the borders out of the spectrum. Returns the ring centres in cycles/pixel and their power; rings
    without a coefficient are left out.
    """
    height, width = field.shape
    window = np.hanning(height)[:, None] * np.hanning(width)[None, :]
    power = np.abs(np.fft.fft2((field - field.mean()) * window)) ** 2 / (window**2).sum()
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    edges = np.geomspace(2 / min(height, width), 0.5, bins + 1)
    ring = np.digitize(radius.ravel(), edges) - 1
    inside = (ring >= 0) & (ring < bins)
    count = np.bincount(ring[inside], minlength=bins)
    total = np.bincount(ring[inside], weights=power.ravel()[inside], minlength=bins)
    filled = count > 0
    return np.sqrt(edges[1:] * edges[:-1])[filled], total[filled] / count[filled]


def radial_power(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """`ring_power` of an image's luminance in [0, 1]."""
    return ring_power(np.asarray(image.convert("L"), dtype=np.float64) / 255)


def latent_spectra(latents: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    """Spectra of latents (1, C, h, w) by backbone and name, mean over channels: the columns of `band_spectra`.

    Backbones with the same latents, as those that share a VAE have, stand there once, under all their names.
    """
    distinct: dict[str, Mapping[str, Tensor]] = {}
    for backbone, found in latents.items():
        same = [name for name, other in distinct.items() if _equal(found, other)]
        distinct[", ".join([*same, backbone])] = distinct.pop(same[0]) if same else found
    rows = []
    for backbone, found in distinct.items():
        for name, latent in found.items():
            rings = [ring_power(channel) for channel in latent[0].double().cpu().numpy()]
            power = np.mean([ring[1] for ring in rings], axis=0)
            curve = {"frequency": rings[0][0], "power": power, "low": power, "high": power}
            rows.append(pd.DataFrame({"backbone": backbone, "latent": name, **curve}))
    return pd.concat(rows)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def radial_spectra(results: Results, name: str, by: str = "variant", **columns) -> pd.DataFrame:
    """Mean spectra of the first `MOST` stored images with these `columns`, and of their references as "true image".

    Columns backbone, `by`, frequency, power, low, high, n: the geometric mean over images and its 95 % interval
    (normal, of the logarithm). They are kept in tables/`name`.csv and read from there where no images are stored.
    """
    kept = Path("tables") / f"{name}.csv"
    images = where(results.images, **columns)
    if images.empty:
        stored = results.path / kept
        return pd.read_csv(stored) if stored.is_file() else pd.DataFrame(columns=["backbone", by, "frequency"])
    rows = []
    for backbone in sorted(set(images["backbone"])):
        group = where(images, backbone=backbone)
        same = group[["id", "height", "width"]].drop_duplicates()
        truth = results.references.merge(same, on=["id", "height", "width"]).assign(**{by: TRUE})
        for value, members in pd.concat([truth, group]).groupby(by, sort=False):
            spectrum = [radial_power(read_image(path)) for path in members["path"].head(MOST)]
            logs = np.log10([power for _, power in spectrum])
            half = 1.96 * logs.std(0, ddof=1) / len(logs) ** 0.5 if len(logs) > 1 else np.zeros(logs.shape[1])
            mean = logs.mean(0)
            curve = {"power": 10**mean, "low": 10 ** (mean - half), "high": 10 ** (mean + half), "n": len(logs)}
            rows.append(pd.DataFrame({"backbone": backbone, by: value, "frequency": spectrum[0][0], **curve}))
    curves = pd.concat(rows)
    (results.output / kept).parent.mkdir(parents=True, exist_ok=True)
    curves.to_csv(results.output / kept, index=False)
    return curves


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
