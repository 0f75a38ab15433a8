"""Figures and tables on a small results folder: they draw what is there, and print what the parquet files hold."""

import numpy as np
import pandas as pd
import pytest
import results_tree
import torch
from matplotlib import colors
from PIL import Image

from hires import figures
from hires.analysis import tables
from hires.analysis.results import TRUE, Results, where
from hires.errors import HiresError
from hires.figures.style import short
from hires.variants import VARIANTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Results.open(results_tree.build(tmp_path_factory.mktemp("results")))


def drawn(figure, tmp_path, name="figure"):
    """Save a figure; its PNG as an array."""
    figures.save(figure, tmp_path, name)
    assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    return np.asarray(Image.open(tmp_path / "figures" / f"{name}.png").convert("RGB"))


def has_colour(pixels, colour):
    """Whether a few pixels have this colour (antialiasing aside)."""
    rgb = np.array(colors.to_rgb(colour)) * 255
    return (np.abs(pixels.astype(float) - rgb).max(-1) < 12).sum() > 5


def test_results_need_a_table(tmp_path):
    with pytest.raises(HiresError, match=r"no metrics\.parquet"):
        Results.open(tmp_path)


def test_results_resolve_against_the_repository_root(monkeypatch, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "published.csv").touch()
    (tmp_path / "notebooks").mkdir()
    results_tree.build(tmp_path / "results" / "embedded", backbones=["tiny-flux"], variants=["npa"])
    monkeypatch.chdir(tmp_path / "notebooks")
    opened = Results.open("results/embedded", "results/figures")
    assert opened.path == tmp_path / "results" / "embedded"
    assert opened.output == tmp_path / "results" / "figures"


def test_images_come_in_the_order_of_the_prompts(run):
    shown = run.pictures(2, study="main", backbone="tiny-flux")
    assert [prompt for prompt, _ in shown] == list(run.prompts["prompt"][:2])
    assert set(shown[0][1]) == {TRUE, *results_tree.VARIANTS}
    assert np.array_equal(np.asarray(shown[1][1]["npa"]), np.asarray(results_tree.picture(64, 1, 0.1 + 0.15 * 2)))


def test_scores_hold_the_true_images_of_every_backbone(run):
    scores = run.scores("main")
    for backbone in results_tree.BACKBONES:
        row = where(scores, backbone=backbone, variant=TRUE, metric="fid").iloc[0]
        assert row["value"] == results_tree.SCORES["fid"] / 2


def test_table_prints_the_numbers_of_the_parquet(run):
    stored = where(pd.read_parquet(run.path / "metrics.parquet"), study="main", backbone="tiny-sdxl", variant="npa+lfm")
    shown = where(tables.scores(run.scores("main")), backbone="tiny-sdxl", variant="npa+lfm").iloc[0]
    for name, scale in (("clip", 1), ("kid", 1000), ("fid", 1)):
        row = where(stored, metric=name).iloc[0]
        text = shown[tables.metric(name).title]
        numbers = [float(part) for part in text.rstrip("†").replace("[", "").replace("]", "").replace(",", "").split()]
        digits = len(text.split()[0].partition(".")[2])
        assert numbers == [round(row[column] * scale, digits) for column in ("value", "low", "high")]
        assert text.endswith("†") == bool(row["flag"])
    assert shown["n"] == "3"


def test_absent_scores_are_dashes(run):
    scores = run.scores("main")
    some = scores[~((scores["variant"] == "direct") & (scores["metric"] == "clip"))]
    shown = tables.scores(some).set_index(["backbone", "variant"])
    title = tables.metric("clip").title
    assert shown.loc[("tiny-flux", "direct"), title] == "–"
    assert "[" in shown.loc[("tiny-flux", "npa"), title]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.4123, 0.31, 0.52), "0.41 [0.31, 0.52]"),
        ((61.87, 55.0, 71.2), "62 [55, 71]"),
        ((0.00412, 0.00401, 0.00422), "0.00412 [0.00401, 0.00422]"),
        ((-0.2, -0.35, -0.05), "−0.20 [−0.35, −0.05]"),
        ((3.0, 3.0, 3.0), "3.00"),
        ((-0.001, -0.9, 0.9), "0.0 [−0.9, 0.9]"),
    ],
)
def test_interval_shows_what_its_width_supports(numbers, text):
    assert tables.interval(*numbers) == text


