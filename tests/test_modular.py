"""Blocks of Modular Diffusers against `hires.cascade`: stock blocks and ours, the same seeds, the same latents."""

from pathlib import Path

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import FluxAutoBlocks, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.flux.before_denoise import FluxRoPEInputsStep
from diffusers.modular_pipelines.flux.decoders import FluxUnpackLatentsStep
from diffusers.modular_pipelines.flux.denoise import FluxDenoiseLoopWrapper, FluxLoopAfterDenoiser, FluxLoopDenoiser
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks
from extended import build_pipeline

from hires import modular
from hires.backbones import Backbone
from hires.cascade import cascade
from hires.errors import HiresError
from hires.models import HINTS
from hires.settings import Sampling
from hires.variants import VARIANTS

PROMPTS = ["three red cubes", "a blue ball on a green plane"]
SEEDS = [3, 4]
FAMILIES = {
    "tiny-flux": (FluxAutoBlocks, modular.FluxScaleDiffStage),
    "tiny-sdxl": (StableDiffusionXLAutoBlocks, modular.StableDiffusionXLScaleDiffStage),
}


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def pipes():
    return {name: build_pipeline(name) for name in FAMILIES}


def compose(pipe, name, stages, guidance_scale=2.0):
    """The family's own blocks with `stages` before "decode", on the components of a stock pipeline."""
    blocks = FAMILIES[name][0]()
    for number, stage in enumerate(stages, 1):
        blocks.sub_blocks.insert(f"stage_{number}", stage, len(blocks.sub_blocks) - 1)
    composed = blocks.init_pipeline()
    given = {part: value for part, value in pipe.components.items() if part in composed.component_names and value}
    composed.update_components(**given)
    if name == "tiny-sdxl":
        guider = ClassifierFreeGuidance(guidance_scale=guidance_scale, enabled=guidance_scale > 1)
        composed.update_components(guider=guider)
    return composed


def inputs(name, guidance_scale=2.0, **more):
    sampling = HINTS[name]["sampling"]
    given = {"prompt": PROMPTS, "height": 128, "width": 96, "num_inference_steps": 3, "generator": generators(),
             "tau": 600.0, "vae_tiling": False, "output_type": "pt"}  # fmt: skip
    given |= {setting: sampling[setting] for setting in ("gamma", "lfm_factor", "sg_factor")}
    if name == "tiny-flux":
        given |= {"guidance_scale": guidance_scale, "max_sequence_length": 40}
    return {**given, **more}


def expected(pipe, name, variant, scale, guidance_scale=2.0, **settings):
    backbone = Backbone.from_pipeline(pipe, name, HINTS[name])
    sampling = Sampling(num_inference_steps=3, guidance_scale=guidance_scale, tau=600, **settings)
    *_, last = cascade(backbone, PROMPTS, SEEDS, VARIANTS[variant], 128 * scale, 96 * scale, sampling)
    return last.latents


@pytest.mark.parametrize(
    "name, guidance_scale, stages, tolerance",
    [
        ("tiny-flux", 2.0, 2, 1e-5),
        ("tiny-sdxl", 1.0, 2, 1e-5),
        ("tiny-sdxl", 2.0, 1, 2e-4),  # diffusers' guider makes two calls of what is one in the pipeline
    ],
)
def test_stages_are_the_cascade(pipes, name, guidance_scale, stages, tolerance):
    composed = compose(pipes[name], name, [FAMILIES[name][1]() for _ in range(stages)], guidance_scale)
    state = composed(**inputs(name, guidance_scale))
    want = expected(pipes[name], name, "scalediff", 2**stages, guidance_scale)
    torch.testing.assert_close(state.get("latents"), want, atol=tolerance, rtol=0)
    size = (128 * 2**stages, 96 * 2**stages)
    assert (state.get("height"), state.get("width")) == size == tuple(state.get("images").shape[2:])
    assert state.get("num_inference_steps") == 2
    model = composed.transformer if name == "tiny-flux" else composed.unet
    assert not [p for p in model.attn_processors.values() if "Npa" in type(p).__name__]


@pytest.mark.parametrize("settings", [{"low_pass": "fft"}, {"upsampling": "lanczos"}, {"gamma_scale": 0.5}], ids=str)
def test_settings_are_the_cascades(pipes, settings):
    composed = compose(pipes["tiny-flux"], "tiny-flux", [modular.FluxScaleDiffStage()])
    state = composed(**inputs("tiny-flux", **settings))
    want = expected(pipes["tiny-flux"], "tiny-flux", "scalediff", 2, **settings)
    torch.testing.assert_close(state.get("latents"), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "variant, loop, guided",
    [
        ("npa+lfm", modular.FluxNeighborhoodPatchAttentionLoop, False),
        ("dense+lfm+sg", FluxDenoiseLoopWrapper, True),
    ],
)
def test_blocks_stand_alone(pipes, variant, loop, guided):
    """NPA around diffusers' loop without SG, and SG in a loop of dense attention."""
    steps = {"denoiser": FluxLoopDenoiser(), "after_denoiser": FluxLoopAfterDenoiser()}
    if guided:
        steps = {"denoiser": steps["denoiser"], "guidance": modular.FluxLoopStructureGuidance(),
                 "after_denoiser": steps["after_denoiser"]}  # fmt: skip
    stage = SequentialPipelineBlocks.from_blocks_dict({
        "mix": modular.FluxLatentFrequencyMixingStep(), "noise": modular.FluxStageNoiseStep(),
        "rope": FluxRoPEInputsStep(), "denoise": loop.from_blocks_dict(steps), "unpack": FluxUnpackLatentsStep(),
    })  # fmt: skip
    state = compose(pipes["tiny-flux"], "tiny-flux", [stage])(**inputs("tiny-flux"))
    want = expected(pipes["tiny-flux"], "tiny-flux", variant, 2)
    torch.testing.assert_close(state.get("latents"), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"generator": None}, "0 generators for 2 images"),
        ({"scale_factor": 1.3}, "sides must be multiples of 16"),
        ({"tau": 10.0}, "leaves no step"),
        ({"low_pass": "bicubik"}, "low_pass"),
        ({"attention_backend": "spda"}, "did you mean 'sdpa'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_model_as_it_was(pipes, change, message):
    before = dict(pipes["tiny-flux"].transformer.attn_processors)
    composed = compose(pipes["tiny-flux"], "tiny-flux", [modular.FluxScaleDiffStage()])
    with pytest.raises(HiresError, match=message) as error:
        composed(**inputs("tiny-flux", **change))
    assert "\n" not in str(error.value)
    assert pipes["tiny-flux"].transformer.attn_processors == before


def test_the_documented_example_runs(pipes):
    """docs/modular.md, with the tiny model in place of the hub's."""
    text = (Path(__file__).parent.parent / "docs" / "modular.md").read_text()
    code = text.split("```python")[1].split("```")[0]
    before, after = code.split("pipe.load_components(dtype=torch.bfloat16)\n")
    scope = {}
    exec(before.replace('"black-forest-labs/FLUX.1-dev"', ""), scope)
    tiny = pipes["tiny-flux"].components
    scope["pipe"].update_components(**{k: v for k, v in tiny.items() if k in scope["pipe"].component_names and v})
    exec(after.replace('.to("cuda")', "").replace("1024", "64").replace("=30", "=2"), scope)
    assert scope["image"].size == (256, 256)
