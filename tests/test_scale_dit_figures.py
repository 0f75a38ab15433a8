"""The pictures of Scale-DiT: what they draw is what attention does, and the block counts are the published ones."""

import hires_kernels
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from PIL import Image

from hires import figures
from hires.attention.scale_dit import low_resolution_radius
from hires.figures import scale_dit

GRID, LOW, TEXT = (8, 12), (4, 6), 3
CASES = [("radius", 1, "row"), ("radius", 2, "all"), ("window", 4, "row"), ("window", 2, "all")]


def drawn(figure, folder, name="figure"):
    figures.save(figure, folder, name)
    return np.asarray(Image.open(folder / "figures" / f"{name}.png").convert("RGB")).astype(float)


def has_colour(pixels, colour):
    return (np.abs(pixels - np.array(to_rgb(colour)) * 255).max(-1) < 12).sum() > 20


def seen_by(tokens, first, grid, text=0, guidance_grid=None, **options):
    """Which of `tokens` keys attention gives weight: equal scores, and each value its token's own direction."""
    image, low = grid[0] * grid[1], 0 if guidance_grid is None else guidance_grid[0] * guidance_grid[1]
    own = torch.eye(tokens)[None, :, None]
    flat = torch.zeros_like(own)

    def part(start, length):
        return flat[:, start : start + length], own[:, start : start + length]

    key, value = part(first, image)
    if text:
        options["text"] = (part(0, text)[0], *part(0, text))
    if low:
        options |= {"guidance": part(first + image, low), "guidance_grid": guidance_grid}
    rows, text_rows = hires_kernels.local_attention(key, key, value, grid=grid, backend="reference", **options)
    rows = rows if text_rows is None else torch.cat([text_rows, rows], 1)
    return rows[0, :, 0] > 0


@pytest.mark.parametrize(("form", "reach", "neighbours"), CASES)
def test_the_mask_is_what_attention_does(form, reach, neighbours):
    mask = scale_dit.visibility(GRID, LOW, TEXT, form, reach, neighbours)
    tokens, first = len(mask), TEXT + GRID[0] * GRID[1]
    options = {form: reach, "guidance_neighbours": neighbours}
    assert torch.equal(mask[:first], seen_by(tokens, TEXT, GRID, text=TEXT, guidance_grid=LOW, **options))
    radius = low_resolution_radius(*((reach, None) if form == "radius" else (None, reach)), GRID, LOW)
    assert torch.equal(mask[first:], seen_by(tokens, first, LOW, radius=radius))


@pytest.mark.parametrize("order", scale_dit.ORDERS)
@pytest.mark.parametrize(("text", "block"), [(3, (16, 8)), (16, (16, 8)), (0, (7, 5))])
def test_a_block_counts_where_one_of_its_pairs_is_seen(order, text, block):
    places = scale_dit.sequence(order, GRID, LOW, text, "radius", 2)
    mask = scale_dit.visibility(GRID, LOW, text, "radius", 2)[places][:, places]
    found = scale_dit.block_map(order, GRID, LOW, text, 2, block)
    expected = torch.tensor([[part.any() for part in rows.split(block[1], 1)] for rows in mask.split(block[0])])
    assert torch.equal(found, expected)
    assert not found.all()


def test_window_first_blocks_are_as_many_as_published():
    """Scale-DiT's authors: 2.98 % of the blocks of 128 queries and 64 keys at 4096², FLUX.1 with 512 text tokens."""
    found = scale_dit.block_map("window", (256, 256), (64, 64), 512, 8)
    assert found.double().mean() == pytest.approx(0.0298, rel=0.005)


