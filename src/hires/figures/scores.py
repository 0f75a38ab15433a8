"""Figures of scores: every point with its interval, hollow where the number of images is too small for the score."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hires.analysis import tables
from hires.analysis.results import TRUE, size_name, where
from hires.analysis.statistics import LEVEL
from hires.figures.style import colour, label, marker, panels, short, style
from hires.variants import VARIANTS

_COLUMNS = 4


def score_points(metrics: pd.DataFrame, names: Sequence[str] | None = None) -> Figure:
    """One panel per metric, one line per variant, for the rows of one backbone and size."""
    names = [name for name in tables.metrics_of(metrics) if names is None or name in names]
    variants = tables.variants_of(metrics)
    rows = -(-len(names) // _COLUMNS)
    columns = -(-len(names) // rows)
    with style():
        height = rows * (0.75 + 0.17 * len(variants)) + 0.25
        figure, axes = panels(rows, columns, height, sharey=True)
        for axis, name in zip(axes.flat, names):
            _points(axis, where(metrics, metric=name), variants, tables.metric(name).scale)
            _widen(axis)
            axis.set_title(tables.metric(name).heading, loc="left")
            axis.set_xlabel(tables.metric(name).unit)
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        axes[0, 0].set_yticks(range(len(variants)), [label(variant) for variant in variants])
        axes[0, 0].set_ylim(len(variants) - 0.5, -0.5)
        figure.suptitle(_heading(metrics), x=0.01, ha="left", fontsize=9)
        flagged = where(metrics, metric=names)["flag"].astype(bool).any()
        notes = ["hollow: too few images for this score to be trusted"] * bool(flagged)
        notes += [_OUTSIDE] * _has_arrows(figure)
        if TRUE in variants and set(names) & set(tables.HALVED):
            notes.append(_HALVES)
        figure.supxlabel("; ".join(notes), fontsize=7, x=0.99, ha="right")
    return figure


def _widen(axis: Axes) -> None:
    """At least a tenth of the values' size across: bytes that differ by a thousandth would fill the panel."""
    low, high = axis.get_xlim()
    middle = (low + high) / 2
    if high - low < 0.1 * abs(middle):
        axis.set_xlim(middle - 0.05 * abs(middle), middle + 0.05 * abs(middle))


_HALVES = "FID and KID of the true images: one half of them against the other"


def paired_differences(paired: pd.DataFrame, names: Sequence[str] | None = None) -> Figure:
    """One panel per metric, one line per pair a − b, with the line of no difference; one backbone and size."""
    names = [name for name in tables.metrics_of(paired) if names is None or name in names]
    pairs = list(dict.fromkeys(zip(paired["a"], paired["b"])))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with style():
        height = rows * (0.8 + 0.17 * len(pairs)) + 0.35
        figure, axes = panels(rows, columns, height, sharey=True)
        for axis, name in zip(axes.flat, names):
            scale = tables.metric(name).scale
            axis.axvline(0, color="black", linewidth=0.8)
            tests = where(paired, metric=name)
            edge = _reach(tests, tests["difference"]) * scale
            for y, (a, b) in enumerate(pairs):
                for row in where(tests, a=a, b=b).itertuples():
                    value, low, high = row.difference * scale, row.low * scale, row.high * scale
                    if abs(value) > edge:
                        _beyond(axis, edge if value > 0 else -edge, y, value > 0, short(value), colour(a))
                        continue
                    axis.plot([low, high], [y, y], color=colour(a))
                    face = colour(a) if tables.excludes_zero(low, high) else "white"
                    axis.plot(value, y, marker(a), color=colour(a), markerfacecolor=face)
            axis.set_title(tables.metric(name).heading, loc="left")
            axis.set_xlabel(tables.metric(name).unit)
            axis.locator_params(axis="x", nbins=4)
            axis.grid(False, axis="y")
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        axes[0, 0].set_yticks(range(len(pairs)), [tables.pair_label(a, b) for a, b in pairs])
        axes[0, 0].set_ylim(len(pairs) - 0.5, -0.5)
        figure.suptitle(f"paired differences, {_heading(paired)}", x=0.01, ha="left", fontsize=9)
        notes = ["hollow: the interval holds zero, or has no width"] + [_OUTSIDE] * _has_arrows(figure)
        figure.supxlabel("; ".join(notes), fontsize=7, x=0.99, ha="right")
    return figure


