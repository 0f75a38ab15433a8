"""Claims and their verdicts: p-values, Holm's correction, trials, the rule."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from hires import figures
from hires.analysis import claims, tables
from hires.analysis.results import Results
from hires.analysis.statistics import holm, p_value, t_interval, t_p_value
from hires.config import load_config
from hires.errors import HiresError
from hires.metrics import paired
from hires.metrics.bootstrap import draw_prompts, expanded_interval

ROOT = Path(__file__).parents[1]
PLACE = {"study": "s", "setting": "default", "backbone": "tiny-flux", "height": 64, "width": 64}


def test_holm_is_its_definition():
    p = [0.01, 0.04, 0.03, 0.005]
    ordered, highest, expected = sorted(p), 0.0, {}
    for rank, value in enumerate(ordered):
        highest = max(highest, min(1, value * (len(p) - rank)))
        expected[value] = highest
    assert holm(p) == pytest.approx([expected[value] for value in p])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert len(holm([])) == 0


def test_p_of_a_mean_is_students():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.2, 1, 400)
    draws = rng.multinomial(400, np.full(400, 1 / 400), 4000) / 400
    p = p_value(differences.mean(), draws @ differences, 400)
    assert np.log(p) == pytest.approx(np.log(stats.ttest_1samp(differences, 0).pvalue), rel=0.1)
    assert p_value(0.0, np.array([-1.0, 1.0]), 9) == 1
    assert p_value(0.3, np.array([0.3]), 9) == 1  # no interval
    same = p_value(0.3, np.array([0.3, 0.3]), 9)  # the same in every pair
    assert same == pytest.approx(stats.binomtest(9, 9).pvalue)


def test_intervals_and_p_of_differences_hold_their_level_at_every_n():
    """Normal percentiles and p would miss 11 and 7 times in a hundred at n = 8 and 16."""
    rng = np.random.default_rng(0)
    for n in (8, 16, 200):
        draws = draw_prompts(n, 1000).double().numpy() / n
        differences = rng.normal(0, 1, (1000, n))
        replicates = differences @ draws.T
        ends = np.array([expanded_interval(each, n) for each in replicates])
        covered = (ends[:, 0] <= 0) & (ends[:, 1] >= 0)
        small = [p_value(mean, each, n) < 0.05 for mean, each in zip(differences.mean(1), replicates)]
        assert 0.93 <= covered.mean() <= 0.975 and np.mean(small) <= 0.065


def test_noise_that_all_prompts_share_decides_no_claim(tmp_path):
    """Seeds shift all prompts alike, there is nothing else: prompts alone would decide a third at p < .05."""
    rng = np.random.default_rng(0)
    names = [f"m{i}" for i in range(60)]
    of_prompts, of_seeds = 0.28 * rng.normal(size=(60, 1)), rng.normal(size=(60, 5))
    values = of_prompts + of_seeds
    tests = [(m, "x", "y", d, 0.55, 2 * stats.norm.sf(abs(d) / 0.28)) for m, d in zip(names, values.mean(1))]
    results(tmp_path, tests)
    rows = [
        {**PLACE, "metric": m, "trial": str(seed), "variant": variant, "value": value * (variant == "x")}
        for m, found in zip(names, values)
        for seed, value in enumerate(found)
        for variant in "xy"
    ]
    table = pd.DataFrame(rows).assign(low=0.0, high=0.0, n=9, flag="", protocol="")
    table.to_parquet(tmp_path / "metrics.parquet")
    asked = [claim(tests=dict.fromkeys(names, "lower")), claim(id="d", tests=dict.fromkeys(names, "same"), within=0.6)]
    judged = claims.judge(asked, Results.open(tmp_path))
    directed, same = judged.iloc[:60], judged.iloc[60:]
    assert np.mean([p < 0.05 for *_, p in tests]) > 0.25
    assert (directed["p"] < 0.05).mean() <= 0.1 and set(directed["verdict"]) == {"undecided"}
    assert (same["verdict"] == "reproduced").mean() <= 0.1


def test_intervals_over_trials_are_students():
    values = [1.0, 2.0, 4.0, 3.0, 2.5]
    low, high = t_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert np.isnan(t_interval([1.0])).all()
    assert t_p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert (t_p_value([0.5, 0.5]), t_p_value([0.0, 0.0])) == (0, 1)


def test_differences_over_trials_are_those_of_each_seed():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 5)
    values = {name: noise + shift + 0.01 * rng.normal(0, 1, 5) for name, shift in zip(("npa", "npa+lfm"), (0, 0.1))}
    values["npa+sg"] = noise + 0.3 * rng.normal(0, 1, 5)
    rows = [
        {**PLACE, "metric": "kid", "variant": variant, "trial": str(seed), "value": value}
        for variant, found in values.items()
        for seed, value in enumerate(found)
    ]
    table = tables.over_trials(pd.DataFrame(rows[::-1])).set_index("a")
    assert table.index.tolist() == ["npa+lfm", "npa+sg"] and set(table["b"]) == {"npa"} and set(table["n"]) == {5}
    p = {a: stats.ttest_rel(values[a], values["npa"]).pvalue for a in ("npa+lfm", "npa+sg")}
    assert table["p"].to_dict() == pytest.approx(p)
    assert table["p_holm"].tolist() == pytest.approx(holm(list(p.values())).tolist())
    low, high = t_interval(values["npa+lfm"] - values["npa"])
    assert tuple(table.loc["npa+lfm", ["low", "high"]]) == pytest.approx((low, high))
    assert tables.over_trials(pd.DataFrame(rows[:1])).empty


def test_variants_in_several_settings_keep_their_order():
    names = ["npa+lfm, b", "mine, a", "npa, b-16", "npa, b-2", "scalediff, a", "npa, a", "true image"]
    expected = ["true image", "npa, a", "npa, b-2", "npa, b-16", "npa+lfm, b", "scalediff, a", "mine, a"]
    assert tables.variants_of(pd.DataFrame({"variant": names})) == expected


def test_pairs_are_corrected_within_their_metric():
    rng = np.random.default_rng(0)
    rows = []
    for metric, effects in (("kid", (0.0, 0.2, 0.9)), ("count", (0.0, 0.0, 0.0))):
        shared = rng.normal(0, 1, 500)
        for variant, effect in zip("xyz", effects):
            replicates = 1 + effect + 0.1 * (shared + rng.normal(0, 1, 500))
            score = {"value": 1 + effect, "replicates": replicates, "n": 80, "metric": metric, "variant": variant}
            rows.append({**PLACE, **score})
    tests = paired(pd.DataFrame(rows))
    assert len(tests) == 6
    for _, group in tests.groupby("metric"):
        assert group["p_holm"].tolist() == pytest.approx(holm(group["p"].tolist()).tolist())
    kid = tests[tests["metric"] == "kid"].set_index(["a", "b"])
    assert kid.loc[("x", "z"), "p_holm"] < 1e-6
    assert (tests[tests["metric"] == "count"]["p"] == 1).all()


def results(tmp_path, tests, trials=()):
    """A results folder with these paired tests: (metric, a, b, difference, half width, p)."""
    rows = [
        {
            **PLACE,
            "metric": m,
            "a": a,
            "b": b,
            "difference": d,
            "low": d - h,
            "high": d + h,
            "n": 9,
            "p": p,
            "p_holm": p,
        }
        for m, a, b, d, h, p in tests
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "paired.parquet")
    metrics = [
        {
            **PLACE,
            "trial": trial,
            "variant": variant,
            "metric": "kid",
            "value": value,
            "low": value,
            "high": value,
            "n": 9,
            "flag": "",
            "protocol": "",
        }
        for trial, variant, value in trials or [("all", "y", 4.0)]
    ]
    pd.DataFrame(metrics).to_parquet(tmp_path / "metrics.parquet")
    return Results.open(tmp_path)


def claim(**fields):
    given = {"id": "c", "says": "It helps.", "paper": "P", "section": "1", "study": "s", "a": "x", "b": "y"}
    return claims.Claim(**{**given, "tests": {"kid": "lower"}, **fields})


@pytest.mark.parametrize(
    ("difference", "half", "p", "expected", "verdict"),
    [
        (-1.0, 0.2, 0.001, "lower", "reproduced"),
        (-1.0, 0.2, 0.001, "higher", "not reproduced"),
        (1.0, 0.2, 0.001, "lower", "not reproduced"),
        (-1.0, 1.2, 0.2, "lower", "undecided"),
        (0.1, 0.2, 0.3, "same", "reproduced"),
        (1.0, 0.2, 0.001, "same", "not reproduced"),
        (0.4, 0.2, 0.001, "same", "undecided"),
    ],
)
def test_the_verdict_follows_from_difference_interval_and_p(tmp_path, difference, half, p, expected, verdict):
    found = results(tmp_path, [("kid", "y", "x", -difference, half, p)])  # stored the other way round
    margins = [{"within": 0.5}, {"within_share": 0.125}] if expected == "same" else [{}]  # y scores 4
    for margin in margins:
        judged = claims.judge([claim(tests={"kid": expected}, **margin)], found)
        assert judged["verdict"].tolist() == [verdict]
        assert judged["difference"].tolist() == [difference]
        said = claims.sentences([claim()], judged)["c"][0]
        assert verdict in said
        assert "n = 9; one seed; " in said
        assert ("; margin ±500): " if expected == "same" else " after Holm): ") in said


def test_many_claims_need_smaller_p(tmp_path):
    tests = [(name, "x", "y", -1.0, 0.2, 0.02) for name in ("kid", "fid", "clip")]
    judged = claims.judge([claim(tests=dict.fromkeys(("kid", "fid", "clip"), "lower"))], results(tmp_path, tests))
    assert judged["p_holm"].tolist() == pytest.approx([0.06] * 3)
    assert set(judged["verdict"]) == {"undecided"}
    asked = [claim(tests={"kid": "lower", "fid": "lower"}), claim(id="d", tests={"clip": "same"}, within=9)]
    judged = claims.judge(asked, results(tmp_path, tests))  # a margin is no test of zero
    assert judged["p_holm"].tolist() == pytest.approx([0.04, 0.04, np.nan], nan_ok=True)
    assert claims.summary(judged) == "Of 3 tests 3 could be made: 3 reproduced."


def test_what_was_not_made_is_said_to_be_missing(tmp_path):
    found = results(tmp_path, [("kid", "x", "y", -1.0, 0.2, 0.001)])
    asked = [claim(), claim(id="d", study="other"), claim(id="e", variant="z")]
    judged = claims.judge(asked, found)
    assert judged["verdict"].tolist() == ["reproduced", "missing", "missing"]
    assert judged.loc[1:, "p_holm"].isna().all()
    assert "**missing**" in claims.sentences(asked, judged)["d"][0]
    overview = claims.overview(asked, judged)
    assert overview["reproduced"].tolist() == [1, 0, 0] and overview["missing"].tolist() == [0, 1, 1]
    sets = [
        (*place, variant) for place in (("tiny-flux", 64), ("tiny-flux", 128), ("tiny-sdxl", 64)) for variant in "xy"
    ]
    planned = pd.DataFrame(sets[:-1], columns=["backbone", "height", "variant"])
    planned = planned.assign(study="s", setting="default", width=planned["height"])
    judged = claims.judge([claim()], found, planned)
    assert judged["verdict"].tolist() == ["missing", "reproduced"]
    assert claims.sentences([claim()], judged)["c"][1].startswith("KID, x − y (tiny-flux 128x128): **missing**")
    assert claims.summary(judged) == "Of 2 tests 1 could be made: 1 reproduced."


def test_trials_are_compared_seed_by_seed(tmp_path):
    values = {"x": [1.0, 2.0, 3.0], "y": [2.0, 2.5, 4.0]}
    trials = [(str(seed), name, value) for name in values for seed, value in enumerate(values[name])]
    found = results(tmp_path, [("kid", "x", "y", -1.0, 0.2, 0.001)], trials)
    row = claims.judge([claim()], found).iloc[0]
    assert row["trials"] == 3
    assert (row["trial_low"], row["trial_high"]) == pytest.approx(t_interval([-1.0, -0.5, -1.0]))
    assert "n = 9; over 3 seeds −1000 [" in claims.sentences([claim()], claims.judge([claim()], found))["c"][0]


def test_the_papers_claims_name_studies_variants_and_settings_that_exist():
    files = [ROOT / "config/studies.yaml", *(ROOT / "config/studies").glob("*.yaml")]
    configs = [load_config(file) for file in [*files, ROOT / "config/scale-dit-evaluation.yaml"]]
    studies = {name: study for config in configs for name, study in config.studies.items()}
    for asked in claims.load_claims(ROOT / "config/claims.yaml"):
        study = studies[asked.study]
        if asked.variant is None:
            assert {asked.a, asked.b} <= set(study.variants), asked.id
            assert asked.setting in study.settings, asked.id
        else:
            assert asked.variant in study.variants, asked.id
            assert {asked.a, asked.b} <= set(study.settings), asked.id
        assert set(asked.tests) <= set(tables.METRICS), asked.id


def test_mistakes_in_claims_are_one_line(tmp_path):
    path = tmp_path / "claims.yaml"
    entry = claim().model_dump()
    for change, said in (
        ({"tests": {"kid": "better"}}, "tests.kid"),
        ({"tests": {"kid": "same"}}, "within"),
        ({"within": 0.1}, "within"),
        ({"tests": {"kid": "same"}, "within": 0.1, "within_share": 0.1}, "within"),
    ):
        path.write_text(yaml.safe_dump([{**entry, **change}]))
        with pytest.raises(HiresError, match=said):
            claims.load_claims(path)
    for text, said in (("a: 1", "must be a list of claims"), ("- 3", "claim 1: "), ("- {id: a, id: b}", "id")):
        path.write_text(text)
        with pytest.raises(HiresError, match=said):
            claims.load_claims(path)
    path.write_text(yaml.safe_dump([entry, entry]))
    with pytest.raises(HiresError, match="named twice: c"):
        claims.load_claims(path)


def test_every_test_has_its_cell(tmp_path):
    tests = [("kid", "x", "y", -1.0, 0.5, 1e-9), ("fid", "x", "y", 0.0, 0.0, 1.0), ("clip", "x", "y", -0.25, 0.0, 0.0)]
    asked = [claim(tests={"kid": "lower", "fid": "lower", "clip": "higher"}), claim(id="d", a="z")]
    found = results(tmp_path, tests)
    planned = pd.DataFrame([{**PLACE, "variant": variant} for variant in ("z", "y")])
    (axis,) = figures.verdicts(claims.judge(asked, found, planned)).axes
    cells = axis.images[0].get_array()
    assert cells[:3].tolist() == [[0], [2], [1]]  # reproduced, undecided, not reproduced
    assert cells.mask.tolist() == [[False], [False], [False], [True]]
    assert [text.get_text() for text in axis.texts] == ["−1000", "0", "−.25", "–"]
    assert [name.get_text() for name in axis.get_yticklabels()][:2] == ["c: KID ↓ (10⁻³)", "c: FID ↓"]


def test_directions_are_compared_with_the_printed_ones(tmp_path):
    printed = pd.DataFrame(
        [
            {"backbone": "SDXL", "resolution": 4096, "variant": variant, "metric": "fid", "value": value}
            for variant, value in (("npa", 64.2), ("npa+lfm", 62.3), ("npa+sg", 64.2))
        ]
    )
    pairs = [("fid", "npa", "npa+lfm", -1.0, 0.2, 0.01), ("fid", "npa+sg", "npa", -1.0, 0.2, 0.01)]
    found = results(tmp_path, pairs).paired
    (row,) = claims.directions(printed, found).to_dict("records")  # npa+sg and npa are printed as equal
    assert (row["a"], row["b"]) == ("npa+lfm", "npa")
    assert row["printed difference"] == pytest.approx(-1.9) and row["difference"] == 1.0
    assert row["same direction"] == "no"
