"""The stages features, scores and metrics, from image files to the tidy table."""

import io
import json
import resource

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from hires import layout
from hires.cli import main
from hires.config import load_config
from hires.data.prompts import read_prompts
from hires.errors import HiresError
from hires.files.storage import sha256, write_bytes, write_json
from hires.metrics import Features, load_clip, load_features
from hires.metrics.scores import PAIRED, TIDY
from hires.models import build_clip
from hires.stages import features as features_stage
from hires.stages import metrics, prompts, references, scores

CONFIG = """
name: tested
prompts: {n: 6, scenes: {pool: 40}}
backbones:
  tiny-flux: {model: tiny-flux, base_resolution: 128, size_multiple: 32}
studies:
  main: {backbones: [tiny-flux], variants: [upsample, npa], sizes: {128x192: 6}, seeds: [0, 1]}
  few: {backbones: [tiny-flux], variants: [npa], sizes: {128x192: 2}, settings: {a: {}, b: {tau: 300}}}
compute: {shard_size: 4, threads: 2}
metrics: {bootstrap: 40, kid_subset_size: 5, kid_subsets: 4, minimum_n: 20, patch: {size: 128, per_image: 2}}
"""


def picture(scene_image, variant, seed):
    """An image that is the true render, softened: more for upsample, differently for each seed."""
    radius = {"upsample": 2.0, "npa": 0.4}[variant] + 0.2 * seed
    return scene_image.filter(ImageFilter.GaussianBlur(radius))


def make_images(config):
    listed = read_prompts(layout.prompts(config))
    for images in config.image_sets():
        for shard, path in enumerate(layout.image_shards(config, images)):
            entries = []
            for index in layout.shard_rows(config, images.n, shard):
                true = Image.open(layout.reference(config, images.height, images.width, listed[index].id))
                for seed in images.seeds:
                    file = layout.image(config, images, listed[index].id, seed)
                    data = io.BytesIO()
                    picture(true.convert("RGB"), images.variant, seed).save(data, "PNG")
                    write_bytes(file, data.getvalue())
                    cost = {"seconds": 1.5 + seed, "peak_bytes": 1000}
                    entries.append(
                        {"id": listed[index].id, "seed": seed, "file": file.name, "sha256": sha256(file), **cost}
                    )
            write_json(path, {"version": 1, "images": entries})


def run_all(config):
    features_stage.run_references(config, 128, 192, device="cpu")
    for study in config.studies:
        features_stage.run(config, study, "tiny-flux", 128, 192, device="cpu")
        scores.run(config, study, "tiny-flux", 128, 192)
    metrics.run(config)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A finished run in a folder of its own, with an untrained tiny-clip; tests that write restore what they change."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model, tokenizer = build_clip()
        model.save_pretrained(folder / "assets/tiny-clip")
        tokenizer.save_pretrained(folder / "assets/tiny-clip")
        patch.setattr("hires.models.ASSETS", folder / "assets")
        load_clip.cache_clear()
        load_features.cache_clear()
        (folder / "config.yaml").write_text(CONFIG)
        config = load_config("config.yaml")
        prompts.run(config)
        references.run(config, 128, 192)
        make_images(config)
        run_all(config)
        yield config
    load_clip.cache_clear()
    load_features.cache_clear()


def test_the_table_is_tidy(config):
    table = pd.read_parquet(layout.metrics(config))
    assert list(table.columns) == TIDY
    assert np.isfinite(table[["value", "low", "high"]].to_numpy()).all()
    assert not table.isna().any(axis=None)
    key = ["study", "setting", "trial", "backbone", "variant", "height", "width", "metric"]
    assert not table.duplicated(key).any()
    assert set(table["variant"]) == {"upsample", "npa", "reference"}
    assert set(table.loc[table["study"] == "few", "setting"]) == {"a", "b", "reference"}
    whole = table[(table["study"] == "main") & (table["variant"] == "npa")].set_index(["trial", "metric"])
    asked = {*config.metrics.scores, "spectrum_low", "spectrum_mid", "spectrum_high"}
    asked -= {"seams", "clip_iqa"}  # 128x192 is its own base: one window, no patches; scenes are no photographs
    assert set(whole.loc["all"].index) == asked
    assert whole.loc[("all", "fid"), "n"] == 12
    assert whole.loc[("1", "fid"), "n"] == 6
    assert whole.loc[("1", "seconds"), "value"] == 2.5
    assert whole.loc[("all", "fid"), "flag"].startswith("n = 6, below 20")
    trials = [whole.loc[(seed, "fid"), "value"] for seed in ("0", "1")]
    assert whole.loc[("all", "fid"), "value"] == pytest.approx(np.mean(trials))


def test_references_stand_in_the_table(config):
    table = pd.read_parquet(layout.metrics(config))
    rows = table[(table["variant"] == "reference") & (table["study"] == "main")].set_index("metric")
    assert set(rows["backbone"]) == {"reference"}
    assert rows.loc["count", "value"] == 1
    assert rows.loc["spectrum", "value"] == 0
    assert rows.loc["fid_patch", "n"] == 3
    assert "seconds" not in rows.index


def test_kid_undefined_at_n_has_no_row(config):
    table = pd.read_parquet(layout.metrics(config))
    few = table[(table["study"] == "few") & (table["variant"] == "npa")]
    assert "kid" not in set(few["metric"])
    assert "fid" in set(few["metric"])


