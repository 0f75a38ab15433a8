"""How the methods work, drawn from the code that does it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from hires_kernels.geometry import patches
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hires.figures.scores import spectra
from hires.figures.style import PAGE_WIDTH, panels, style

Box = tuple[int, int, int, int]  # top, left, height, width in tokens

_SHADES = ("#332288", "#cc6677", "#117733", "#c9a227", "#44aa99", "#882255")


def npa_patches(grid: tuple[int, int], window: int) -> list[tuple[Box, Box]]:
    """(query patch, key/value window) of every patch of Neighborhood Patch Attention, in reading order, in tokens."""
    return [
        ((y.start, x.start, y.stop - y.start, x.stop - x.start), (y.window, x.window, window, window))
        for y in patches(grid[0], window)
        for x in patches(grid[1], window)
    ]


def attention_windows(grid: tuple[int, int], window: int, chosen: Sequence[int]) -> Figure:
    """The query patches that tile a token grid, and for the `chosen` ones the key/value window that they attend to.

    Left: all query patches, the chosen ones filled. Then one panel per chosen patch.
    """
    height, width = grid
    boxes = npa_patches(grid, window)
    with style():
        count = len(chosen) + 1
        figure, (axes,) = panels(1, count, PAGE_WIDTH / count * height / width + 0.5)
        for axis in axes:
            axis.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xticks=[0, width], yticks=[0, height])
            axis.set_xticks(range(width + 1), minor=True)
            axis.set_yticks(range(height + 1), minor=True)
            axis.tick_params(which="both", length=0)
            axis.grid(which="minor", color="#dddddd", linewidth=0.4)
            axis.spines[:].set_visible(True)
            for query, _ in boxes:
                axis.add_patch(_rectangle(query, fill=False, edgecolor="#555555", linewidth=0.7))
            axis.set_xlabel("column (tokens)", labelpad=-4)
        axes[0].set_ylabel("row (tokens)", labelpad=-6)
        axes[0].set_title(f"{len(boxes)} query patches", loc="left")
        for axis, index, shade in zip(axes[1:], chosen, _SHADES):
            query, keys = boxes[index]
            axes[0].add_patch(_rectangle(query, facecolor=shade, alpha=0.8))
            axis.add_patch(_rectangle(keys, facecolor=shade, alpha=0.22))
            axis.add_patch(_rectangle(keys, fill=False, edgecolor=shade, linewidth=1.5))
            axis.add_patch(_rectangle(query, facecolor=shade, alpha=0.8))
            axis.set_title(f"patch {index}: {query[2] * query[3]} queries,\n{keys[2] * keys[3]} keys", loc="left")
    return figure


def counted_cost(scale: int, window: int) -> float:
    """Query–key pairs of NPA on a grid of `scale` windows a side, over those of dense attention at the base."""
    boxes = npa_patches((scale * window, scale * window), window)
    return sum(query[2] * query[3] * keys[2] * keys[3] for query, keys in boxes) / window**4


def cost(scales: Sequence[int], window: int) -> Figure:
    """Cost of a model call against the upscale factor s, in units of a call at the training resolution (ScaleDiff, §3).

    Lines are the paper's formulas; points are counted from the patches of a layer with this window.
    """
    s = np.linspace(min(scales), max(scales), 200)
    views = (2 * s - 1) ** 2
    lines = {
        "dense": ("#cc6677", s**2, s**4),
        "MultiDiffusion, (2s − 1)² views": ("#aa4499", views, views),
        "NPA": ("#332288", s**2, s**2),
    }
    with style():
        figure, (axes,) = panels(1, 2, 2.7, sharey=True)
        for name, (shade, linear, attention) in lines.items():
            dashes = "--" if name == "NPA" else "-"
            axes[0].plot(s, linear, dashes, color=shade, label=name)
            axes[1].plot(s, attention, dashes, color=shade)
        counted = [counted_cost(scale, window) for scale in scales]
        axes[1].plot(scales, counted, "o", color="#332288", label="NPA, counted from the patches")
        for axis, title in zip(axes, ("linear, convolution, cross-attention", "self-attention")):
            axis.set(xscale="log", yscale="log", xlabel="upscale factor s per side")
            axis.set_xticks(scales, [str(scale) for scale in scales])
            axis.minorticks_off()
            axis.set_title(title, loc="left")
        axes[0].set_ylabel("cost (base calls)")
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def guidance_weight(weights: pd.DataFrame) -> Figure:
    """Structure Guidance's weight γ over the steps of a stage: columns family, form, step, weight."""
    families = list(dict.fromkeys(weights["family"]))
    with style():
        figure, (axes,) = panels(1, len(families), 2.3, sharey=True)
        for axis, family in zip(axes, families):
            for (form, rows), shade in zip(weights[weights["family"] == family].groupby("form", sort=False), _SHADES):
                axis.plot(rows["step"], rows["weight"], ".-", color=shade, label=form)
            axis.set_title(family, loc="left")
            axis.set_xlabel("step of the stage")
            axis.legend()
        axes[0].set_ylabel("γ (no unit)")
        axes[0].set_ylim(0, 1.05)
    return figure


def band_spectra(curves: pd.DataFrame) -> Figure:
    """Radial power of latents: columns backbone, latent, frequency, power, low, high; one panel per backbone."""
    names = dict.fromkeys(curves["latent"])
    shades = dict(zip(names, _SHADES))
    return spectra(curves, by="latent", colours=shades, ylabel="power (latent²)", sample="latent pixel")


def _rectangle(box: Box, **look) -> Rectangle:
    top, left, height, width = box
    return Rectangle((left, top), width, height, **look)