def test_shares_lie_above_that_of_the_pairs():
    shares = scale_dit.block_shares([8, 16], radius=2, ratio=4, text=8, block=(16, 8))
    table = shares.pivot(index="side", columns="order", values="share")
    for side in (8, 16):
        mask = scale_dit.visibility((side, side), (side // 4, side // 4), 8, "radius", 2)
        assert table.loc[side, "pairs"] == pytest.approx(mask.double().mean().item())
        assert (table.loc[side] >= table.loc[side, "pairs"]).all()
    assert table.loc[16, "hilbert"] < table.loc[16, "raster"]


def test_masks_show_every_kind_of_key(tmp_path):
    figure = figures.attention_masks((16, 16), (4, 4), 8, {"radius": 2, "window": 4}, ["raster", "hilbert"])
    pictures = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert len(pictures) == 4
    for picture, form, reach in zip(pictures[::2], ("radius", "window"), (2, 4)):
        assert np.array_equal(picture > 0, scale_dit.visibility((16, 16), (4, 4), 8, form, reach).numpy())
        assert [set(np.unique(part)) for part in np.split(picture, [8, 264], 1)] == [{0, 1}, {0, 2}, {0, 3}]
    pixels = drawn(figure, tmp_path)
    assert all(has_colour(pixels, colour) for colour in ("#117733", "#332288", "#c9a227"))


def test_one_query_and_its_keys(tmp_path):
    figure = figures.seen_keys((32, 32), (8, 8), (13, 18), [("radius", "row"), ("window", "all")], 4)
    boxes = [axis.patches[0].get_bbox().bounds for axis in figure.axes]
    assert boxes[0] == (14, 9, 9, 9)  # left, top, width, height
    assert boxes[1] == (16, 8, 8, 8)
    assert boxes[2] == (2, 2, 6, 2)
    assert boxes[3] == (2, 0, 6, 6)
    assert "81 HR keys" in figure.axes[0].get_title(loc="left")
    assert "36 LR keys" in figure.axes[3].get_title(loc="left")
    drawn(figure, tmp_path)


def test_orders_are_drawn_as_they_are(tmp_path):
    figure = figures.token_orders((8, 8), 4)
    steps = {}
    for axis, name in zip(figure.axes, scale_dit.ORDERS):
        (lines,) = (c for c in axis.collections if isinstance(c, LineCollection))
        ends = np.array(lines.get_segments())
        assert len(ends) == 63
        steps[name] = np.abs(ends[:, 1] - ends[:, 0]).sum(1)
    assert (steps["hilbert"] == 1).all()
    assert steps["raster"].max() == 8
    assert np.count_nonzero(steps["window"] > 4) == 1  # from the end of one row of windows to the next
    drawn(figure, tmp_path)


def test_anchors_blocks_and_training_are_drawn(tmp_path):
    figure = figures.anchor_places((8, 8), (2, 2))
    scaled, unscaled = (axis.lines[1].get_xydata().tolist() for axis in figure.axes)
    assert scaled == [[0, 0], [4, 0], [0, 4], [4, 4]]
    assert unscaled == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert has_colour(drawn(figure, tmp_path), "#c9a227")
    shares = figures.block_shares([8, 16], radius=2, ratio=4, text=8)
    maps = {order: figures.block_map(order, (16, 16), (4, 4), 8, 2, (16, 8)) for order in ("hilbert", "raster")}
    figure = figures.blocks(shares, maps, 16)
    assert [line.get_label() for line in figure.axes[0].lines][-1] == "visible pairs of tokens"
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx(
        (100 * shares.loc[shares["order"] == "hilbert", "share"]).tolist()
    )
    assert has_colour(drawn(figure, tmp_path), "#332288")
    log = [{"step": 10 * i, "loss": 1 / i, "lr": 0.1} for i in range(1, 40)]
    (axis,) = figures.training_curve(log, [{"step": 0, "loss": 0.9}, {"step": 390, "loss": 0.2}]).axes
    assert axis.lines[0].get_ydata().tolist() == [row["loss"] for row in log]
    assert axis.lines[2].get_xydata().tolist() == [[0, 0.9], [390, 0.2]]
