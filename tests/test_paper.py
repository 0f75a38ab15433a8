"""config/paper.yaml: the papers' settings, what it plans, what it says where LAION is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from hires.additions.lora import save_lora
from hires.backbones import Backbone, load
from hires.backbones.catalogue import CONFIGS
from hires.cascade import cascade
from hires.config import load_config
from hires.errors import HiresError
from hires.models import HINTS, build_pipeline
from hires.settings import Sampling
from hires.stages import models
from hires.stages.arithmetic import ARCHITECTURES, step_flop
from hires.stages.plan import PAPERS, plan
from hires.variants import VARIANTS

ROOT = Path(__file__).parents[1]
SIZES = ("2048x2048", "4096x4096")

SCALEDIFF_FLUX = {
    "num_inference_steps": 30, "guidance_scale": 3.5, "max_sequence_length": 256, "tau": 600,
    "lfm_factor": 1 / 4, "sg_factor": 1 / 4, "gamma": "sigma", "local_radius": 8,
}  # fmt: skip
SCALEDIFF_SDXL = {
    "num_inference_steps": 50, "guidance_scale": 7.5, "tau": 400,
    "lfm_factor": 1 / 8, "sg_factor": 1 / 8, "gamma": "one_minus_alpha_bar",
}  # fmt: skip
SCALE_DIT = {
    "num_inference_steps": 28, "guidance_scale": 3.5, "stage_guidance_scale": 4.5, "stage_shift": 3,
    "max_sequence_length": 512, "tau": 643, "lr_ratio": 4, "local_radius": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def paper():
    return load_config(ROOT / "config/paper.yaml")


@pytest.fixture(scope="module")
def rows(paper):
    return plan(paper)


def test_the_settings_are_the_papers(paper):
    def stated(*place):
        return paper.sampling(*place).model_dump(exclude_unset=True)

    assert stated("main", "default", "flux-dev") == stated("scale-dit", "as-scalediff", "flux-dev") == SCALEDIFF_FLUX
    assert stated("main", "default", "sdxl") == SCALEDIFF_SDXL
    for tau in (300, 400, 500, 600, 700):
        assert stated("tau", f"tau-{tau}", "sdxl") == SCALEDIFF_SDXL | {"tau": tau}
    assert stated("scale-dit", "as-scale-dit", "flux-dev") == SCALEDIFF_FLUX | SCALE_DIT
    models = {name: (entry.model, entry.dtype, entry.base_resolution) for name, entry in paper.backbones.items()}
    assert models == {"flux-dev": ("flux-dev", "bfloat16", 1024), "sdxl": ("sdxl", "float16", 1024)}
    assert (paper.prompts.n, paper.metrics.features, paper.metrics.clip, paper.metrics.patch.size) == (
        1000, "inception", "openai/clip-vit-large-patch14", 299,
    )  # fmt: skip


def test_what_a_paper_leaves_to_the_library_is_its_default(paper):
    """Stated numbers agree with what the full-size models would take by themselves."""
    found = {name: load(name, device="meta", weights="random").defaults for name in ("flux-dev", "sdxl")}
    assert SCALEDIFF_FLUX.items() - found["flux-dev"].model_dump().items() == {("max_sequence_length", 256)}
    assert SCALEDIFF_SDXL.items() <= found["sdxl"].model_dump().items()


def test_stages_begin_at_the_published_noise(paper):
    """ScaleDiff: σ .826; Scale-DiT: a shift of 3 above the base, σ .844, and the base as ever."""
    dev = FlowMatchEulerDiscreteScheduler.from_pretrained(CONFIGS / "flux-dev" / "scheduler")
    pipe = FluxPipeline(**{**build_pipeline("tiny-flux").components, "scheduler": dev})
    flux, base = Backbone.from_pipeline(pipe, "dev", {}), (128, 128)
    scalediff, scale_dit = (
        paper.sampling("scale-dit", setting, "flux-dev") for setting in ("as-scalediff", "as-scale-dit")
    )
    assert flux.schedule(scalediff, base, flux.first_step(scalediff)).sigmas[12] == pytest.approx(0.826, abs=5e-4)
    assert flux.schedule(scale_dit, base, flux.first_step(scale_dit)).sigmas[10] == pytest.approx(0.844, abs=5e-4)
    fixed = FlowMatchEulerDiscreteScheduler.from_config(dev.config, use_dynamic_shifting=False)
    flux.pipe.register_modules(scheduler=fixed)
    with pytest.raises(HiresError, match="stage_shift: this model's scheduler has a shift of its own"):
        flux.schedule(scale_dit, base, 10)


def test_the_shift_of_stages_leaves_the_base_alone():
    flux = Backbone.from_pipeline(build_pipeline("tiny-flux"), "tiny-flux", HINTS["tiny-flux"])
    given = Sampling(num_inference_steps=2, tau=500)
    shifted = Sampling(stage_shift=2).over(given)
    for variant, same in (("scalediff", [True, False]), ("direct", [True])):
        stages = [list(cascade(flux, ["a"], [0], VARIANTS[variant], 256, 256, s)) for s in (given, shifted)]
        assert [torch.equal(a.latents, b.latents) for a, b in zip(*stages)] == same


def test_every_variant_is_made_at_both_sizes_of_a_thousand_prompts(paper):
    made = {
        b: {(s.variant, s.size) for s in paper.image_sets() if s.backbone == b and s.n == 1000} for b in paper.backbones
    }
    assert made["flux-dev"] == {(name, size) for name in VARIANTS for size in SIZES}
    assert made["sdxl"] == {(name, size) for name in VARIANTS if not VARIANTS[name].adapter for size in SIZES}
    assert {s.n for s in paper.image_sets() if s.study == "panorama"} == {100}


@pytest.mark.parametrize(
    ("study", "setting", "backbone", "variant", "stages"),
    [
        ("main", "default", "flux-dev", "scalediff", "2048x2048: 18, 4096x4096: 18"),
        ("main", "default", "sdxl", "scalediff", "2048x2048: 20, 4096x4096: 20"),
        ("main", "default", "sdxl", "direct", "4096x4096: 50"),
        ("main", "default", "flux-dev", "upsample", "4096x4096: 0"),
        ("scale-dit", "as-scale-dit", "flux-dev", "scale-dit", "4096x4096: 18"),
        ("scale-dit", "as-scalediff", "flux-dev", "hybrid", "2048x2048: 18, 4096x4096: 18"),
    ],
)
def test_stages_have_the_published_steps(rows, study, setting, backbone, variant, stages):
    place = (study, setting, backbone, variant, "4096x4096")
    (row,) = [r for r in rows if (r.study, r.setting, r.backbone, r.variant, r.size) == place]
    assert row.stages == stages


def test_base_images_and_the_sweep_have_the_published_steps(rows):
    bases = {(r.backbone, r.stages) for r in rows if r.variant == "base"}
    assert bases == {("flux-dev", "1024x1024: 30"), ("flux-dev", "1024x1024: 28"), ("sdxl", "1024x1024: 50")}
    sweep = [r.stages for r in rows if r.study == "tau"]
    assert sweep == [f"2048x2048: {steps}" for steps in (15, 20, 25, 30, 35)]


def test_the_plan_needs_neither_weights_nor_network(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hires.cli", "plan", "--config", ROOT / "config/paper.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "scale-dit, as-scale-dit, flux-dev: 28 steps, τ 643 → 18 of 28 (0.643)" in done.stdout
    assert "main, default, sdxl: 50 steps, τ 400 → 20 of 50 (0.400)" in done.stdout
    assert re.search(r"\d+ images in \d+ jobs: about \d+ PFLOP of denoising, \d+ GPU-days at 200 TFLOP/s", done.stdout)
    assert not any(tmp_path.iterdir())


def test_a_missing_parquet_folder_is_told_in_one_line(tmp_path):
    for name in ("config", "notebooks"):
        (tmp_path / name).symlink_to(ROOT / name)
    binaries = Path(sys.executable).parent
    command = [binaries / "snakemake", "--snakefile", ROOT / "Snakefile", "-n", "--configfile", "config/paper.yaml"]
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    told = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "data/laion" in line]
    assert done.returncode == 2 and "Traceback (most recent" not in done.stdout + done.stderr
    assert told == [
        "snakemake: prompts.source 'data/laion' does not exist: put parquet files there, "
        "or name your own file, folder or glob: "
        "snakemake --config 'prompts={source: PATH}', or a configuration that extends this one"
    ]


# what a step costs


def counted(name, size, text=0):
    """FLOP of one model call, as torch counts them on the full-size architecture without memory."""
    backbone = load(name, device="meta", weights="random")
    model, (h, w) = backbone.model, (size[0] // 8, size[1] // 8)
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        if name == "flux-dev":
            model(
                hidden_states=torch.empty(1, h * w // 4, 64, dtype=model.dtype),
                timestep=torch.empty(1, dtype=model.dtype),
                guidance=torch.empty(1),
                pooled_projections=torch.empty(1, 768, dtype=model.dtype),
                encoder_hidden_states=torch.empty(1, text, 4096, dtype=model.dtype),
                txt_ids=torch.empty(text, 3),
                img_ids=torch.empty(h * w // 4, 3),
            )
        elif name == "flux2-klein":
            model(
                hidden_states=torch.empty(1, h * w // 4, 128, dtype=model.dtype),
                timestep=torch.empty(1, dtype=model.dtype),
                encoder_hidden_states=torch.empty(1, text, 7680, dtype=model.dtype),
                txt_ids=torch.empty(text, 4),
                img_ids=torch.empty(h * w // 4, 4),
            )
        else:
            model(
                torch.empty(1, 4, h, w, dtype=model.dtype),
                torch.empty((), dtype=torch.int64),
                encoder_hidden_states=torch.empty(1, 77, 2048, dtype=model.dtype),
                added_cond_kwargs={
                    "text_embeds": torch.empty(1, 1280, dtype=model.dtype),
                    "time_ids": torch.empty(1, 6, dtype=model.dtype),
                },
            )
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["flux-dev", "flux2-klein"])
@pytest.mark.parametrize(("size", "text"), [((1024, 1024), 512), ((2048, 1024), 256), ((4096, 4096), 512)])
def test_dense_flux_costs_what_torch_counts(name, size, text):
    found = step_flop(ARCHITECTURES[name], size, size, VARIANTS["direct"], Sampling(max_sequence_length=text))
    assert found == pytest.approx(counted(name, size, text), rel=0.01)


def test_plan_knows_the_defaults_of_flux2():
    for name in ("flux2-klein", "flux2-klein-base"):
        assert ARCHITECTURES[name].calls == (2 if PAPERS[name].num_inference_steps == 50 else 1)
    defaults = load("flux2-klein", device="meta", weights="random").defaults
    assert PAPERS["flux2-klein"].over(defaults) == defaults


@pytest.mark.parametrize("size", [(1024, 1024), (2048, 1024), (4096, 4096)])
def test_dense_sdxl_costs_what_torch_counts(size):
    found = step_flop(ARCHITECTURES["sdxl"], size, size, VARIANTS["direct"], Sampling())
    assert found == pytest.approx(2 * counted("sdxl", size), rel=0.01)  # guidance: two calls a step


def test_methods_cost_what_the_paper_derives():
    """ScaleDiff's table in units of a base call: NPA s², MultiDiffusion (2s − 1)². Scale-DiT saves more than a half."""
    base, size = (1024, 1024), (4096, 4096)

    def cost(name, variant):
        at = base if variant == "base" else size
        return step_flop(ARCHITECTURES[name], at, base, VARIANTS.get(variant, VARIANTS["direct"]), Sampling())

    assert cost("sdxl", "npa") == pytest.approx(16 * cost("sdxl", "base"))
    for name in ARCHITECTURES:
        assert cost(name, "multidiffusion+lfm+sg") == pytest.approx(49 * cost(name, "base"))
    assert cost("flux-dev", "npa") == pytest.approx(16 * cost("flux-dev", "base"), rel=0.03)  # text isn't enlarged
    assert cost("flux-dev", "direct") / cost("flux-dev", "scale-dit") > 2.29


