"""Figures of the studies: verdicts on the claims, and failures beside what they were provoked from."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from hires.analysis import tables
from hires.analysis.claims import MISSING, NOT_REPRODUCED, REPRODUCED, UNDECIDED
from hires.analysis.results import size_name, where
from hires.figures.style import panels, short, style

_VERDICTS = {REPRODUCED: "#a9d3b4", NOT_REPRODUCED: "#eab6bd", UNDECIDED: "#e6e6e6"}
_SIDES = {"lower": "↓", "higher": "↑", "same": "≈"}


def verdicts(judged: pd.DataFrame) -> Figure:
    """Every test: claims and metrics down, backbones and sizes across, in a cell a − b in the metric's unit.

    Green: reproduced, red: not, grey: undecided; "–" where the results don't hold both sides, empty where none is
    planned. An arrow at a metric is the side that the paper says, ≈ that it says none.
    """
    rows = judged.dropna(subset=["backbone"])
    lines = list(rows[["claim", "metric", "expected"]].drop_duplicates().itertuples(index=False, name=None))
    metrics = [tables.metric(name) for _, name, _ in lines]
    names = [f"{line[0]}: {shown.label} {_SIDES[line[2]]}{shown.in_unit}" for line, shown in zip(lines, metrics)]
    backbones = sorted(set(rows["backbone"]))
    with style():
        figure, (axes,) = panels(1, max(1, len(backbones)), 0.9 + 0.155 * max(1, len(lines)), sharey=True)
        for axis, backbone in zip(axes, backbones):
            here = where(rows, backbone=backbone)
            sizes = sorted(set(zip(here["height"].astype(int), here["width"].astype(int))))
            cells = np.full((len(lines), len(sizes)), np.nan)
            for row in here.itertuples():
                y = lines.index((row.claim, row.metric, row.expected))
                x = sizes.index((int(row.height), int(row.width)))
                missing = row.verdict == MISSING
                cells[y, x] = np.nan if missing else [*_VERDICTS].index(row.verdict)
                text = "–" if missing else short(row.difference * metrics[y].scale)
                axis.text(x, y, text, ha="center", va="center", fontsize=6)
            axis.imshow(cells, cmap=ListedColormap([*_VERDICTS.values()]), vmin=0, vmax=2, aspect="auto")
            axis.set_title(backbone, loc="left")
            axis.set_xticks(range(len(sizes)), [size_name(*size) for size in sizes], fontsize=6)
            axis.set_yticks(range(len(lines)), names, fontsize=6)
            axis.grid(False)
            for y, (line, after) in enumerate(pairwise(lines)):
                if line[0] != after[0]:
                    axis.axhline(y + 0.5, color="#b0b0b0", linewidth=0.5)
        handles = [Patch(color=shade, label=name) for name, shade in _VERDICTS.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=3)
        figure.supxlabel("a − b on the same prompts; ↓ ↑: the side that the paper says, ≈: no difference", fontsize=7)
    return figure


@dataclass(frozen=True)
class Failure:
    """A sign of failure: crops of the usual images and of the provoked ones, each with its title."""

    usual: Image.Image | None
    title: str
    provoked: Image.Image | None
    text: str


def failures(signs: Sequence[Failure]) -> Figure:
    """One row per sign: the usual images and the provoked ones, each whole and as the native pixels of its centre."""
    with style():
        figure, axes = panels(len(signs), 2, 1.35 * len(signs) + 0.2)
        for line, sign in zip(axes, signs):
            for axis, picture in zip(line, (sign.usual, sign.provoked)):
                axis.set_axis_off()
                if picture is not None:
                    axis.imshow(picture)
            line[0].set_title(sign.title, loc="left")
            line[1].set_title(sign.text, loc="left")
    return figure
