"""Figures of the studies: verdicts on the claims, and failures beside what they were provoked from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from hires.analysis import tables
from hires.analysis.claims import MISSING, NOT_REPRODUCED, REPRODUCED, UNDECIDED, span
from hires.analysis.results import size_name
from hires.figures.style import panels, style

_VERDICTS = {REPRODUCED: ("#117733", "o"), NOT_REPRODUCED: ("#cc6677", "X"), UNDECIDED: ("#8a8a8a", "s")}
_FARTHEST = 8.0


def verdicts(judged: pd.DataFrame) -> Figure:
    """Every test of every claim: its difference in half widths of its own 95 % interval, expected sides to the right.

    The interval is `claims.span`. Beyond ± 1 it leaves out zero; what lies beyond ± 8 is drawn there. Tests that could
    not be made are left out, and so are those that expect no difference.
    """
    rows = judged[(judged["verdict"] != MISSING) & (judged["expected"] != "same")].reset_index(drop=True)
    ends = span(rows)
    half = ((ends["high"] - ends["low"]) / 2).astype(float)
    side = np.where(rows["expected"] == "higher", 1.0, -1.0)
    place = (side * rows["difference"].astype(float) / half).clip(-_FARTHEST, _FARTHEST).fillna(0.0)  # 0 / 0
    with style():
        figure, ((axis,),) = panels(1, 1, 0.6 + 0.15 * max(1, len(rows)))
        axis.axvspan(-1, 1, color="#efefef")
        axis.axvline(0, color="black", linewidth=0.8)
        for y, (x, verdict) in enumerate(zip(place, rows["verdict"])):
            shade, shape = _VERDICTS[verdict]
            axis.plot(x, y, shape, color=shade, markersize=4)
        sizes = [size_name(int(height), int(width)) for height, width in zip(rows["height"], rows["width"])]
        names = [
            f"{row.claim}: {tables.metric(row.metric).label}, {row.backbone} {size}"
            for row, size in zip(rows.itertuples(), sizes)
        ]
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlim(-_FARTHEST - 0.5, _FARTHEST + 0.5)
        places = np.arange(-_FARTHEST, _FARTHEST + 1, 2)
        least, *between, most = (f"{x:g}".replace("-", "−") for x in places)
        axis.set_xticks(places, [f"≤ {least}", *between, f"≥ {most}"])
        axis.set_xlabel("difference / half its 95 % interval; to the right: as the paper says")
        axis.grid(False, axis="y")
        handles = [Line2D([], [], color=c, marker=m, linestyle="", label=name) for name, (c, m) in _VERDICTS.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=3)
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