def _reach(rows: pd.DataFrame, values: pd.Series, centre: float = 0.0) -> float:
    """How far from `centre` a panel reaches: not so far that a few outliers leave the others no room."""
    reach = (rows[["low", "high"]] - centre).abs().max(axis=1)
    usual = 5 * reach.median() or reach.max()
    return float(reach[(values - centre).abs() <= usual].max())


def _beyond(axis: Axes, edge: float, y: int, right: bool, text: str, shade: str) -> None:
    """An arrow at the edge of a panel, for a value that lies outside, and what it is."""
    axis.plot(edge, y, ">" if right else "<", color=shade)
    inwards, align = ((-6, 0), "right") if right else ((6, 0), "left")
    axis.annotate(
        text, (edge, y), xytext=inwards, textcoords="offset points", ha=align, va="center", fontsize=6, color=shade
    )


def _has_arrows(figure: Figure) -> bool:
    return any(axis.texts for axis in figure.axes)


_OUTSIDE = "arrow and number: outside the panel"


def every_pair(paired: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Row − column for every pair of variants: panels are metrics down, backbones across; of one size.

    Green: the row is better, red: it is worse, p < .05 by Holm over the pairs of a panel. Numbers in a metric's unit.
    """
    names = [name for name in names if name in set(paired["metric"])]
    backbones = sorted(set(paired["backbone"]))
    variants = tables.in_order({*paired["a"], *paired["b"]}, VARIANTS)
    side = 0.22 * len(variants)
    with style():
        figure, axes = panels(len(names), len(backbones), (side + 0.45) * len(names) + 1.0, sharex=True, sharey=True)
        for line, name in zip(axes, names):
            shown = tables.metric(name)
            for axis, backbone in zip(line, backbones):
                rows = where(paired, backbone=backbone, metric=name)
                cells = 2 * np.eye(len(variants))
                for row in rows.itertuples():
                    for a, b, sign in ((row.a, row.b, 1), (row.b, row.a, -1)):
                        y, x = variants.index(a), variants.index(b)
                        better = (sign * row.difference < 0) == (shown.better == "lower")
                        cells[y, x] = (row.p_holm < LEVEL) * (1 if better else -1)
                        axis.text(
                            x, y, short(sign * row.difference * shown.scale), ha="center", va="center", fontsize=5
                        )
                axis.imshow(
                    cells,
                    cmap=ListedColormap(["#eab6bd", "white", "#a9d3b4", "#d9d9d9"]),
                    vmin=-1,
                    vmax=2,
                    aspect="auto",
                )
                axis.set_title(f"{backbone}: {shown.title}", loc="left")
                axis.set_xticks(range(len(variants)), variants, rotation=40, ha="right", fontsize=6)
                axis.set_yticks(range(len(variants)), variants, fontsize=6)
                axis.grid(False)
        figure.suptitle(f"row − column, {_heading(paired).partition(', bars')[0]}", x=0.01, ha="left", fontsize=9)
        figure.supxlabel("green: the row is better, red: worse, p < .05 after Holm", fontsize=7, x=0.99, ha="right")
    return figure


def sweep(metrics: pd.DataFrame, column: str, names: Sequence[str], xlabel: str) -> Figure:
    """Metrics against a setting: rows of panels are backbones, columns metrics, lines variants with their intervals.

    `column`: the numeric column of `metrics` that is swept. True images' scores are a dotted line.
    """
    names = [name for name in names if name in set(metrics["metric"])]
    backbones = sorted(set(metrics["backbone"]))
    variants = [name for name in tables.variants_of(metrics) if name != TRUE]
    with style():
        figure, axes = panels(len(backbones), len(names), 1.7 * len(backbones) + 0.6, sharex=True)
        for line, backbone in zip(axes, backbones):
            for axis, name in zip(line, names):
                scale = tables.metric(name).scale
                for row in where(metrics, backbone=backbone, metric=name, variant=TRUE).head(1).itertuples():
                    axis.axhline(row.value * scale, color=colour(TRUE), linestyle=":", linewidth=1)
                for variant in variants:
                    rows = where(metrics, backbone=backbone, metric=name, variant=variant).sort_values(column)
                    axis.fill_between(
                        rows[column], rows["low"] * scale, rows["high"] * scale, color=colour(variant), alpha=0.15, lw=0
                    )
                    axis.plot(rows[column], rows["value"] * scale, marker(variant) + "-", color=colour(variant))
                    hollow = rows[rows["flag"].astype(bool)]
                    axis.plot(
                        hollow[column], hollow["value"] * scale, marker(variant), color=colour(variant), mfc="white"
                    )
        for axis, name in zip(axes[0], names):
            axis.set_title(tables.metric(name).heading, loc="left")
        places = sorted(set(metrics[column]))
        for line in axes:
            for axis, name in zip(line, names):
                axis.set_ylabel(tables.metric(name).unit)
                axis.set_xticks(places, [f"{x:g}" for x in places])
        for line, backbone in zip(axes, backbones):
            line[0].set_ylabel(f"{backbone}\n\n{line[0].get_ylabel()}")
        handles = [Line2D([], [], color=colour(v), marker=marker(v), label=label(v)) for v in variants]
        if TRUE in set(metrics["variant"]):
            handles.append(Line2D([], [], color=colour(TRUE), linestyle=":", label=TRUE))
            xlabel += f"; {_HALVES}" * bool(set(names) & set(tables.HALVED))
        figure.supxlabel(xlabel, fontsize=8)
        figure.legend(handles=handles, loc="outside upper right", ncols=min(5, len(handles)))
    return figure


def spectra(
    curves: pd.DataFrame,
    by: str = "variant",
    colours: dict | None = None,
    labels: dict[str, str] | None = None,
    ylabel: str = "power (luminance²)",
    sample: str = "pixel",
) -> Figure:
    """Radial power spectra, one panel per backbone: columns backbone, `by`, frequency, power, low, high.

    Frequencies are in cycles per `sample`. `low` and `high` bound the mean over images. Dotted lines: ⅛, ¼ and ½ of
    the Nyquist frequency. `colours` and `labels` belong to the values of `by`; default: those of the variants.
    """
    backbones = sorted(set(curves["backbone"]))
    names = tables.variants_of(curves) if by == "variant" else list(dict.fromkeys(curves[by]))
    with style():
        figure, (axes,) = panels(1, len(backbones), 3.1, sharey=True)
        for axis, backbone in zip(axes, backbones):
            for name in names:
                rows = where(curves, backbone=backbone, **{by: name}).sort_values("frequency")
                shade = colours[name] if colours else colour(name)
                axis.fill_between(rows["frequency"], rows["low"], rows["high"], color=shade, alpha=0.12, lw=0)
                text = labels.get(name, name) if labels else label(name)
                axis.plot(rows["frequency"], rows["power"], color=shade, label=text)
            axis.set(xscale="log", yscale="log", xlabel=f"spatial frequency (cycles/{sample})", title=backbone)
            for edge in (1 / 16, 1 / 8, 1 / 4):
                axis.axvline(edge, color="#9a9a9a", linestyle=":", linewidth=0.8)
            lowest = min(2.0 ** np.ceil(np.log2(curves["frequency"].min())), 1 / 16)
            ticks = 2.0 ** np.arange(np.log2(lowest), 0)
            axis.set_xticks(ticks, [f"1/{round(1 / tick)}" for tick in ticks])
            axis.minorticks_off()
            axis.set_xlim(right=0.5)
        axes[0].set_ylabel(ylabel)
        handles, texts = axes[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=4)
    return figure


def _points(axis: Axes, rows: pd.DataFrame, variants: Sequence[str], scale: float) -> None:
    centre = float(rows["value"].median())
    truth = where(rows, variant=TRUE)["value"]
    reach = max(_reach(rows, rows["value"], centre), *(truth - centre).abs(), 0.0)
    for y, variant in enumerate(variants):
        for row in where(rows, variant=variant).itertuples():
            if abs(row.value - centre) > reach:
                right = row.value > centre
                edge = (centre + reach if right else centre - reach) * scale
                _beyond(axis, edge, y, right, short(row.value * scale, ""), colour(variant))
                continue
            axis.plot([row.low * scale, row.high * scale], [y, y], color=colour(variant))
            face = "white" if row.flag else colour(variant)
            axis.plot(row.value * scale, y, marker(variant), color=colour(variant), markerfacecolor=face)
    axis.grid(False, axis="y")
    axis.margins(x=0.1)
    axis.locator_params(axis="x", nbins=4)


def _heading(rows: pd.DataFrame) -> str:
    sizes = ", ".join(size_name(*size) for size in tables.sizes_of(rows))
    return f"{', '.join(sorted(set(rows['backbone'])))}, {sizes} px, n = {tables.amount(rows)}, bars: 95% intervals"
