"""Results that another version made: used, made again with a reason, or refused with one."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from hires import layout
from hires.analysis.results import METRICS, PAIRED, Results
from hires.cli import main
from hires.config import load_config
from hires.errors import HiresError
from hires.files import parquet
from hires.files.storage import read_json, sealed, sha256, write_json
from hires.models import HINTS, build_pipeline
from hires.provenance import other_versions, read_stored, store_config
from hires.stages import VERSIONS, base, images, prompts, provenance, references

CONFIG = """
name: upgraded
prompts: {n: 2, scenes: {pool: 8}}
backbones:
  flux: {model: model, base_resolution: 128, size_multiple: 32, sampling: {num_inference_steps: 2, tau: 500}}
studies:
  main: {backbones: [flux], variants: [upsample], sizes: {192x192: 2}}
compute: {device: cpu}
"""
ROOT = Path("results/upgraded")


def make(config):
    base.run(config, "flux", layout.base_sets(config)[0].name, 0)
    images.run(config, "main", "flux", 192, 192, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    build_pipeline("tiny-flux").save_pretrained(folder / "model")
    write_json(folder / "model/hires.json", HINTS["tiny-flux"])
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = load_config("config.yaml")
        store_config(config)
        prompts.run(config)
        references.run(config, 192, 192)
        make(config)
        provenance.run(config)
    return folder


@pytest.fixture
def config(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return load_config("config.yaml")


def records(pattern="images/**/*.png.json"):
    return sorted(ROOT.glob(pattern))


def edit(path, **changes):
    """What another version would have written: None removes a key."""
    record = read_json(path)
    record.pop("digest", None)
    record = {name: value for name, value in {**record, **changes}.items() if value is not None}
    write_json(path, sealed(record))


def hashes(pattern="images/**/*.png"):
    return {path: sha256(path) for path in ROOT.glob(pattern) if path.name != ".lock"}


# --- stages of other versions ---------------------------------------------------------------------------------------


def test_what_an_older_stage_made_is_made_again_and_it_is_said_why(config, capsys):
    before = hashes()
    for path in records():
        edit(path, version=0)
    images.run(config, "main", "flux", 192, 192, 0)
    told = capsys.readouterr().err.splitlines()
    folder = "results/upgraded/images/main/default/flux/upsample/192x192"
    now = VERSIONS["images"]
    assert told[0] == f"{folder}: 2 of 2 made again: each was made by version 0 of its stage, which is at {now} now"
    assert told[-1].startswith("images main flux 192x192 shard 0: 2 of 2 made, ")
    assert hashes() == before and {read_json(path)["version"] for path in records()} == {VERSIONS["images"]}


def test_other_reasons_are_said_too(config, capsys):
    first, second = records()
    edit(first, key="0" * 16)
    second.unlink()
    images.run(config, "main", "flux", 192, 192, 0)
    told = capsys.readouterr().err
    assert "1 of 2 made again: each was made from other settings, prompts or models\n" in told
    assert "1 of 2 made again: each has no record\n" in told


@pytest.mark.parametrize(
    "pattern, stage",
    [
        ("images/**/*.png.json", lambda config: images.run(config, "main", "flux", 192, 192, 0)),
        ("base/**/*.safetensors.json", make),
        ("references/**/*.png.json", lambda config: references.run(config, 192, 192)),
    ],
)
def test_what_a_newer_stage_made_is_left_alone(config, pattern, stage):
    path = records(pattern)[0]
    edit(path, version=7, provenance={**read_json(path)["provenance"], "hires": "9.9"})
    before = hashes("**/*.*")
    with pytest.raises(HiresError, match=r"version 7 of its stage and this hires has version \d: hires 9.9 made it"):
        stage(config)
    assert hashes("**/*.*") == before


def test_records_from_before_they_had_versions_are_kept(config, capsys):
    """They count as version 1, which the references still are."""
    made = records("references/**/*.png.json")
    for path in [*made, *records()]:
        edit(path, version=None, digest=None)
    before = {path: path.stat().st_mtime_ns for path in made}
    references.run(config, 192, 192)
    assert ": 0 of 2 made, 2 kept" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in made} == before
    images.run(config, "main", "flux", 192, 192, 0)
    assert "2 of 2 made again: each was made by version 1 of its stage" in capsys.readouterr().err


def test_finished_results_of_a_newer_hires_are_left_alone(config, capsys):
    path = layout.provenance(config)
    for stages in ({**VERSIONS, "scores": 99}, {**VERSIONS, "polish": 1}):
        write_json(path, {**read_json(path), "hires": "9.9", "stages": stages})
        before = hashes("**/*.*")
        assert main(["run", "--config", "config.yaml"]) == 2
        told = capsys.readouterr().err
        assert "results/upgraded was made by hires 9.9 (stage " in told and told.count("\n") == 1
        assert hashes("**/*.*") == before


def test_stages_without_records_of_their_own_are_known_by_the_provenance(config):
    path = layout.provenance(config)
    assert other_versions(config) == {}
    write_json(path, {**read_json(path), "stages": {**VERSIONS, "metrics": 0}})
    assert other_versions(config) == {"metrics": 0}
    record = read_json(path)
    del record["stages"]  # an older hires wrote it
    write_json(path, record)
    assert other_versions(config) == {}
    path.unlink()
    assert other_versions(config) == {}


# --- files of other versions ----------------------------------------------------------------------------------------


def test_a_stored_configuration_with_a_key_that_has_another_name_now(config, tmp_path, capsys):
    """hires show needs the configuration beside an image."""
    stored = ROOT / "config.yaml"
    stored.write_text(stored.read_text().replace("num_inference_steps", "steps"))
    record = read_json(layout.provenance(config))
    write_json(layout.provenance(config), {**record, "hires": "0.0.9"})
    with pytest.raises(HiresError, match=r"hires 0.0.9 wrote it, this is 0.1.0: .*unknown key 'steps'"):
        read_stored(stored)
    file = sorted(ROOT.glob("images/**/*.png"))[0]
    assert main(["show", str(file), "--again", str(tmp_path / "again.png"), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "hires 0.0.9 wrote it, this is 0.1.0" in told and told.count("\n") == 1
    assert main(["show", str(file)]) == 0
    layout.provenance(config).unlink()
    with pytest.raises(HiresError, match="another version of hires wrote it, this is"):
        read_stored(stored)


def test_a_manifest_of_another_layout_is_refused_by_name(config):
    path = layout.image_shard(config, config.image_sets()[0], 0)
    edit(path, tempo=3)
    with pytest.raises(HiresError, match=f"^{path}: tempo: extra inputs are not permitted: hires 0.1.0 wrote it"):
        provenance.run(config)
    edit(path, tempo=None, images=None, pictures=[])
    with pytest.raises(HiresError, match="pictures: extra inputs are not permitted"):
        provenance.run(config)
    images.run(config, "main", "flux", 192, 192, 0)  # puts it together again from the records
    provenance.run(config)


def table(columns):
    rows = {"n": [4], "height": [64], "width": [64], "value": [1.0], "low": [0.0], "high": [2.0], "difference": [1.0]}
    return pd.DataFrame({name: rows.get(name, ["all" if name == "trial" else "main"]) for name in columns})


def test_tables_of_other_versions(tmp_path):
    """More columns are left aside; a lost one is named, in the table that lacks it."""
    parquet.write_frame(tmp_path / "metrics.parquet", table(METRICS).assign(later="x"))
    table(PAIRED).assign(later="x").to_parquet(tmp_path / "paired.parquet")
    results = Results.open(tmp_path)
    assert len(results.scores("main")) == len(results.paired) == 1
    for name, columns in (("metrics", METRICS), ("paired", PAIRED)):
        parquet.write_frame(tmp_path / f"{name}.parquet", table([c for c in columns if c != "low"]))
        with pytest.raises(HiresError, match=rf"{name}.parquet has no column low"):
            getattr(Results.open(tmp_path), name)
        parquet.write_frame(tmp_path / f"{name}.parquet", table(columns))


def test_the_columns_that_are_read_are_those_that_are_written():
    from hires.metrics import scores

    assert set(METRICS) <= set(scores.TIDY) and set(PAIRED) <= set(scores.PAIRED)


def test_a_reference_of_the_first_layout_is_refused(config, tmp_path, capsys):
    """Before configurations stood side by side, its rows did not say which one made them."""
    for name, columns in (("metrics", METRICS), ("paired", PAIRED)):
        for folder in (ROOT, Path("results/reference")):
            parquet.write_frame(folder / f"{name}.parquet", table(columns))
    assert main(["promote", "results", "--from", str(ROOT)]) == 2
    assert "doesn't say which configuration made it, so an older hires wrote it" in capsys.readouterr().err


# --- records in images ----------------------------------------------------------------------------------------------


def test_pictures_of_older_versions_are_shown_and_made_again(tmp_path, capsys):
    """A record from before adapters had digests; without one it can be made again, with one it can't be told."""
    from PIL import Image, PngImagePlugin

    file, old = tmp_path / "out.png", tmp_path / "old.png"
    command = ["generate", "--weights", "random", "--device", "cpu", "--prompt", "two cubes", "--size", "192", "--out"]
    assert main([*command, str(file), "--set=num_inference_steps=2", "--set=tau=500"]) == 0
    picture = Image.open(file)
    record = json.loads(picture.text["parameters"])

    def store(**changes):
        info = PngImagePlugin.PngInfo()
        kept = {name: value for name, value in {**record, **changes}.items() if name not in ("adapters", "drop")}
        info.add_text("parameters", json.dumps(kept))
        picture.save(old, pnginfo=info)
        return main(["show", str(old), "--again", str(tmp_path / "again.png"), "--device", "cpu"])

    capsys.readouterr()
    assert store() == 0 and capsys.readouterr().out.endswith("the same pixels\n")
    assert main(["show", str(old)]) == 0
    capsys.readouterr()
    kept = {name: value for name, value in record["sampling"].items() if name != "lfm_factor"}
    assert store(sampling=kept, versions={"hires": "0.0.9"}) == 2
    assert re.search("lacks sampling.lfm_factor: hires 0.0.9 wrote it, this is 0.1.0", capsys.readouterr().err)
    assert store(mood="calm", versions={"hires": "9.9"}) == 2
    assert "states mood, unknown here: hires 9.9 wrote it" in capsys.readouterr().err