def test_contrasts_turn_pairs_round(run):
    stored = where(run.paired, backbone="tiny-flux", metric="repetition").iloc[0]
    turned = where(tables.contrasts(run.paired), backbone="tiny-flux", metric="repetition")
    assert (stored["a"], stored["b"]) == ("npa", "scalediff")
    assert len(turned) == 1
    row = turned.iloc[0]
    assert (row["a"], row["b"]) == ("scalediff", "npa")
    assert (row["difference"], row["low"], row["high"]) == (-stored["difference"], -stored["high"], -stored["low"])


def test_differences_are_bold_where_zero_is_left_out(run):
    shown = tables.differences(tables.contrasts(run.paired)).iloc[0]
    assert shown[tables.metric("repetition").title] == "**−0.20 [−0.35, −0.05]**"
    assert tables.excludes_zero(-2, -1) and not tables.excludes_zero(-1, 1) and not tables.excludes_zero(-1, -1)
    assert shown[tables.metric("clip").title] == "+0.10 [−0.05, +0.25]"


@pytest.fixture
def between():
    """Differences of scale-dit's settings, as hires.metrics.paired writes them."""
    place = {"study": "s", "setting": "between", "backbone": "tiny-flux", "height": 64, "width": 64, "n": 9}
    rows = [("count", 0.3, 0.1, 0.5), ("kid_patch", 0.002, 0.001, 0.003), ("repetition", -0.1, -0.4, 0.2)]
    names = {"a": "scale-dit, default", "b": "scale-dit, no-lr-keys"}
    values = [dict(zip(("metric", "difference", "low", "high"), row)) for row in rows]
    return pd.DataFrame([{**place, **names, **row} for row in values])


def test_settings_are_contrasted_under_the_variant_they_share(between, tmp_path):
    pairs = tables.against("scale-dit", ["default", "no-lr-keys", "absent"])
    assert pairs == [("scale-dit, default", "scale-dit, no-lr-keys"), ("scale-dit, default", "scale-dit, absent")]
    chosen = tables.contrasts(between, pairs)
    (shown,) = tables.differences(chosen).to_dict("records")
    assert shown["a − b"] == "scale-dit: default − no-lr-keys"
    assert shown[tables.metric("count").title] == "**+0.30 [+0.10, +0.50]**"
    assert tables.pair_label("scale-dit", "upsample") == "scale-dit − upsample"
    assert tables.pair_label("npa, x", "scalediff, x") == "npa, x − scalediff, x"
    figure = figures.paired_differences(chosen)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["scale-dit: default − no-lr-keys"]
    assert has_colour(drawn(figure, tmp_path), figures.colour("scale-dit"))


def test_outcomes_stand_beside_what_was_expected(between):
    pair = ("scale-dit, default", "scale-dit, no-lr-keys")
    sides = {"count": "higher", "kid_patch": "lower", "repetition": "lower", "spectrum": "lower"}
    shown = tables.outcomes(between, [(*pair, sides)])
    said = ["as expected", "the opposite", "no difference can be told", "–"]
    assert shown["outcome"].tolist() == said
    assert shown["found"].tolist() == ["+0.30 [+0.10, +0.50]", "+2.0 [+1.0, +3.0]", "−0.10 [−0.40, +0.20]", "–"]
    turned = tables.outcomes(between, [(*reversed(pair), sides)])
    assert turned["outcome"].tolist() == ["the opposite", "as expected", *said[2:]]
    assert turned["found"][0] == "−0.30 [−0.50, −0.10]"


