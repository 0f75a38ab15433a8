"""Notebooks: clean as they are stored, and they run from a results folder to its tables and figures."""

import json
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import results_tree

from hires.config import load_config

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_tree.build(
        tmp_path_factory.mktemp("results"), sizes=((64, 2),), variants=("upsample", "npa", "scalediff")
    )


def execute(name, folder, monkeypatch, cwd=ROOT, **parameters):
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    target = folder / f"{name}.ipynb"
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        target,
        parameters,
        kernel_name="python3",
        cwd=cwd,
        progress_bar=False,
    )
    return nbformat.read(target, as_version=4)


def test_notebooks_are_there():
    names = ["01_explore", "02_ablation", "03_tau", "04_methods_illustrated", "05_scale_dit", "06_speed"]
    names.append("07_claims")
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("name", ["config.yaml", "smoke.yaml"])
def test_configurations_name_parameters_that_exist(name):
    for notebook, parameters in load_config(ROOT / "config" / name).notebooks.items():
        cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
        source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
        namespace = {}
        exec(source, namespace)
        assert {"results", "output", *parameters} <= set(namespace)


def test_ablation_runs(results, tmp_path, monkeypatch):
    execute("02_ablation", tmp_path, monkeypatch, results=str(results), output=str(tmp_path), prompts=1)
    stored = pd.read_parquet(results / "metrics.parquet")
    written = pd.read_csv(tmp_path / "tables" / "components.csv")
    ours = stored[(stored["study"] == "main") & stored["variant"].isin(["npa", "scalediff"])]
    assert written.loc[written["variant"] != "true image", "value"].tolist() == ours["value"].tolist()
    tables = {path.name for path in (tmp_path / "tables").iterdir()}
    assert {"components.md", "variants.md", "paired.md", "published.md", "spectra-64x64.csv"} <= tables
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    for name in ("scores-tiny-flux-64x64", "paired-tiny-sdxl-64x64", "images-tiny-flux-64x64", "spectra-64x64"):
        assert {f"{name}.png", f"{name}.pdf"} <= figures


def test_tau_runs_from_the_notebooks_folder_and_without_images(results, tmp_path, monkeypatch):
    (tmp_path / "metrics.parquet").write_bytes((results / "metrics.parquet").read_bytes())
    execute("03_tau", tmp_path, monkeypatch, cwd=ROOT / "notebooks", results=str(tmp_path))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"tau-scores.png", "tau-scores.pdf"}
    text = (tmp_path / "tables" / "tau.md").read_text()
    assert "| tiny-flux | 64x64 | 300 | scalediff |" in text