def test_paired_tests_tell_variants_apart(config):
    tests = pd.read_parquet(layout.paired(config))
    assert list(tests.columns) == PAIRED
    assert set(zip(tests["a"], tests["b"])) == {("upsample", "npa"), ("npa, a", "npa, b")}
    settings = tests[tests["study"] == "few"]
    assert set(settings["setting"]) == {"between"}
    measured = settings[~settings["metric"].isin(["seconds", "peak_bytes"])]
    assert (measured[["difference", "low", "high"]] == 0).all(axis=None)  # the same pictures in both settings
    tests = tests[tests["study"] == "main"]
    row = tests.set_index("metric").loc["spectrum_high"]
    assert row["high"] < 0
    assert row["n"] == 12
    table = pd.read_parquet(layout.metrics(config)).query("study == 'main' and trial == 'all' and metric == 'fid'")
    values = table.set_index("variant")["value"]
    assert tests.set_index("metric").loc["fid", "difference"] == pytest.approx(values["upsample"] - values["npa"])


def test_single_images_are_kept(config):
    images = config.image_sets()[0]
    table = pd.read_parquet(layout.image_scores(config, images))
    assert list(table.columns) == ["id", "seed", "metric", "value"]
    assert (table.groupby("metric").size() == 12).all()
    aggregate = pd.read_parquet(layout.scores(config, images)).query("trial == 'all'").set_index("metric")
    assert table.query("metric == 'clip'")["value"].mean() == pytest.approx(aggregate.loc["clip", "value"])


def test_variants_share_their_crops(config):
    a, b = (Features.load(layout.features(config, images)) for images in config.image_sets()[:2])
    true = Features.load(layout.reference_features(config, 128, 192))
    assert len({file["boxes"][0][1] for file in true.metadata["files"].values()}) > 1
    for name, file in a.metadata["files"].items():
        assert file["boxes"] == b.metadata["files"][name]["boxes"] == true.metadata["files"][name[:-1] + "0"]["boxes"]


def test_a_second_run_gives_the_same_bytes(config):
    kept = {path: path.read_bytes() for path in config.root.rglob("*") if path.suffix in (".parquet", ".safetensors")}
    outputs = [path for path in kept if path.name != "prompts.parquet" and path.parent.name != "prompts"]
    for path in outputs:
        path.unlink()
    run_all(config)
    assert {path: path.read_bytes() for path in outputs} == {path: kept[path] for path in outputs}


def test_features_are_kept_while_they_fit(config):
    images = config.image_sets()[-1]
    path, manifest = layout.features(config, images), layout.image_shards(config, images)[0]
    before, text, stored = path.stat().st_mtime_ns, manifest.read_text(), path.read_bytes()
    features_stage.run(config, "few", "tiny-flux", 128, 192, device="cpu")
    assert path.stat().st_mtime_ns == before
    manifest.write_text(text)
    features_stage.run(config, "few", "tiny-flux", 128, 192, device="cpu")
    assert path.stat().st_mtime_ns >= manifest.stat().st_mtime_ns
    assert path.read_bytes() == stored
    record = json.loads(text)
    picture = layout.image(config, images, record["images"][0]["id"], 0)
    data = picture.read_bytes()
    Image.new("RGB", (192, 128), "red").save(picture)
    record["images"][0]["sha256"] = sha256(picture)
    manifest.write_text(json.dumps(record))
    features_stage.run(config, "few", "tiny-flux", 128, 192, device="cpu")
    assert path.read_bytes() != stored
    picture.write_bytes(data)
    manifest.write_text(text)
    features_stage.run(config, "few", "tiny-flux", 128, 192, device="cpu")


def test_mistakes_are_one_line(config, capsys):
    place = ["--study", "main", "--backbone", "tiny-flux", "--size", "128x192"]
    for arguments, message in (
        (["features", "--config", "config.yaml", "--size", "128x192"], "--study and --backbone, or --references"),
        (["scores", "--config", "config.yaml", *place, "--variant", "nap"], "did you mean 'npa'"),
        (["features", "--config", "config.yaml", *place[2:], "--study", "mian"], "did you mean 'main'"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    path = layout.scores(config, config.image_sets()[0])
    data = path.read_bytes()
    path.unlink()
    assert main(["metrics", "--config", "config.yaml"]) == 2
    assert "hires scores" in capsys.readouterr().err
    path.write_bytes(data)


def test_a_full_disk_keeps_the_old_features(config):
    path = layout.reference_features(config, 128, 192)
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    features = Features.load(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(HiresError, match=r"cannot write .*finished work is kept"):
            features.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and not list(path.parent.glob(".*"))


def test_a_damaged_image_is_named(config, capsys):
    images = config.image_sets()[0]
    victim = layout.image(config, images, read_prompts(layout.prompts(config))[1].id, 1)
    data, features = victim.read_bytes(), layout.features(config, images)
    stored = features.read_bytes()
    victim.write_bytes(data[:200])
    features.unlink()
    arguments = ["--study", "main", "--backbone", "tiny-flux", "--size", "128x192", "--variant", "upsample"]
    assert main(["features", "--config", "config.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert str(victim) in error
    assert error.count("\n") == 1
    assert not features.exists()
    victim.write_bytes(data)
    features.write_bytes(stored)


def test_the_command_line_makes_what_the_functions_make(config, capsys):
    before = layout.metrics(config).read_bytes()
    layout.reference_features(config, 128, 192).unlink()
    assert main(["features", "--config", "config.yaml", "--size", "128x192", "--references"]) == 0
    place = ["--study", "few", "--backbone", "tiny-flux", "--size", "128x192", "--setting", "b"]
    assert main(["scores", "--config", "config.yaml", *place]) == 0
    assert main(["metrics", "--config", "config.yaml"]) == 0
    assert layout.metrics(config).read_bytes() == before