def test_findings_name_the_best_and_the_tested(run):
    scores = run.scores("main")
    said = tables.findings(scores, run.paired)
    assert list(said) == ["tiny-flux at 64x64", "tiny-sdxl at 64x64"]
    said = said["tiny-flux at 64x64"]
    rows = where(scores, backbone="tiny-flux", metric="repetition", variant=list(results_tree.VARIANTS))
    best = rows.loc[rows["value"].idxmin(), "variant"]
    repetition = next(s for s in said if s.startswith(f"{best} has the lowest repeated objects"))
    assert repetition.endswith("scalediff − npa on the same images: −0.20 [−0.35, −0.05], better.")
    assert "true images have 0.25" in repetition
    assert any("CLIP" in s and s.endswith("no difference can be told.") for s in said)
    assert said[-1] == "Too few images to rank variants by FID: the tables mark them †."


def test_published_numbers_stand_beside_ours(run):
    printed = tables.published("ScaleDiff", "ablation")
    shown = tables.beside(run.scores("main"), printed, "ScaleDiff")
    paper = shown[shown["source"] == "ScaleDiff, printed"].set_index("variant")
    assert paper.loc["scalediff", tables.metric("fid").title] == "61.87"
    assert paper.loc["scalediff", tables.metric("kid").title] == "2.5"
    ours = shown[shown["source"] == "this run"]
    assert "upsample" not in set(ours["variant"])
    assert {"npa", "scalediff", TRUE} <= set(ours["variant"])


def test_written_tables_hold_every_row_unrounded(run, tmp_path):
    tidy = run.scores("main")
    text = tables.write(tmp_path, "variants", tidy, tables.scores(tidy))
    again = pd.read_csv(tmp_path / "tables" / "variants.csv", keep_default_na=False)
    assert again["value"].tolist() == tidy["value"].tolist()
    assert text == (tmp_path / "tables" / "variants.md").read_text()
    assert text.count("\n") == 2 + 2 * (1 + len(results_tree.VARIANTS))


def test_protocols_stand_once_per_metric_and_size(run):
    shown = tables.protocols(run.scores("main"))
    assert set(shown["metric"]) == {tables.metric(name).label for name in results_tree.SCORES}
    assert not shown.duplicated().any()
    assert set(shown["protocol"]) == {"test"}


def test_every_variant_has_a_look_of_its_own():
    names = [TRUE, *VARIANTS]
    assert len({figures.colour(name) for name in names}) == len(names)
    assert figures.colour("my-variant") == figures.colour("my-variant")


def test_score_points_draw_each_variant(run, tmp_path):
    rows = where(run.scores("main"), backbone="tiny-flux")
    pixels = drawn(figures.score_points(rows), tmp_path)
    for variant in results_tree.VARIANTS:
        assert has_colour(pixels, figures.colour(variant))
    fewer = where(rows, variant=["upsample", "npa"])
    fewer = fewer[~((fewer["variant"] == "npa") & (fewer["metric"] == "clip"))]
    pixels = drawn(figures.score_points(fewer), tmp_path)
    assert has_colour(pixels, figures.colour("npa"))
    assert not has_colour(pixels, figures.colour("scalediff"))


def test_differences_of_a_thousandth_do_not_fill_a_panel(run):
    rows = where(run.scores("main"), backbone="tiny-flux", metric="clip")

    def limits(step):
        values = [30 + step * k for k in range(len(rows))]
        return figures.score_points(rows.assign(value=values, low=values, high=values)).axes[0].get_xlim()

    assert limits(0.001) == pytest.approx((28.5, 31.5), abs=0.02)
    assert limits(1)[0] > 29  # wide enough by itself


