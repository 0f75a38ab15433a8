"""Scale-DiT drawn from the code that does it: who sees whom, token orders, anchors; and the adapter's training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from hires_kernels.geometry import Grid, Intervals, Spans, box, local_side, local_spans
from hires_kernels.orders import inverse, permutation
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from hires.figures.style import PAGE_WIDTH, panels, style

ORDERS = {"hilbert": "Hilbert", "morton": "Morton", "window": "window-first", "raster": "raster"}

_TEXT, _HIGH, _LOW, _QUERY = "#117733", "#332288", "#c9a227", "#cc6677"
_SHADES = dict(zip(ORDERS, (_HIGH, "#44aa99", "#882255", "#8a8a8a")))
_MARKERS = dict(zip(ORDERS, "o^sX"))
Layout = tuple[str, str]  # form, LR neighbours


def visibility(grid: Grid, low_grid: Grid, text: int, form: str, reach: int, neighbours: str = "row") -> Tensor:
    """Boolean (tokens, tokens): which keys a query of [text | HR | LR] sees; both grids in raster order.

    HR sees text, its own neighbourhood ("radius": a box around the token, "window": a tiling, both of `reach` tokens)
    and the LR tokens of its place and beside it; text sees text and HR; LR sees LR (Scale-DiT, section 3.2).
    """
    high, low = grid[0] * grid[1], low_grid[0] * low_grid[1]
    near, far = local_spans(grid, form, reach, low_grid, neighbours)
    seen = torch.zeros(text + high + low, text + high + low, dtype=torch.bool)
    seen[: text + high, :text] = True
    seen[:text, text : text + high] = True
    seen[text : text + high, text : text + high] = _product(near, grid)
    seen[text : text + high, text + high :] = _product(far, low_grid)
    seen[text + high :, text + high :] = _product(_low_spans(grid, low_grid, form, reach), low_grid)
    return seen


def sequence(order: str, grid: Grid, low_grid: Grid, text: int, form: str, reach: int) -> Tensor:
    """Integer tensor (tokens,): the place in [text | HR | LR] in raster order of the token at each place of `order`.

    "window" goes through the windows that attention has: HR of side `reach` (a box of radius r counts as 2r), LR of
    the share of it that lies there.
    """
    side = local_side(form, reach)
    high = permutation(order, grid, (side, side))
    low_side = [max(1, side * keys // length) for keys, length in zip(low_grid, grid)]
    low = permutation(order, low_grid, (low_side[0], low_side[1]))
    return torch.cat([torch.arange(text), text + high, text + len(high) + low])


def block_map(
    order: str, grid: Grid, low_grid: Grid, text: int, radius: int, block: tuple[int, int] = (128, 64)
) -> Tensor:
    """Boolean (query blocks, key blocks) of the sequence [text | HR | LR]: true where some query sees some key.

    What a kernel that skips whole blocks has to compute. The box of `radius`, LR neighbours in the row.
    """
    high = grid[0] * grid[1]
    place = inverse(sequence(order, grid, low_grid, text, "radius", radius))
    queries, keys = place // block[0], place // block[1]
    shape = -(-len(place) // block[0]), -(-len(place) // block[1])
    found = torch.zeros(shape, dtype=torch.bool)
    text_rows, text_columns = -(-text // block[0]), -(-text // block[1])
    image_rows, image_columns = -(-(text + high) // block[0]), -(-(text + high) // block[1])
    found[:image_rows, :text_columns] = True
    found[:text_rows, :image_columns] = True
    near, far = local_spans(grid, "radius", radius, low_grid, "row")
    high_part, low_part = slice(text, text + high), slice(text + high, None)
    parts = [
        (queries[high_part].view(grid), near, keys[high_part].view(grid)),
        (queries[high_part].view(grid), far, keys[low_part].view(low_grid)),
        (queries[low_part].view(low_grid), _low_spans(grid, low_grid, "radius", radius), keys[low_part].view(low_grid)),
    ]
    for part in parts:
        found[_block_pairs(*part)] = True
    return found


def block_shares(
    sides: Sequence[int], radius: int, ratio: int, text: int, block: tuple[int, int] = (128, 64)
) -> pd.DataFrame:
    """Columns side, order, share: of the blocks of `block_map` those that hold a visible pair.

    Order "pairs" has the share of pairs of tokens that are visible, below which no order can come.
    """
    rows = []
    for side in sides:
        grid, low_grid = (side, side), (side // ratio, side // ratio)
        for order in ORDERS:
            share = block_map(order, grid, low_grid, text, radius, block).double().mean().item()
            rows.append({"side": side, "order": order, "share": share})
        high, low = side**2, (side // ratio) ** 2
        near, far = local_spans(grid, "radius", radius, low_grid, "row")
        pairs = sum(map(_count, (near, far, _low_spans(grid, low_grid, "radius", radius))))
        pairs += text * (text + 2 * high)
        rows.append({"side": side, "order": "pairs", "share": pairs / (text + high + low) ** 2})
    return pd.DataFrame(rows)


def attention_masks(grid: Grid, low_grid: Grid, text: int, reaches: Mapping[str, int], orders: Sequence[str]) -> Figure:
    """`visibility` with LR neighbours in the row: a row of panels for each form and its reach, a column for each order.

    Rows of a panel are queries, columns keys, coloured by what the key is.
    """
    high = grid[0] * grid[1]
    kind = torch.full((text + high + low_grid[0] * low_grid[1],), 3)
    kind[: text + high], kind[:text] = 2, 1
    edges = [text - 0.5, text + high - 0.5]
    middles = [text / 2, text + high / 2, (text + high + len(kind)) / 2]
    with style():
        side = PAGE_WIDTH / len(orders)
        figure, axes = panels(len(reaches), len(orders), len(reaches) * side + 0.2)
        for line, (form, reach) in zip(axes, reaches.items()):
            seen = visibility(grid, low_grid, text, form, reach)
            for axis, order in zip(line, orders):
                places = sequence(order, grid, low_grid, text, form, reach)
                picture = (seen[places][:, places] * kind).numpy()
                colours = ListedColormap(["white", _TEXT, _HIGH, _LOW])
                axis.imshow(picture, cmap=colours, vmin=0, vmax=3, interpolation="nearest")
                axis.grid(False)
                axis.spines[:].set_visible(True)
                for edge in edges:
                    axis.axhline(edge, color="#555555", linewidth=0.5)
                    axis.axvline(edge, color="#555555", linewidth=0.5)
                axis.set_xticks(middles, ["text", "HR", "LR"])
                axis.set_yticks(middles, ["text", "HR", "LR"])
                axis.tick_params(length=0)
                axis.set_title(f"{_form(form, reach)}, {ORDERS[order]} order", loc="left")
            line[0].set_ylabel("queries")
        for axis in axes[-1]:
            axis.set_xlabel("keys")
    return figure


def seen_keys(grid: Grid, low_grid: Grid, query: tuple[int, int], layouts: Sequence[Layout], reach: int) -> Figure:
    """The keys of one HR query: a column for each (form, LR neighbours); above in the HR grid, below in the LR grid.

    A box has the radius `reach`, a window twice that side. Both grids cover the same picture.
    """
    with style():
        width = PAGE_WIDTH / len(layouts)
        figure, axes = panels(2, len(layouts), 2 * width * grid[0] / grid[1] + 0.6)
        for column, (form, neighbours) in zip(axes.T, layouts):
            side = reach if form == "radius" else 2 * reach
            spans = local_spans(grid, form, side, low_grid, neighbours)
            at = query[0] * low_grid[0] // grid[0], query[1] * low_grid[1] // grid[1]
            counts = []
            for axis, cells, place, span, shade in zip(
                column, (grid, low_grid), (query, at), spans, (_HIGH, _LOW), strict=True
            ):
                rows, columns = (_range(part, i) for part, i in zip(span, query))
                _cells(axis, cells)
                axis.add_patch(_area(rows, columns, facecolor=shade, alpha=0.55))
                looks = {"facecolor": _QUERY} if axis is column[0] else {"fill": False, "edgecolor": _QUERY, "lw": 1.5}
                axis.add_patch(Rectangle((place[1], place[0]), 1, 1, **looks))
                counts.append(len(rows) * len(columns))
            beside = {"row": "left and right", "all": "all around"}[neighbours]
            column[0].set_title(f"{_form(form, side)}\n{counts[0]} HR keys", loc="left")
            column[1].set_title(f"LR neighbours {beside}\n{counts[1]} LR keys", loc="left")
        axes[0, 0].set_ylabel("HR row (tokens)")
        axes[1, 0].set_ylabel("LR row (tokens)")
        for axis in axes[1]:
            axis.set_xlabel("column (tokens)")
    return figure


def token_orders(grid: Grid, window: int) -> Figure:
    """Each token order as a line through the grid, from dark to bright; `window` is the side for window-first."""
    with style():
        figure, (axes,) = panels(1, len(ORDERS), PAGE_WIDTH / len(ORDERS) * grid[0] / grid[1] + 0.2)
        for axis, (order, name) in zip(axes, ORDERS.items()):
            places = permutation(order, grid, (window, window)).numpy()
            points = np.stack([places % grid[1], places // grid[1]], axis=1) + 0.5
            _cells(axis, grid)
            lines = LineCollection(list(np.stack([points[:-1], points[1:]], axis=1)), cmap="viridis", linewidth=1.2)
            lines.set_array(np.arange(len(points) - 1))
            axis.add_collection(lines)
            axis.set_title(name, loc="left")
            axis.set_xlabel("column (tokens)")
        axes[0].set_ylabel("row (tokens)")
    return figure


def blocks(shares: pd.DataFrame, maps: Mapping[str, Tensor], side: int, pixels: int = 16) -> Figure:
    """The shares of `block_shares` against the image's side, and the block maps of some orders on `side`² tokens.

    `pixels`: side of a token.
    """
    with style():
        figure, (axes,) = panels(1, 1 + len(maps), 2.6, width_ratios=[1.25, *[1] * len(maps)])
        sides = sorted(set(shares["side"]))
        for order, rows in shares.groupby("order", sort=False):
            look: dict[str, Any] = {"color": "black", "linestyle": ":", "label": "visible pairs of tokens"}
            if order in ORDERS:
                look = {"color": _SHADES[order], "marker": _MARKERS[order], "label": ORDERS[order]}
                look |= {"markersize": 7, "fillstyle": "none"} if order == "hilbert" else {}
            axes[0].plot(rows["side"], 100 * rows["share"], **look)
        axes[0].set(xscale="log", yscale="log", xlabel="side of the image (pixels)", ylabel="blocks computed (%)")
        axes[0].set_xticks(sides, [f"{side * pixels}" for side in sides])
        ticks = [tick for tick in (0.1, 0.3, 1, 3, 10, 30, 100) if tick >= 50 * shares["share"].min()]
        axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[0].minorticks_off()
        axes[0].set_title("share of blocks with a visible pair", loc="left")
        for axis, (order, found) in zip(axes[1:], maps.items()):
            two = ListedColormap(["white", _SHADES[order]])
            axis.imshow(found.numpy(), cmap=two, aspect="auto", interpolation="nearest")
            axis.grid(False)
            axis.spines[:].set_visible(True)
            share = 100 * found.double().mean()
            axis.set_title(f"{ORDERS[order]}, {side * pixels}²: {share:.1f} %", loc="left")
            axis.set_xlabel("block of keys")
        axes[1].set_ylabel("block of queries")
        figure.legend(loc="outside lower center", ncols=5)
    return figure


def anchor_places(grid: Grid, low_grid: Grid) -> Figure:
    """Where the LR tokens stand among the HR positions: with scaled positional anchors, and without."""
    from hires.attention.flux import image_ids  # imports diffusers

    rows, columns = (x.flatten() for x in np.mgrid[: grid[0], : grid[1]])
    with style():
        figure, (axes,) = panels(1, 2, 0.8 * PAGE_WIDTH / 2 * grid[0] / grid[1] + 0.7)
        for axis, scaled in zip(axes, (True, False)):
            places = image_ids(low_grid, torch.device("cpu"), grid if scaled else None).numpy()
            axis.grid(False)
            axis.plot(columns, rows, ".", color=_HIGH, alpha=0.4, markersize=3, label="HR token")
            axis.plot(places[:, 2], places[:, 1], "s", color=_LOW, markersize=5, label="LR token")
            axis.set(xlim=(-1, grid[1]), ylim=(grid[0], -1), aspect="equal", xlabel="column position (HR tokens)")
            axis.set_title("scaled: (s·i, s·j)" if scaled else "unscaled: (i, j)", loc="left")
        axes[0].set_ylabel("row position (HR tokens)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def training_curve(log: Sequence[Mapping[str, float]], validation: Sequence[Mapping[str, float]] = ()) -> Figure:
    """The loss of an adapter's training, and of its validation samples where there are any: rows with step and loss."""
    rows, looks = pd.DataFrame(log), pd.DataFrame(validation)
    with style():
        figure, ((axis,),) = panels(1, 1, 2.3)
        axis.plot(rows["step"], rows["loss"], color=_HIGH, alpha=0.35, linewidth=0.8, label="training, each log row")
        smooth = rows["loss"].rolling(max(1, len(rows) // 20), center=True, min_periods=1).mean()
        axis.plot(rows["step"], smooth, color=_HIGH, label="training, running mean")
        if len(looks):
            axis.plot(looks["step"], looks["loss"], "o-", color=_QUERY, label="validation samples")
        axis.set(xlabel="optimiser step", ylabel="loss (MSE of the HR velocity)")
        axis.legend()
    return figure


def _low_spans(grid: Grid, low_grid: Grid, form: str, reach: int) -> Spans:
    """What LR sees of LR."""
    from hires.attention.scale_dit import low_resolution_radius  # imports diffusers

    radius, window = (reach, None) if form == "radius" else (None, reach)
    low_radius = low_resolution_radius(radius, window, grid, low_grid)
    return box(low_grid[0], low_radius), box(low_grid[1], low_radius)


def _product(spans: Spans, keys: Grid) -> Tensor:
    rows, columns = (span.mask(length) for span, length in zip(spans, keys))
    both = rows[:, None, :, None] & columns[None, :, None, :]
    return both.flatten(2).flatten(0, 1)


def _block_pairs(queries: Tensor, spans: Spans, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(block of queries, block of keys) of every visible pair; `queries` and `keys` hold the block of each token.

    One axis after the other: tokens of one block see much the same rows.
    """
    rows, columns = (x.flatten() for x in torch.meshgrid(*map(torch.arange, queries.shape), indexing="ij"))
    seen, inside = _expanded(spans[0], rows)
    height, width = len(keys), queries.shape[1]
    code = ((queries.flatten() * height * width + columns)[:, None] + seen * width)[inside].unique()
    block, row, column = code // (height * width), code // width % height, code % width
    seen, inside = _expanded(spans[1], column)
    found = keys[row[:, None], seen.clamp(max=keys.shape[1] - 1)]
    return block[:, None].expand_as(found)[inside], found[inside]


def _expanded(axis: Intervals, at: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (n, most) that queries at these places see, and which of them count."""
    seen = axis.low[at][:, None] + torch.arange(int((axis.high - axis.low).max()))
    return seen, seen < axis.high[at][:, None]


def _count(spans: Spans) -> int:
    rows, columns = (int((axis.high - axis.low).sum()) for axis in spans)
    return rows * columns


def _range(axis: Intervals, at: int) -> range:
    return range(int(axis.low[at]), int(axis.high[at]))


def _form(form: str, reach: int) -> str:
    return f"box of radius {reach}" if form == "radius" else f"windows of side {reach}"


def _area(rows: range, columns: range, **look) -> Rectangle:
    return Rectangle((columns.start, rows.start), len(columns), len(rows), **look)


def _cells(axis: Axes, grid: Grid) -> None:
    height, width = grid
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xticks=[0, width], yticks=[0, height])
    axis.set_xticks(range(width + 1), minor=True)
    axis.set_yticks(range(height + 1), minor=True)
    axis.tick_params(which="both", length=0)
    axis.grid(which="minor", color="#dddddd", linewidth=0.4)
    axis.spines[:].set_visible(True)
