"""The studies' configurations, and how a run that is cut, or spread over machines, still gives their scores."""

import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy import stats

import hires
from hires import layout, shards
from hires.checks import check_stages
from hires.cli import main
from hires.config import load_config
from hires.errors import HiresError
from hires.files import parquet
from hires.files.storage import read_json
from hires.metrics.bootstrap import interval
from hires.provenance import config_data
from hires.sizes import stage_sizes
from hires.stages import VERSIONS, collect, costs, metrics, run
from hires.stages.crops import SIDE, strip
from hires.stages.plan import plan

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "config/studies.yaml", *sorted((ROOT / "config/studies").glob("*.yaml"))]


@pytest.fixture(scope="module")
def backbones():
    torch.set_num_threads(1)
    return {name: hires.load(name, weights="random") for name in ("tiny-flux", "tiny-sdxl")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_study_can_be_made(path, backbones):
    """Its plan is known, and no image set is one that the cascade refuses at its true size."""
    config = load_config(path)
    assert sum(row.images for row in plan(config)) > 0
    for images in config.image_sets():
        backbone, variant = backbones[images.backbone], config.variants()[images.variant]
        sampling = config.sampling(images.study, images.setting, images.backbone).over(backbone.defaults)
        backbone.check_settings(sampling)
        sizes = [(images.height, images.width)]
        base = (backbone.base_resolution, backbone.base_resolution)
        if variant.start == "base":
            base, *sizes = stage_sizes(*sizes[0], *base[:1], backbone.size_multiple, variant.stages)
        if variant.denoise:
            latents = [backbone.latent_size(*size) for size in sizes]
            check_stages(backbone, variant, sampling, latents, backbone.latent_size(*base))


def test_studies_lie_side_by_side():
    """results/reference tells studies apart by their names alone."""
    configs = [load_config(path) for path in FILES]
    names = [study for config in configs for study in config.studies]
    assert len(set(names)) == len(names)
    assert len({config.name for config in configs}) == len(configs)
    index = (ROOT / "config/studies/README.md").read_text()
    for study in names:
        assert f"`{study}`" in index


def test_trials_are_the_same_prompts_with_five_seeds():
    config = load_config(ROOT / "config/studies/components.yaml")
    assert {(s.n, s.seeds) for s in config.image_sets()} == {(1000, (0, 1, 2, 3, 4))}


# a run that is cut

CONFIG = """
name: cut
prompts: {n: 3, scenes: {pool: 40}}
backbones:
  tiny-flux: {model: tiny-flux, weights: random, base_resolution: 128, size_multiple: 32,
    sampling: {num_inference_steps: 2}}
  tiny-sdxl: {model: tiny-sdxl, weights: random, base_resolution: 128, size_multiple: 32,
    sampling: {num_inference_steps: 2}}
studies:
  main: {backbones: [tiny-flux, tiny-sdxl], variants: [upsample, npa], sizes: {256x256: 3}}
compute: {shard_size: 2, batch_size: 2, device: cpu}
metrics: {bootstrap: 10, kid_subset_size: 2, kid_subsets: 2, patch: {per_image: 1}}
"""


def folder_of(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def scores_of(folder):
    table = pd.read_parquet(folder / "results/cut/metrics.parquet")
    table = table[~table["metric"].isin(["seconds", "peak_bytes"])]
    return table.sort_values([*table.columns[:8]]).reset_index(drop=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run in one go."""
    folder = folder_of(tmp_path_factory.mktemp("whole"), "a")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "--config", "config.yaml"]) == 0
    return folder


def test_a_run_out_of_time_has_scored_what_it_made_and_goes_on(whole, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(folder_of(tmp_path, "b"))
    assert main(["run", "--config", "config.yaml", "--seconds", "0"]) == 0
    out = capfd.readouterr()
    assert "no image set is scored yet" in out.err and "not complete" in out.out
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder_of(tmp_path, "home"))
        assert main(["collect", "--config", "config.yaml", "--from", str(tmp_path / "b/results/cut")]) == 0
    assert "0 image sets taken, 4 missing" in capfd.readouterr().out
    asked = []

    def over(clock, kind):
        asked.append(kind)
        return len(asked) > 5  # two shards a set: upsample and npa of the first model, half of the second's upsample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Clock, "over", over)
        assert main(["run", "--config", "config.yaml", "--seconds", "100"]) == 0
    config = load_config("config.yaml")
    assert "incomplete: 2 of 4 image sets have scores" in capfd.readouterr().err
    assert {(s.backbone, s.variant) for s in metrics.unscored(config)} == {
        ("tiny-sdxl", "upsample"),
        ("tiny-sdxl", "npa"),
    }
    assert set(pd.read_parquet(layout.metrics(config))["backbone"]) == {"tiny-flux", "reference"}
    assert read_json(layout.provenance(config))["images"]["n"] == 8
    assert not layout.report(config).exists()
    assert main(["run", "--config", "config.yaml"]) == 0
    assert layout.report(config).exists()
    pd.testing.assert_frame_equal(scores_of(tmp_path / "b"), scores_of(whole))


def test_the_clock_expects_what_the_last_of_a_kind_took(monkeypatch):
    now = iter([0.0, 10.0, 13.0, 13.0, 13.0])
    monkeypatch.setattr(shards.time, "monotonic", lambda: next(now))
    clock = shards.Clock(15.0, started=0.0)
    with clock.timed("slow"):
        pass
    assert clock.over("slow") and not clock.over("quick")
    assert not shards.Clock(None, started=0.0).over("slow")


def test_scores_of_two_machines_are_those_of_one(whole, tmp_path, monkeypatch, capfd):
    here = run._helpers
    for name in ("tiny-flux", "tiny-sdxl"):
        monkeypatch.chdir(folder_of(tmp_path, name))
        # one of them with helper processes, as beside a GPU
        monkeypatch.setattr(run, "_helpers", lambda device, name=name: here("cuda" if name == "tiny-flux" else device))
        assert main(["run", "--config", "config.yaml", "--backbone", name]) == 0
        shutil.rmtree("results/cut/images")
    monkeypatch.chdir(folder_of(tmp_path, "home"))
    places = [str(tmp_path / name / "results/cut") for name in ("tiny-flux", "tiny-sdxl")]
    assert main(["collect", "--config", "config.yaml", "--from", *places[:1]]) == 0
    assert "2 image sets taken, 2 missing" in capfd.readouterr().out
    assert main(["collect", "--config", "config.yaml", "--from", *places]) == 0
    assert "2 image sets taken, 0 missing" in capfd.readouterr().out
    pd.testing.assert_frame_equal(scores_of(tmp_path / "home"), scores_of(whole))
    config = load_config("config.yaml")
    assert "seconds" not in set(pd.read_parquet(layout.metrics(config))["metric"])  # each machine's own
    record = read_json(layout.provenance(config))
    assert set(record["models"]) == {"tiny-flux", "tiny-sdxl"}
    assert record["images"]["n"] == 12
    assert len(list(Path("results/cut/crops").rglob("*.webp"))) == 5
    before = os.stat(layout.metrics(config)).st_mtime_ns
    assert main(["run", "--config", "config.yaml"]) == 0  # makes no image again
    assert not Path("results/cut/images").exists() and os.stat(layout.metrics(config)).st_mtime_ns == before


def test_threads_of_helper_processes_wait_without_spinning(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # put back afterwards
    monkeypatch.delenv("OMP_WAIT_POLICY")
    with run._helpers("cuda") as helpers:
        assert helpers.submit(os.getenv, "OMP_WAIT_POLICY").result() == "PASSIVE"


def test_costs_are_measured_apart_and_promoted(whole, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    shutil.copytree(whole, home)
    monkeypatch.chdir(home)
    assert main(["promote", "costs", "--from", "results/cut"]) == 2
    assert "holds no costs" in capsys.readouterr().err
    assert main(["costs", "--config", "config.yaml", "--backbone", "tiny-flux"]) == 0
    assert main(["costs", "--config", "config.yaml", "--seconds", "0"]) == 0
    told = capsys.readouterr()
    assert "2 image sets are left" in told.out and "kept" not in told.err
    config = load_config("config.yaml")
    measured = [made for made in config.image_sets() if layout.costs(config, made).is_file()]
    assert {made.backbone for made in measured} == {"tiny-flux"} and len(measured) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hires.cascade, "cascade", None)  # nothing is measured twice
        assert main(["costs", "--config", "config.yaml", "--backbone", "tiny-flux"]) == 0

    assert main(["promote", "costs", "--from", "results/cut"]) == 2
    assert "has no scores of cut: promote them first" in capsys.readouterr().err
    assert main(["promote", "results", "--from", "results/cut"]) == 0
    scores, tests = (parquet.read_frame(Path(f"results/reference/{name}.parquet")) for name in ("metrics", "paired"))
    assert main(["promote", "costs", "--from", "results/cut"]) == 0
    promoted = parquet.read_frame(Path("results/reference/metrics.parquet"))
    kept = [table[~table["metric"].isin(["seconds", "peak_bytes"])] for table in (scores, promoted)]
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in kept))
    for name, before in (("metrics", scores), ("paired", tests)):  # what wasn't measured stays
        after = parquet.read_frame(Path(f"results/reference/{name}.parquet"))
        assert len(before) == len(after)
        others = [table[table["backbone"] == "tiny-sdxl"] for table in (before, after)]
        assert "seconds" in set(others[0]["metric"])
        pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in others))
    assert main(["run", "--config", "config.yaml"]) == 0
    assert main(["verify", "results/cut"]) == 0
    for table in (promoted, parquet.read_frame(layout.metrics(config))):
        seconds = table[(table["metric"] == "seconds") & (table["backbone"] == "tiny-flux")].set_index("variant")
        for made in measured:
            row, batches = seconds.loc[made.variant], read_json(layout.costs(config, made))["seconds"]
            assert row["value"] == sorted(batches)[1] and len(batches) == 3 and row["n"] == 3 * 2
            assert row["low"] < row["high"]
            assert "3 batches of 2 images, with nothing beside them on the" in row["protocol"]
    tests = parquet.read_frame(Path("results/reference/paired.parquet"))
    (difference,) = tests[(tests["metric"] == "seconds") & (tests["backbone"] == "tiny-flux")]["difference"]
    assert difference == seconds.loc["upsample", "value"] - seconds.loc["npa", "value"]

    capsys.readouterr()
    assert main(["costs", "--config", "config.yaml", "--backbone", "tiny-flux", "--batches", "1"]) == 2
    assert "--batches 1: allowed: 2 or more" in capsys.readouterr().err
    (again, left) = measured
    before = read_json(layout.costs(config, again))["seconds"]
    layout.costs(config, again).write_text(
        json.dumps({**read_json(layout.costs(config, again)), "seconds": before * 2})
    )
    assert main(["costs", "--config", "config.yaml", "--backbone", "tiny-flux", "--batches", "4"]) == 0
    assert [len(read_json(layout.costs(config, made))["seconds"]) for made in (again, left)] == [6, 4]  # six are enough


def test_the_interval_of_seconds_is_students():
    config = load_config(ROOT / "config/studies/fast.yaml")
    config = config.model_copy(update={"metrics": config.metrics.model_copy(update={"bootstrap": 100_000})})
    taken = [1.02, 1.0, 1.05]
    cost = {"seconds": taken, "peak_bytes": 8, "batch": 2, "provenance": {"gpu": "", "cpu": "one"}}
    low, high = interval(costs._scores(config, cost)[0].replicates)
    expected = stats.ttest_1samp(taken, 0).confidence_interval(0.95)
    half = (expected.high - expected.low) / 2
    assert [low, high] == pytest.approx([1.02 - half, 1.02 + half], abs=0.03 * half)


def test_scores_of_another_configuration_are_refused(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder_of(tmp_path, "other"))
    Path("config.yaml").write_text(CONFIG.replace("bootstrap: 10", "bootstrap: 11"))
    assert main(["collect", "--config", "config.yaml", "--from", str(whole / "results/cut")]) == 2
    assert "their scores don't belong together" in capsys.readouterr().err
    assert main(["collect", "--config", "config.yaml", "--from", str(tmp_path)]) == 2
    assert "holds no provenance.json" in capsys.readouterr().err
    assert not list(Path("results/cut").glob("*.parquet"))


def test_scores_of_other_prompts_are_refused(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder_of(tmp_path, "prompts"))
    config, source = load_config("config.yaml"), whole / "results/cut"
    prompts = parquet.read(source / "prompts.parquet")
    parquet.write(layout.prompts(config), prompts.slice(1))
    with pytest.raises(HiresError, match="other prompts were drawn"):
        collect.run(config, [source])
    pq.write_table(prompts, layout.prompts(config), compression="none")  # the same ones, as another Arrow writes them
    assert len(collect.run(config, [source])) == 4


def test_scores_of_another_version_are_refused(whole, tmp_path, monkeypatch, capsys):
    """Before they are collected, and where they were."""
    monkeypatch.chdir(folder_of(tmp_path, "older"))
    source = shutil.copytree(whole / "results/cut", tmp_path / "source")
    collected = ["collect", "--config", "config.yaml", "--from", str(source)]
    assert main(collected) == 0
    capsys.readouterr()
    for file, command, place in (
        (source / "provenance.json", collected, str(source)),
        (Path("results/cut/collected.json"), ["run", "--config", "config.yaml"], "results/cut"),
    ):
        text, now = file.read_text(), VERSIONS["images"]
        file.write_text(re.sub(rf'("images": ){now}\b', r"\g<1>1", text))
        assert file.read_text() != text and main(command) == 2
        said = capsys.readouterr().err
        assert f"{place} holds scores that version 1 of the stage images made, which is at {now} now: " in said
        assert said.count("\n") == 1
        file.write_text(text)


def test_an_unknown_backbone_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(folder_of(tmp_path, "named"))
    with pytest.raises(HiresError, match="tiny-flux"):
        run.run(load_config("config.yaml"), backbones=["tiny-flax"])


def test_strips_hold_a_small_and_a_native_view():
    picture = Image.linear_gradient("L").convert("RGB").resize((512, 256))
    sheet = strip([picture, picture])
    assert sheet.size == (4 * SIDE, SIDE)
    native = picture.crop((192, 64, 320, 192))
    assert sheet.crop((SIDE, 0, 2 * SIDE, SIDE)).tobytes() == native.tobytes()


def test_collected_sets_are_known_by_name(whole):
    config = load_config(whole / "config.yaml")
    assert config_data(config)["name"] == "cut"
    assert collect.elsewhere(config) == []