def test_illustrations_and_exploration_run(results, tmp_path, monkeypatch):
    execute(
        "04_methods_illustrated",
        tmp_path,
        monkeypatch,
        results=str(results),
        output=str(tmp_path),
        weights="random",
        backbones=["tiny-flux"],
        size=192,
    )
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert figures == {"npa-windows", "cost", "sg-weight", "lfm-spectra", "sg-residual"}
    done = execute(
        "01_explore",
        tmp_path,
        monkeypatch,
        weights="random",
        backbone="tiny-sdxl",
        height=256,
        width=256,
        steps=2,
        variants=["npa"],
        taus=[500],
    )
    pictures = [
        output for cell in done.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3


DRAWN = {f"scale-dit-{name}" for name in ("masks", "keys", "orders", "blocks", "anchors")}


def test_scale_dit_runs_on_its_studies(tmp_path, monkeypatch):
    results = results_tree.add_scale_dit(
        results_tree.build(tmp_path / "results", sizes=((64, 2),), variants=("upsample",), backbones=("tiny-flux",))
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    log = [{"step": 10 * k, "loss": 1 / k} for k in range(1, 9)]
    (adapter / "training.json").write_text(json.dumps({"log": log, "validation": [{"step": 80, "loss": 0.3}]}))
    options = {"adapter": str(adapter), "sides": [16, 32], "prompts": 1}
    execute("05_scale_dit", tmp_path, monkeypatch, results=str(results), output=str(tmp_path), **options)
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    place = "tiny-flux-64x64"
    compared = {f"scale-dit-{name}-{place}" for name in ("paired", "images", "ablation-paired")}
    assert figures == DRAWN | {"scale-dit-training"} | compared
    written = {path.stem: pd.read_csv(path) for path in (tmp_path / "tables").glob("*.csv")}
    assert set(written["scale-dit"]["variant"]) == {"upsample", "scalediff", "scale-dit", "hybrid"}
    assert written["scale-dit-ablation"]["variant"].iloc[0] == "default"
    stored = pd.read_parquet(results / "paired.parquet")
    pairs = written["scale-dit-ablation-paired"].drop_duplicates(["a", "b"])
    assert len(pairs) == 5  # three against the default, two against tau-643
    row = written["scale-dit-paired"].query("a == 'hybrid' and b == 'scalediff' and metric == 'count'").iloc[0]
    same = stored.query("study == 'scale-dit' and a == 'scalediff' and b == 'hybrid' and metric == 'count'").iloc[0]
    assert row["difference"] == -same["difference"]
    expected = written["scale-dit-expected"]
    tested = expected[expected["outcome"] != "–"]
    assert len(expected) == 28  # as config/scale-dit-evaluation.yaml says
    assert len(tested) == 21  # this tree has no spectral distance
    assert set(tested["outcome"]) == {"as expected", "the opposite"}


def test_scale_dit_says_how_to_make_its_studies(results, tmp_path, monkeypatch):
    done = execute("05_scale_dit", tmp_path, monkeypatch, results=str(results), output=str(tmp_path), sides=[16, 32])
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn - {"scale-dit-training"} == DRAWN
    said = "".join(o.get("text", "") for cell in done.cells for o in cell.get("outputs", []))
    for study in ("scale-dit", "scale-dit-ablation"):
        assert f"no study '{study}' in these results: hires run --config config/scale-dit-evaluation.yaml" in said


def said(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(o.get("text", "") + o.get("data", {}).get("text/markdown", "") for o in outputs)


def test_claims_are_judged_on_what_is_there(tmp_path, monkeypatch):
    results = results_tree.add_studies(
        results_tree.build(tmp_path / "results", sizes=((64, 2),), variants=("upsample",), backbones=("tiny-flux",))
    )
    done = execute("07_claims", tmp_path, monkeypatch, results=str(results), output=str(tmp_path))
    table = pd.read_csv(tmp_path / "tables" / "claims.csv")
    judged = table[table["verdict"] != "missing"].set_index(["claim", "metric"])
    stored = pd.read_parquet(results / "paired.parquet")
    row = judged.loc[("lfm-texture", "kid_patch")]
    same = stored.query("study == 'components' and a == 'npa' and b == 'npa+lfm' and metric == 'kid_patch'").iloc[0]
    assert row["difference"] == pytest.approx(-same["difference"])
    assert row["trials"] == 3
    absent = table[(table["claim"] == "npa-beyond") & (table["metric"] == "seconds")]
    assert absent["verdict"].tolist() == ["missing"] * 2 and set(absent["height"]) == {1024}
    assert judged.loc[("overlap", "seams"), "verdict"] in ("reproduced", "not reproduced", "undecided")
    text = said(done)
    assert "study 'windows': 0 of 24 image sets; missing: 12 of tiny-flux at 512x512, 12 of tiny-sdxl" in text
    assert "config/studies/windows.yaml config/scale-dit-evaluation.yaml makes them" in text
    assert "tiny-flux, smooth: missing, study 'failures' isn't whole" in text
    assert "same direction in" in text
    place = "tiny-flux-64x64"
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    studies = {f"study-components-{place}", f"study-failures-{place}"}
    compared = {f"claims-trials-{place}", "claims-pairs-components-64x64"}
    assert drawn == {"claims", *compared, "claims-failures-tiny-flux", *studies}
    tables = {path.stem for path in (tmp_path / "tables").glob("*.md")}
    shown = (
        "claims-trials",
        "claims-trials-paired",
        "claims-directions",
        "claims-measured",
        "study-failures",
        "claims-published",
        "claims-components-content",
    )
    assert {"claims", *shown} <= tables


def test_claims_work_on_results_without_any_study(results, tmp_path, monkeypatch):
    done = execute("07_claims", tmp_path, monkeypatch, results=str(results), output=str(tmp_path))
    assert set(pd.read_csv(tmp_path / "tables" / "claims.csv")["verdict"]) == {"missing"}
    assert "tiny-flux, seams: missing, study 'failures' isn't whole" in said(done)
