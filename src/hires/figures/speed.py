"""Figures of `hires speed`: seconds, memory and FLOP against size."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from hires.figures.style import panels, save, style

# contender -> colour, marker, as the variants have them; width: the wide lie below, as lines can fall together
LOOKS = {
    "dense": ("#999933", "h", 3.0),
    "multidiffusion": ("#882255", "D", 1.5),
    "scalediff": ("#332288", "o", 1.5),
    "scalediff-fp8": ("#6db6dc", "o", 3.0),
    "scalediff-fast": ("#44aa99", "^", 1.5),
    "scale-dit": ("#c9a227", "<", 1.5),
    "attention-free": ("#8a8a8a", "s", 0.75),
    "base": ("#000000", "*", 1.5),
    "base-fp8": ("#6db6dc", "*", 3.0),
}


def draw(folder: Path, rows: pd.DataFrame, images: pd.DataFrame) -> None:
    """Write `figures` to figures/*.png and .pdf of a folder."""
    for name, figure in figures(rows, images).items():
        save(figure, folder, name)


def figures(rows: pd.DataFrame, images: pd.DataFrame) -> dict[str, Figure]:
    """Seconds a step and an image, memory, FLOP and time per token against size, of what was measured."""
    alike = (rows["kind"] == "steps") | ((rows["kind"] == "largest") & rows["compiled"])
    measured = rows[alike & (rows["what"] == "step")]
    tokens = measured.assign(value=measured["seconds"].astype(float) / (measured["size"] // 16) ** 2 * 1e6)
    found = {
        "speed-steps": (measured.assign(value=measured["seconds"]), "seconds a step"),
        "speed-images": (
            images[images["setting"] == "equal steps"].assign(value=lambda x: x["seconds"]),
            "seconds an image",
        ),
        "speed-memory": (measured.assign(value=measured["peak_bytes"].astype(float) / 2**30), "peak memory, GiB"),
        "speed-flop": (measured.assign(value=measured["flop"].astype(float) / 1e12), "TFLOP a step, counted"),
        "speed-tokens": (tokens, "µs a token of 16×16 pixels"),
    }
    shown = {name: (table[table["value"].notna()], axis) for name, (table, axis) in found.items()}
    return {name: against_size(table, axis) for name, (table, axis) in shown.items() if len(table)}


def against_size(table: pd.DataFrame, axis: str) -> Figure:
    """A panel for each model: `value` against the image's side, both logarithmic."""
    models = sorted(set(table["model"]))
    with style():
        figure, axes = panels(1, len(models), 2.9)
        drawn = {}
        for place, model in zip(axes[0], models, strict=True):
            group = table[table["model"] == model]
            for contender in [name for name in LOOKS if name in set(group["contender"])]:
                colour, marker, width = LOOKS[contender]
                one = group[group["contender"] == contender].sort_values("size")
                look = {
                    "color": colour,
                    "marker": marker,
                    "linewidth": width,
                    "markersize": 3 + width,
                    "zorder": 3 - width / 4,
                }
                (drawn[contender],) = place.plot(one["size"], one["value"].astype(float), **look)
            sizes = sorted(set(group["size"]))
            place.set(xscale="log", yscale="log", title=model, xlabel="side of the image, pixels")
            doubled = [size for size in sizes if (size // sizes[0]).bit_count() == 1 and size % sizes[0] == 0]
            place.set_xticks(doubled, [str(size) for size in doubled])  # the largest ones lie close together
            place.minorticks_off()
            low, high = place.get_ylim()
            place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(6))
            place.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[0][0].set_ylabel(axis)
        handles = {name: drawn[name] for name in LOOKS if name in drawn}  # no panel need have all of them
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    return figure