def test_outliers_are_told_at_the_edge(run, tmp_path):
    rows = where(run.scores("main"), backbone="tiny-flux", metric="clip").drop_duplicates("variant")
    truth = rows["variant"] == TRUE
    values = np.where(truth, 500.0, 30 + np.arange(len(rows)) % 3)
    far = np.flatnonzero(~truth)[-1]
    values[far] = -4000.0
    (axis,) = figures.score_points(rows.assign(value=values, low=values - 1, high=values + 1)).axes
    assert [text.get_text() for text in axis.texts] == ["−4000"]  # true images stay inside
    left, right = axis.get_xlim()
    assert -600 < left < 0 and right > 500
    (arrow,) = [line for line in axis.lines if line.get_marker() == "<"]
    assert arrow.get_ydata()[0] == tables.variants_of(rows).index(rows["variant"].iloc[far])

    pairs = [("npa", "upsample", 0.2), ("npa", "direct", -0.3), ("npa", "scalediff", 0.1), ("direct", "upsample", 40.0)]
    place = {"backbone": "tiny-flux", "height": 64, "width": 64, "metric": "clip", "n": 9}
    near = pd.DataFrame(
        [{**place, "a": a, "b": b, "difference": d, "low": d - 0.1, "high": d + 0.1} for a, b, d in pairs]
    )
    figure = figures.paired_differences(near)
    assert [text.get_text() for text in figure.axes[0].texts] == ["+40"]
    assert figure.axes[0].get_xlim()[1] < 3 and "outside the panel" in figure.get_supxlabel()
    assert "outside" not in figures.paired_differences(near[:3]).get_supxlabel()
    wide = near.assign(high=near["high"].where(near["difference"] != 0.1, 1.9))  # still within five times the usual
    arrows = [line for line in figures.paired_differences(wide).axes[0].lines if line.get_marker() == ">"]
    assert [line.get_xdata().tolist() for line in arrows] == [[1.9]]


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [
        (0.0293, "+", "+.029"),
        (-0.5, "+", "−.5"),
        (-1.44, "+", "−1.4"),
        (330.2, "+", "+330"),
        (0, "+", "0"),
        (0.25, "", ".25"),
        (10.4, "", "10"),
    ],
)
def test_numbers_in_cells_are_short(value, sign, text):
    assert short(value, sign) == text


def test_a_figure_is_redrawn_in_other_colours_and_letters(run, tmp_path, monkeypatch):
    monkeypatch.setitem(figures.LOOKS, "npa", ("#ff00ff", "s"))
    monkeypatch.setitem(figures.RC, "font.family", ["serif"])
    figure = figures.score_points(where(run.scores("main"), backbone="tiny-flux"))
    assert has_colour(drawn(figure, tmp_path), "#ff00ff")
    assert figure.axes[0].xaxis.label.get_fontfamily() == ["serif"]


def test_same_figure_same_bytes(run, tmp_path):
    rows = where(run.scores("main"), backbone="tiny-flux", metric=["clip", "fid"])
    for name in ("a", "b"):
        figures.save(figures.score_points(rows), tmp_path, name)
    for kind in ("png", "pdf"):
        assert (tmp_path / "figures" / f"a.{kind}").read_bytes() == (tmp_path / "figures" / f"b.{kind}").read_bytes()


def test_paired_and_sweep_figures(run, tmp_path):
    paired = where(tables.contrasts(run.paired), backbone="tiny-flux")
    assert has_colour(drawn(figures.paired_differences(paired), tmp_path), figures.colour("scalediff"))
    rows = run.scores("tau")
    rows = rows.assign(tau=rows["setting"].str[4:].astype(float))
    figure = figures.sweep(rows, "tau", ["count", "absent", "repetition"], "τ")
    panels = [axis for axis in figure.axes if axis.lines]
    assert len(panels) == 4
    assert panels[0].lines[1].get_xdata().tolist() == [300, 500]
    pixels = drawn(figure, tmp_path)
    assert has_colour(pixels, figures.colour("npa"))
    assert has_colour(pixels, figures.colour("scalediff"))


