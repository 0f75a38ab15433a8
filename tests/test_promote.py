"""hires promote results: evaluations side by side in results/reference."""

import json
from pathlib import Path

import pandas as pd
import pytest

from hires.analysis.reference import makers
from hires.analysis.results import Results
from hires.cli import main
from hires.provenance import machine

KEYS = {"setting": "default", "backbone": "tiny-flux", "height": 64, "width": 64, "metric": "fid"}


def run(folder, config, studies, value=1.0, crops=("npa",), **columns):
    """What a run of a configuration leaves, as far as promotion reads it."""
    folder.mkdir(parents=True)
    score = {"trial": "all", "variant": "npa", **KEYS, "value": value, "low": 0.0, "high": 9.0, "n": 1}
    rows = [{"study": study, **score, "flag": "", "protocol": "", **columns} for study in studies]
    pd.DataFrame(rows).to_parquet(folder / "metrics.parquet")
    pairs = [{"study": study, **KEYS, "a": "npa", "b": "direct", "difference": value, **columns} for study in studies]
    pd.DataFrame(pairs).to_parquet(folder / "paired.parquet")
    pd.DataFrame({"id": ["00"], "prompt": [config]}).to_parquet(folder / "prompts.parquet")
    record = {**machine(), "time": "2026-11-22T00:00:00+00:00", "config": "0" * 16, "commit": f"{config} {value}"}
    record |= {"configuration": {"name": config}, "models": {}, "prompts": {"n": 1, "digest": "0" * 16}}
    record |= {"images": {"n": 1, "seeds": [0]}}
    (folder / "provenance.json").write_text(json.dumps(record))
    (folder / "crops").mkdir()
    for name in crops:
        (folder / "crops" / f"{name}.webp").write_text(f"{config} {value}")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def promote(folder: Path):
    return main(["promote", "results", "--from", str(folder)])


def values(name="metrics", column="value"):
    rows = pd.read_parquet(f"results/reference/{name}.parquet")
    return dict(zip(zip(rows["config"], rows["study"]), rows[column]))


def test_configurations_stand_side_by_side(place, capsys):
    assert promote(run(place / "one", "first", ["main", "tau"], 1.0)) == 0
    said = capsys.readouterr().out
    assert "main: 1 image sets, 0 before" in said and "results/reference: 0.0 MiB" in said
    assert promote(run(place / "two", "second", ["panorama"], 2.0)) == 0
    expected = {("first", "main"): 1.0, ("first", "tau"): 1.0, ("second", "panorama"): 2.0}
    assert values() == expected and values("paired", "difference") == expected
    reference = place / "results/reference"
    assert (reference / "crops/first/npa.webp").read_text() == "first 1.0"
    assert (reference / "crops/second/npa.webp").read_text() == "second 2.0"
    assert pd.read_parquet(reference / "prompts/second.parquet")["prompt"].tolist() == ["second"]
    assert Results.open(reference).scores("panorama")["value"].tolist() == [2.0]


def test_promoting_again_replaces_the_studies_of_that_run_only(place):
    promote(run(place / "one", "first", ["main", "tau"], 1.0, crops=("npa", "old")))
    promote(run(place / "two", "second", ["panorama"], 2.0))
    promote(run(place / "again", "first", ["main"], 3.0))
    expected = {("first", "main"): 3.0, ("first", "tau"): 1.0, ("second", "panorama"): 2.0}
    assert values() == expected and values("paired", "difference") == expected
    records = json.loads(Path("results/reference/provenance/first.json").read_text())
    assert [(record["studies"], record["commit"]) for record in records] == [
        (["tau"], "first 1.0"),
        (["main"], "first 3.0"),
    ]
    assert [path.name for path in Path("results/reference/crops/first").iterdir()] == ["npa.webp"]
    assert Path("results/reference/crops/second/npa.webp").read_text() == "second 2.0"
    promote(run(place / "all", "first", ["main", "tau"], 4.0))
    records = json.loads(Path("results/reference/provenance/first.json").read_text())
    assert [record["commit"] for record in records] == ["first 4.0"]


def test_shards_of_the_same_origin_are_recorded_once(place):
    folder = run(place / "one", "first", ["main"])
    record = json.loads((folder / "provenance.json").read_text())
    runs = [{**machine(), "time": f"2026-11-22T00:00:0{second}+00:00", "config": "0" * 16} for second in (2, 1, 3)]
    record["runs"] = [*runs, {**runs[2], "gpu": "another"}]
    (folder / "provenance.json").write_text(json.dumps(record))
    assert promote(folder) == 0
    (kept,) = json.loads(Path("results/reference/provenance/first.json").read_text())
    assert kept["runs"] == [runs[1], record["runs"][3]]


def test_a_new_column_is_null_in_older_rows_and_a_lost_one_is_refused(place, capsys):
    promote(run(place / "one", "first", ["main"]))
    assert promote(run(place / "two", "second", ["other"], p=0.5)) == 0
    rows = pd.read_parquet("results/reference/metrics.parquet")
    assert rows["p"].isna().tolist() == [True, False]
    before = {path: path.read_bytes() for path in Path("results/reference").rglob("*.*")}
    assert promote(run(place / "three", "third", ["third"])) == 2
    assert (
        "has no column p, but results/reference/metrics.parquet has: make the scores again" in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in Path("results/reference").rglob("*.*")} == before


def test_what_is_refused(place, capsys):
    promote(run(place / "one", "first", ["main"]))
    assert promote(run(place / "two", "second", ["main"])) == 2
    error = capsys.readouterr().err
    assert "study 'main' of results/reference was made by configuration 'first': give the study of" in error
    (place / "one/provenance.json").unlink()
    assert promote(place / "one") == 2
    assert "one holds no provenance.json: finish the run first" in capsys.readouterr().err
    rows = pd.read_parquet("results/reference/metrics.parquet").drop(columns="config")
    rows.to_parquet("results/reference/metrics.parquet")
    assert promote(place / "two") == 2
    assert "doesn't say which configuration made it, so an older hires wrote it" in capsys.readouterr().err


def test_the_tracked_reference_says_where_every_row_is_from():
    folder = Path(__file__).parents[1] / "results/reference"
    for name in ("metrics", "paired"):
        rows = pd.read_parquet(folder / f"{name}.parquet")[["config", "study"]].drop_duplicates()
        for config, study in rows.itertuples(index=False):
            records = json.loads((folder / f"provenance/{config}.json").read_text())
            assert sum(study in record["studies"] for record in records) == 1
            assert all(record["configuration"]["name"] == config for record in records)
    made = makers(folder)
    assert set(made["configuration"]) == set(rows["config"])
    assert (
        made["commit"].str.fullmatch(r"[0-9a-f]{7}(, [0-9a-f]{7})*").all() and (made["machine"] == "NVIDIA H200").all()
    )
