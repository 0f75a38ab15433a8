"""`hires memory`: rows of the small architectures in every mode, the tables; full-size models by shape."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from hires import memory
from hires.backbones import load
from hires.cli import main
from hires.errors import HiresError
from hires.memory import Load, Row
from hires.variants import VARIANTS

ROOT = Path(__file__).parents[1]


def tiny(model="tiny-flux", **mode):
    return Load(model=model, dtype="float32", images={"256x256": ["scalediff"]}, **mode)


def made(entry, variant="scalediff", size=256, steps=2, device="cpu", backbone=None):
    row = Row("mine", size, size, variant)
    return memory.image(backbone or memory.prepared(entry, device, adapter=False), row, entry, steps)


@pytest.fixture(scope="module")
def flux():
    return memory.prepared(tiny(), "cpu", adapter=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_reaches_a_decoded_image(flux, variant):
    found = made(tiny(), variant, backbone=flux)
    names = {"noise": ["noise", "decode"], "base": ["base", "stage-1", "decode"]}[VARIANTS[variant].start]
    assert [stage["stage"] for stage in found["stages"]] == (["base", "upsample"] if variant == "upsample" else names)
    assert found["reason"] is None and all(stage["finite"] for stage in found["stages"])
    assert (found["composed_seconds"] is None) == (variant == "diffusehigh")
    assert found["peak_gb"] == max(stage["peak_gb"] for stage in found["stages"]) > 0


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sdxl"])
@pytest.mark.parametrize("mode", [{"offload": "group"}, {"offload": "model", "fp8": True}])
def test_every_mode_reaches_a_decoded_image(model, mode):
    found = made(tiny(model, **mode))
    assert found["reason"] is None and all(stage["finite"] for stage in found["stages"])
    assert found["mode"] == tiny(model, **mode).mode() != "float32"


def test_seconds_are_composed_for_the_published_steps(flux):
    found = made(tiny(), steps=3, backbone=flux)
    base, stage, decode = found["stages"]
    defaults = flux.defaults
    assert (base["published_steps"], stage["published_steps"]) == (
        defaults.num_inference_steps, defaults.stage_steps(),
    )  # fmt: skip
    for part in (base, stage):
        left_out = part["published_steps"] - 3
        assert part["composed_seconds"] == pytest.approx(part["seconds"] + left_out * part["seconds_per_step"])
        assert 0 < 2 * part["seconds_per_step"] < part["seconds"]
    total = base["composed_seconds"] + stage["composed_seconds"] + decode["seconds"]
    assert found["composed_seconds"] == pytest.approx(total)


def test_numbers_that_are_not_finite_are_told():
    backbone = memory.prepared(tiny(), "cpu", adapter=False)
    backbone.model.proj_out.bias.fill_(torch.nan)
    found = made(tiny(), "direct", backbone=backbone)
    assert not found["stages"][0]["finite"] and memory.line(found).endswith("NOT FINITE)")


def test_the_command_keeps_what_is_there(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    command = ["memory", "--config", str(ROOT / "config/memory.yaml"), "--out", str(tmp_path)]
    only = ["--rows", "tiny-flux-group*"]
    assert main([*command, *only]) == 0
    assert "No GPU: the small architectures stand in" in (told := capfd.readouterr().out)
    assert "tiny-flux-group-256x256-scalediff: " in told
    (row,) = (tmp_path / "cpu" / "rows").iterdir()
    before = row.stat().st_mtime_ns
    assert main([*command, *only]) == 0 and row.stat().st_mtime_ns == before
    table = pd.read_csv(tmp_path / "cpu" / "memory.csv")
    assert table[["row", "mode"]].to_numpy().tolist() == [[row.stem, "float32, group offload"]]
    assert main([*command, "--rows", "tiny-flux-grup-256x256-scalediff"]) == 2
    assert "did you mean 'tiny-flux-group-256x256-scalediff'" in capfd.readouterr().err
    settings = memory.load_memory(ROOT / "config/memory.yaml").without_gpu["tiny-flux-group"]
    other = settings.model_copy(update={"fp8": True})
    place = Row("tiny-flux-group", 256, 256, "scalediff")
    assert memory.finished(tmp_path / "cpu", place, settings, 2)
    assert not memory.finished(tmp_path / "cpu", place, other, 2)
    assert not memory.finished(tmp_path / "cpu", place, settings, 3)


def test_the_configuration_holds_what_it_promises():
    loads = memory.load_memory(ROOT / "config/memory.yaml").loads
    table = {
        (loads[row.load].model, row.height, row.variant)
        for row in memory.rows(loads)
        if loads[row.load].offload == "none"
    }
    assert {variant for model, side, variant in table if (model, side) == ("flux-dev", 4096)} == set(VARIANTS)
    without = {name for name, variant in VARIANTS.items() if not variant.adapter}
    assert {variant for model, side, variant in table if (model, side) == ("sdxl", 4096)} == without
    limits = {(entry.model, *entry.images, entry.limit_gb) for entry in loads.values() if entry.limit_gb}
    assert limits == {("flux-dev", "4096x4096", 24), ("sdxl", "4096x4096", 12), ("flux-dev", "8192x8192", 80)}
    assert {(e.offload, e.fp8) for e in loads.values()} >= {
        ("none", False),
        ("model", False),
        ("group", False),
        ("none", True),
    }
    plan = memory.plan(loads, memory.rows(loads), 2)
    assert "? s" not in plan and plan.endswith("in all, on one H200")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps: 1", "steps = 1"),
        ("loads: {a: {model: sdxl, dtype: float16, images: {512x512: [scaledif]}}}", "did you mean 'scalediff'"),
        ("loads: {a: {model: sdxl, dtype: half, images: {512x512: [npa]}}}", "allowed: float32, bfloat16 or float16"),
        ("loads: {a: {model: sdxl, dtype: float16, images: {512x512: [npa]}, fp9: 1}}", "did you mean 'fp8'"),
        ("[]", "must be a mapping of keys (steps, loads, without_gpu)"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, told):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(HiresError) as error:
        memory.load_memory(tmp_path / "m.yaml")
    assert told in str(error.value) and "\n" not in str(error.value) and "m.yaml" in str(error.value)


# --- tables


@pytest.fixture
def measured(tmp_path):
    """Rows as a GPU would leave them: one done, one out of memory."""
    folder = tmp_path / "measured"
    done = made(tiny())
    done |= {"model": "flux-dev", "height": 4096, "width": 4096, "limit_gb": 24.0, "machine": {"gpu": "GPU"}}
    short = {
        **done,
        "row": "z",
        "limit_gb": None,
        "reason": "out of memory after 1 stages: no",
        "machine": {"gpu": "GPU"},
    }
    del short["composed_seconds"], short["peak_gb"]
    for row in (done, short):
        memory.write_json(folder / "rows" / f"{row['row']}.json", row)
    return folder


def test_promotion_fills_the_readme(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "README.md", "README.md")
    assert main(["promote", "memory", "--from", str(measured)]) == 0
    text = Path("README.md").read_text()
    assert "| flux-dev | 4096x4096 | float32, within 24 GB | " in text and "| out of memory | |" in text
    assert text == memory.readme_with_table(text, memory.REFERENCE / "memory.csv") and memory.UNMEASURED not in text
    assert "memory/memory.csv" in Path("results/reference/SHA256SUMS").read_text()
    stages = pd.read_csv(memory.REFERENCE / "stages.csv")
    assert stages["stage"].tolist() == 2 * ["base", "stage-1", "decode"]
    row = next((measured / "rows").iterdir())
    row.write_text(json.dumps({**json.loads(row.read_text()), "machine": {"gpu": None}}))
    with pytest.raises(HiresError, match="made without a GPU"):
        memory.promote(measured)


def test_the_readme_agrees_with_the_reference():
    text = (ROOT / "README.md").read_text()
    assert text == memory.readme_with_table(text, ROOT / memory.REFERENCE / "memory.csv")


# --- full-size models, without memory


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("flux-dev", {"transformer": 11901.4, "text_encoder": 123.1, "text_encoder_2": 4762.3, "vae": 83.8}),
        ("sdxl", {"unet": 2567.5, "text_encoder": 123.1, "text_encoder_2": 694.7, "vae": 83.7}),
    ],
)
def test_a_full_size_pipeline_is_whole(name, millions):
    pipe = load(name, device="meta", weights="random").pipe
    for part, count in millions.items():
        assert sum(p.numel() for p in getattr(pipe, part).parameters()) / 1e6 == pytest.approx(count, abs=0.06)
    lengths = (pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length)
    assert lengths == (77, 512 if name == "flux-dev" else 77)
    tokens = pipe.tokenizer_2([memory.PROMPT], padding="max_length").input_ids
    assert len(tokens[0]) == lengths[1] and max(tokens[0]) < pipe.text_encoder_2.config.vocab_size


@pytest.mark.gpu
def test_a_limit_is_kept():
    entry = Load(model="tiny-flux", dtype="bfloat16", limit_gb=0.05, images={"512x512": ["direct"]})
    found = made(entry, "direct", 512, device="cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert found["reason"].startswith("out of memory after 0 stages")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [{"offload": "model"}, {"offload": "group"}, {"fp8": True}])
@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sdxl"])
def test_modes_on_a_gpu(model, mode):
    dtype = {"tiny-flux": "bfloat16", "tiny-sdxl": "float16"}[model]
    found = made(Load(model=model, dtype=dtype, images={"256x256": ["scalediff"]}, **mode), device="cuda")
    assert found["reason"] is None and all(stage["finite"] for stage in found["stages"])
