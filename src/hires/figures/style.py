"""One look for every figure: a variant keeps its colour and its marker wherever it appears.

The colours are Paul Tol's "muted" scheme, which people with colour-blindness tell apart; markers say it again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from hires.analysis.results import TRUE

PAGE_WIDTH = 7.2  # inches

# variant -> colour, marker; figures follow a change of an entry, as they do of one in RC
LOOKS: dict[str, tuple[str, str]] = {
    TRUE: ("#000000", "*"),
    "upsample": ("#8a8a8a", "s"),
    "direct": ("#cc6677", "X"),
    "npa-direct": ("#d58a3c", "P"),
    "multidiffusion-direct": ("#aa4499", "d"),
    "multidiffusion+lfm+sg": ("#882255", "D"),
    "dense+lfm+sg": ("#999933", "h"),
    "npa": ("#6db6dc", "o"),
    "npa+lfm": ("#44aa99", "^"),
    "npa+sg": ("#117733", "v"),
    "scalediff": ("#332288", "o"),
    "diffusehigh": ("#dd7788", "p"),
    "scale-dit": ("#c9a227", "<"),
    "hybrid": ("#7a4a2a", ">"),
}
_OTHERS = ("#4477aa", "#bb5566", "#667733", "#997700", "#225555")
_LABELS = {"scalediff": "scalediff (npa+lfm+sg)"}

RC: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "svg.hashsalt": "hires",
}


def panels(rows: int, columns: int, height: float, **options) -> tuple[Figure, np.ndarray]:
    """A figure as wide as a page and `height` inches high, and its (rows, columns) axes."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(PAGE_WIDTH, height), squeeze=False, layout="constrained", **options
    )
    plt.close(figure)  # out of pyplot's register: a notebook shows it once, where it is asked to
    return figure, axes


@contextmanager
def style() -> Iterator[None]:
    """The project's Matplotlib settings, for as long as the block lasts."""
    with plt.rc_context(RC):
        yield


def colour(variant: str) -> str:
    """The variant's colour; also for a variant `named` with a setting."""
    variant = variant.partition(", ")[0]
    return LOOKS[variant][0] if variant in LOOKS else _OTHERS[crc32(variant.encode()) % len(_OTHERS)]


def marker(variant: str) -> str:
    variant = variant.partition(", ")[0]
    return LOOKS[variant][1] if variant in LOOKS else "."


def label(variant: str) -> str:
    return _LABELS.get(variant, variant)


def save(figure: Figure, folder: Path, name: str) -> Figure:
    """Write `folder`/figures/`name`.png (200 dpi) and .pdf, the same bytes for the same figure; returns the figure."""
    target = folder / "figures"
    target.mkdir(parents=True, exist_ok=True)
    with style():
        figure.savefig(target / f"{name}.png", metadata={"Software": None})
        figure.savefig(target / f"{name}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return figure


def short(value: float, sign: str = "+") -> str:
    """A number in a cell: two digits, no zero before the point: +.029, −1.4, +330; `sign` "": .029."""
    text = f"{value:{sign}.0f}" if abs(value) >= 10 else f"{value:{sign}.2g}" if value else "0"
    for zero, none in (("+0.", "+."), ("-0.", "-."), ("0.", ".")):
        if text.startswith(zero):
            text = none + text.removeprefix(zero)
    return text.replace("-", "−")