# an adapter that lies where the configuration says


def test_an_adapter_is_loaded_from_its_place_when_a_variant_needs_it(tmp_path, paper):
    pipe = build_pipeline("tiny-flux")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "scale-dit")
    save_lora(pipe, tmp_path / "lora", "scale-dit")
    entry = paper.backbones["flux-dev"].model_copy(
        update={"model": "x", "adapters": {"scale-dit": str(tmp_path / "lora")}}
    )
    assert models.files(entry) == [tmp_path / "lora" / "pytorch_lora_weights.safetensors"]
    assert models.identity(entry) == models.identity(paper.backbones["flux-dev"].model_copy(update={"model": "x"}))
    assert models.identity(entry, "scale-dit") != models.identity(entry)

    backbone = Backbone.from_pipeline(build_pipeline("tiny-flux"), "tiny-flux", HINTS["tiny-flux"])
    backbone.adapters = {"scale-dit": tmp_path / "lora"}
    assert backbone.pipe.get_list_adapters() == {}
    backbone.require_adapter("scale-dit")
    assert backbone.pipe.get_list_adapters() == {"transformer": ["scale-dit"]}
    backbone.adapters = {"other": tmp_path / "nowhere"}
    with pytest.raises(HiresError, match=r"needs the adapter 'other', and .*nowhere isn't there"):
        backbone.require_adapter("other")