def test_every_pair_has_a_cell_and_its_negative(tmp_path):
    tests = [("npa", "scalediff", 20.0, 0.01), ("npa", "upsample", -3.0, 0.4), ("scalediff", "upsample", -23.0, 0.001)]
    rows = [
        {
            "backbone": "tiny-flux",
            "height": 64,
            "width": 64,
            "metric": metric,
            "a": a,
            "b": b,
            "difference": d,
            "n": 9,
            "p_holm": p,
        }
        for metric in ("repetition", "count")
        for a, b, d, p in tests
    ]
    figure = figures.every_pair(pd.DataFrame(rows), ["repetition", "kid", "count"])
    fewer, right = (axis for axis in figure.axes if axis.texts)
    cells = fewer.images[0].get_array()  # upsample, npa, scalediff
    assert cells.tolist() == [[2, 0, -1], [0, 2, -1], [1, 1, 2]]
    assert (right.images[0].get_array() == np.where(cells == 2, 2, -cells)).all()
    assert sorted(text.get_text() for text in fewer.texts) == sorted(["+20", "−20", "+3", "−3", "+23", "−23"])
    assert [label.get_text() for label in fewer.get_yticklabels()] == ["upsample", "npa", "scalediff"]
    drawn(figure, tmp_path)


def sides(values, metric="repetition"):
    """Scores at ×2, ×4, …: value, half width."""
    rows = [
        {"factor": 2**k, "value": v, "low": v - h, "high": v + h, "n": 9, "flag": ""}
        for k, (v, h) in enumerate(values, 1)
    ]
    return pd.DataFrame(rows).assign(backbone="tiny-flux", variant="npa", metric=metric)


def test_where_a_score_gives_way():
    def cell(values, metric="repetition"):
        table = tables.gives_way(sides(values, metric), "factor", [metric])
        return [*table[tables.metric(metric).title]]

    assert cell([(1, 0.2), (1.3, 0.2), (2, 0.2)]) == ["×8: 1.00 [0.80, 1.20] → 2.00 [1.80, 2.20]"]
    assert cell([(0.5, 0.2), (0.9, 0.1)], "count") == ["not up to ×4: 0.50 [0.30, 0.70] → 0.90 [0.80, 1.00]"]
    assert cell([(0.9, 0.1), (0.5, 0.2)], "count")[0].startswith("×4: ")
    assert cell([(1, 0.2)]) == []
    few = sides([(1, 0.2), (1.1, 0.2), (2, 0.2)]).assign(flag=["", "", "n = 9, below 128"])
    assert tables.gives_way(few, "factor", ["repetition"]).iloc[0, -1].startswith("not up to ×4")


def test_a_protocol_is_set_against_the_gain_under_it():
    place = {"backbone": "tiny-flux", "height": 64, "width": 64}
    scores = [
        {**place, "variant": variant, "metric": metric, "value": value}
        for metric, values in (("fid", (3.0, 5.0)), ("fid_aliased", (6.0, 7.0)), ("kid", (1.0, 2.0)))
        for variant, value in zip(("scalediff", "npa"), values)
    ]
    tests = [
        {**place, "metric": metric, "a": "npa", "b": "scalediff", "difference": d, "low": d - 0.5, "high": d + 0.5}
        for metric, d in (("fid", 2.0), ("fid_aliased", 1.0), ("kid", 1.0))
    ]
    (row,) = tables.protocol_gains(pd.DataFrame(scores), pd.DataFrame(tests), "scalediff", "npa").to_dict("records")
    assert row["scalediff − npa"] == "−2.0 [−2.5, −1.5]" and row["scalediff − npa by it"] == "−1.0 [−1.5, −0.5]"
    assert row["other protocol"] == "not antialiased"
    assert row["moves scalediff by"] == "+3.0" and row["moved / gain"] == "1.5"


def test_comparison_shows_images_and_crops(tmp_path):
    red = Image.new("RGB", (64, 64), (200, 30, 30))
    busy = red.copy()
    checks = np.indices((16, 16)).sum(0) % 2 * 255
    busy.paste(Image.fromarray(np.uint8(checks)).convert("RGB"), (40, 8))
    assert figures.busiest(busy) == (40, 8, 56, 24)
    figure = figures.comparison([("a caption", {"npa": red, "scalediff": busy})], ["upsample", "npa", "scalediff"])
    assert len(figure.axes) == 4  # the missing image leaves its place empty
    crop = figure.axes[3].images[0].get_array()
    assert np.array_equal(crop[..., 0], checks)
    assert has_colour(drawn(figure, tmp_path), (200 / 255, 30 / 255, 30 / 255))


def test_radial_power_finds_a_wave():
    x = np.arange(256)
    wave = np.tile(127.5 + 100 * np.cos(2 * np.pi * x / 16), (256, 1))
    frequency, power = figures.radial_power(Image.fromarray(wave.round().astype(np.uint8)))
    assert frequency[power.argmax()] == pytest.approx(1 / 16, rel=0.06)
    assert frequency[-1] < 0.5


def test_white_noise_has_a_flat_spectrum_of_its_variance():
    noise = np.random.default_rng(0).normal(0, 3, (256, 256))
    _, power = figures.ring_power(noise)
    assert power[-10:] == pytest.approx(9, rel=0.2)
    assert power[-10:].mean() == pytest.approx(9, rel=0.03)


def test_spectra_are_kept_for_when_the_images_are_gone(run, tmp_path):
    place = {"study": "main", "height": 64, "width": 64}
    into = Results(run.path, tmp_path)
    curves = figures.radial_spectra(into, "spectra", **place)
    assert set(curves["variant"]) == {TRUE, *results_tree.VARIANTS}
    assert (curves["low"] <= curves["power"]).all()
    assert drawn(figures.spectra(curves), tmp_path).size
    (tmp_path / "metrics.parquet").write_bytes((run.path / "metrics.parquet").read_bytes())
    without = Results.open(tmp_path)
    pd.testing.assert_frame_equal(
        figures.radial_spectra(without, "spectra", **place), curves.reset_index(drop=True), check_dtype=False
    )
    assert figures.radial_spectra(without, "other", **place).empty


def test_patches_tile_the_grid_and_cost_is_the_formula():
    boxes = figures.npa_patches((16, 24), 8)
    covered = np.zeros((16, 24), int)
    for (top, left, height, width), (y, x, side, _) in boxes:
        covered[top : top + height, left : left + width] += 1
        assert 0 <= y <= top
        assert 0 <= x <= left
        assert y + side <= 16
        assert x + side <= 24
    assert (covered == 1).all()
    assert [figures.counted_cost(s, 8) for s in (1, 2, 4)] == [1, 4, 16]


def test_method_figures(tmp_path):
    assert has_colour(drawn(figures.attention_windows((16, 16), 8, [0, 5]), tmp_path), "#332288")
    assert has_colour(drawn(figures.cost([1, 2, 4], 8), tmp_path), "#cc6677")
    weights = pd.DataFrame({"family": "flux", "form": "sigma", "step": range(4), "weight": [0.8, 0.6, 0.3, 0.1]})
    assert has_colour(drawn(figures.guidance_weight(weights), tmp_path), "#332288")


def test_latents_of_one_vae_are_drawn_once():
    torch.manual_seed(0)
    one, other = torch.randn(1, 2, 32, 32), torch.randn(1, 2, 32, 32)
    curves = figures.latent_spectra({"a": {"z": one}, "b": {"z": other}, "c": {"z": one.clone()}})
    assert set(curves["backbone"]) == {"a, c", "b"}
    axes = figures.band_spectra(curves).axes
    assert {axis.get_title() for axis in axes} == {"a, c", "b"}
    assert all("cycles/latent pixel" in axis.get_xlabel() for axis in axes)


def test_true_images_say_where_they_are_halved(tmp_path):
    results = Results.open(results_tree.build(tmp_path))
    shown = tables.scores(results.scores("main"))
    true, others = shown[shown["variant"] == TRUE], shown[shown["variant"] != TRUE]
    halved = [tables.metric(name).title for name in ("fid", "kid", "kid_patch")]
    assert true[halved].map(lambda cell: cell.endswith(" ½")).all(axis=None)
    assert not others.map(lambda cell: "½" in str(cell)).any(axis=None)
    assert not true.drop(columns=halved).map(lambda cell: str(cell).endswith("½")).any(axis=None)
    note = "one half of them against the other"
    assert note in figures.score_points(results.scores("main", setting="default", backbone="tiny-flux")).get_supxlabel()
