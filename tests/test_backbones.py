"""Backbones against the stock diffusers pipelines, and every schedule against its own definition."""

import copy
import json
import shutil

import diffusers
import numpy as np
import pytest
import tiny_flux2
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

import hires
from hires.attention import use_attention
from hires.attention.flux import image_ids
from hires.backbones import Backbone, Schedule, load
from hires.backbones.catalogue import CONFIGS
from hires.backbones.flux import pack, unpack
from hires.cascade import base_latents, to_images
from hires.errors import HiresError
from hires.models import HINTS, build_pipeline
from hires.settings import Resolved, Sampling

PROMPTS = ["three red cubes", "a blue ball on a green plane"]
SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "dpm": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def scheduler(name, **options):
    class_name, more = SCHEDULERS[name]
    return getattr(diffusers, class_name)(**SDXL_BETAS, **more, **options)


@pytest.fixture(scope="module")
def flux():
    return Backbone.from_pipeline(build_pipeline("tiny-flux"), "tiny-flux", HINTS["tiny-flux"])


@pytest.fixture(scope="module")
def klein():
    return Backbone.from_pipeline(tiny_flux2.build_pipeline(), "tiny-flux2", tiny_flux2.HINTS)


@pytest.fixture(scope="module")
def sdxl_pipe():
    return build_pipeline("tiny-sdxl")


@pytest.fixture
def sdxl(sdxl_pipe):
    """With a scheduler and a VAE of its own, for a test to change."""
    own = {name: copy.deepcopy(sdxl_pipe.components[name]) for name in ("scheduler", "vae")}
    pipe = StableDiffusionXLPipeline(**{**sdxl_pipe.components, **own})
    pipe.set_progress_bar_config(disable=True)
    return Backbone.from_pipeline(pipe, "tiny-sdxl", HINTS["tiny-sdxl"])


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- the base stage is the stock pipeline -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_flux_base_is_the_stock_pipeline(flux, size):
    stock = flux.pipe(
        PROMPTS,
        height=size[0],
        width=size[1],
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=40,
        generator=generators(3, 4),
        output_type="latent",
    ).images
    ours = base_latents(flux, PROMPTS, [3, 4], *size, Sampling(num_inference_steps=4, guidance_scale=3.0))
    assert torch.equal(ours, unpack(stock, (size[0] // 8, size[1] // 8)))


@pytest.mark.parametrize("dynamic", [True, False])
def test_flux_base_follows_the_shift_of_the_scheduler(dynamic):
    pipe = build_pipeline("tiny-flux")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=dynamic, shift=3.0, base_image_seq_len=16, max_image_seq_len=400
    )
    stock = pipe(PROMPTS[0], height=96, width=160, num_inference_steps=3, guidance_scale=3.5, max_sequence_length=40,
                 generator=generators(0), output_type="latent").images  # fmt: skip
    backbone = Backbone.from_pipeline(pipe, "mine", HINTS["tiny-flux"])
    ours = base_latents(backbone, PROMPTS[:1], [0], 96, 160, Sampling(num_inference_steps=3, guidance_scale=3.5))
    assert torch.equal(ours, unpack(stock, (12, 20)))


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
@pytest.mark.parametrize(
    "distilled, options",
    [(False, {"guidance_scale": 3.0}), (False, {"guidance_scale": 1.0}), (True, {})],
    ids=["guided", "unguided", "distilled"],
)
def test_flux2_base_is_the_stock_pipeline(distilled, options, size):
    """Noise, shift, positions, text and guidance: the last latents of the loop, and what the VAE is given."""
    pipe = tiny_flux2.build_pipeline(distilled)
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return tensors

    stock = pipe(
        prompt=PROMPTS, height=size[0], width=size[1], num_inference_steps=3, max_sequence_length=40,
        generator=generators(3, 4), output_type="latent", callback_on_step_end=keep, **options,
    ).images  # fmt: skip
    backbone = Backbone.from_pipeline(pipe, "tiny-flux2", tiny_flux2.HINTS)
    ours = base_latents(backbone, PROMPTS, [3, 4], *size, Sampling(num_inference_steps=3, **options))
    assert torch.equal(ours, unpack(seen[-1], (size[0] // 8, size[1] // 8)))
    assert torch.equal(backbone._denormalise(ours), stock)
    torch.testing.assert_close(backbone._normalise(stock), ours, atol=1e-4, rtol=1e-4)


def test_flux2_negative_prompt_is_the_stock_pipelines(klein):
    negative = klein.pipe.encode_prompt("a grey cone", max_sequence_length=40)[0]
    stock = klein.pipe(
        prompt=PROMPTS[0], height=128, width=128, num_inference_steps=2, guidance_scale=3.0, max_sequence_length=40,
        negative_prompt_embeds=negative, generator=generators(5), output_type="latent",
    ).images  # fmt: skip
    sampling = Sampling(num_inference_steps=2, guidance_scale=3.0, negative_prompt="a grey cone")
    assert torch.equal(klein._denormalise(base_latents(klein, PROMPTS[:1], [5], 128, 128, sampling)), stock)


def test_flux2_settings_without_use_are_refused(klein):
    distilled = Backbone.from_pipeline(tiny_flux2.build_pipeline(is_distilled=True), "tiny-flux2", tiny_flux2.HINTS)
    for backbone, setting in (
        (klein, {"time_ids": "base"}), (klein, {"local_radius": 4}), (distilled, {"guidance_scale": 3.0}),
        (distilled, {"negative_prompt": "blurry"}),
    ):  # fmt: skip
        with pytest.raises(HiresError, match="means nothing to a flux2 model"):
            backbone.check_settings(Sampling(**setting))
    klein.check_settings(Sampling(guidance_scale=3.0, negative_prompt="blurry"))
    for variant in ("scale-dit", "hybrid"):
        with pytest.raises(HiresError, match="has a Flux2AttnProcessor: scale_dit stands in for FLUX's"):
            hires.generate(klein, PROMPTS[0], variant, height=256, width=256)


def test_the_guidance_weight_of_another_family_is_refused(flux, klein, sdxl):
    """1 − ᾱ_t and σ_t are one number to the schedule: without a check each name would stand for the other."""
    for backbone, own, other in ((flux, "sigma", "one_minus_alpha_bar"), (klein, "sigma", "one_minus_alpha_bar"),
                                 (sdxl, "one_minus_alpha_bar", "sigma")):  # fmt: skip
        for gamma in (own, "normalised", "t_raw", None):
            backbone.check_settings(Sampling(gamma=gamma))
        with pytest.raises(HiresError, match=f"gamma = '{other}': .* allowed: {own}, normalised, t_raw"):
            backbone.check_settings(Sampling(gamma=other))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_sdxl_base_is_the_stock_pipeline(sdxl, name, prediction):
    sdxl.pipe.scheduler = scheduler(name, prediction_type=prediction)
    stock = sdxl.pipe(
        PROMPTS, height=96, width=96, num_inference_steps=3, guidance_scale=5.0, generator=generators(3, 4),
        output_type="latent",
    ).images  # fmt: skip
    ours = base_latents(sdxl, PROMPTS, [3, 4], 96, 96, Sampling(num_inference_steps=3, guidance_scale=5.0))
    assert torch.equal(ours, stock)


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 1.0}, {"guidance_scale": 4.0, "negative_prompt": "a grey cone"}]
)
def test_sdxl_guidance_is_the_stock_pipelines(sdxl, options):
    sdxl.pipe.scheduler = scheduler("euler")
    stock = sdxl.pipe(
        PROMPTS[0], height=128, width=128, num_inference_steps=3, generator=generators(5), output_type="latent",
        **options,
    ).images  # fmt: skip
    ours = base_latents(sdxl, PROMPTS[:1], [5], 128, 128, Sampling(num_inference_steps=3, **options))
    assert torch.equal(ours, stock)


def test_the_step_from_zero_signal_keeps_its_digits():
    """Euler from σ = 4096, against the same step in float64; diffusers' own form of it loses four digits there."""
    stock = scheduler("euler", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    stock = type(stock).from_config(stock.config, timestep_spacing="trailing", steps_offset=0)
    schedule = Schedule(stock, 2, prediction="v_prediction")
    assert schedule.sigmas[0] > 4000
    latents = schedule.sigmas[0] * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    output = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    x0 = schedule.to_x0(output.double(), latents.double(), 0)
    exact = latents.double() + (latents.double() - x0) / schedule.sigmas[0] * (schedule.sigmas[1] - schedule.sigmas[0])
    schedule.scale_model_input(latents, 0)
    error = (schedule.step(output, latents, 0, []) - exact).norm() / exact.norm()
    stock.set_timesteps(2)
    stock.scale_model_input(latents, stock.timesteps[0])
    lost = (stock.step(output, stock.timesteps[0], latents).prev_sample - exact).norm() / exact.norm()
    assert error < 1e-6 and lost > 3e-5
    step = schedule.step(output, exact.float(), 1, [])  # the last one ends at the clean estimate
    torch.testing.assert_close(step, schedule.to_x0(output, exact.float(), 1))


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-sdxl"])
def test_decoded_image_is_the_stock_pipelines(name):
    pipe = build_pipeline(name)
    pipe.vae.register_to_config(scaling_factor=0.37, shift_factor=0.12 if name == "tiny-flux" else None)
    if name == "tiny-sdxl":
        pipe.scheduler = scheduler("euler")
    options = {"max_sequence_length": 40} if name == "tiny-flux" else {}
    stock = pipe(PROMPTS[0], height=128, width=128, num_inference_steps=2, guidance_scale=2.0,
                 generator=generators(1), **options).images  # fmt: skip
    backbone = Backbone.from_pipeline(pipe, name, HINTS[name])
    latents = base_latents(backbone, PROMPTS[:1], [1], 128, 128, Sampling(num_inference_steps=2, guidance_scale=2.0))
    assert np.array_equal(np.array(to_images(backbone.decode(latents))[0]), np.array(stock[0]))


def test_flux2_decodes_and_encodes_as_the_stock_pipeline(klein):
    stock = klein.pipe(
        prompt=PROMPTS[0], height=128, width=128, num_inference_steps=2, guidance_scale=2.0, max_sequence_length=40,
        generator=generators(1),
    ).images[0]  # fmt: skip
    latents = base_latents(klein, PROMPTS[:1], [1], 128, 128, Sampling(num_inference_steps=2, guidance_scale=2.0))
    assert np.array_equal(np.array(to_images(klein.decode(latents))[0]), np.array(stock))
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    patches = klein.pipe._encode_vae_image(pixels, None)  # as it encodes the pictures of an edit
    torch.testing.assert_close(pack(klein.encode(pixels)), klein.pipe._pack_latents(patches))


def test_users_scheduler_stays_as_it_was(sdxl):
    sdxl.pipe.scheduler.set_timesteps(7)
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in vars(sdxl.pipe.scheduler).items()}
    base_latents(sdxl, PROMPTS[:1], [0], 96, 96, Sampling(num_inference_steps=2))
    after = vars(sdxl.pipe.scheduler)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if torch.is_tensor(value) else value == after[name]


# --- packing --------------------------------------------------------------------------------------------------------


def test_packing_is_diffusers():
    latents = torch.randn(2, 16, 12, 20)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 12, 20))
    assert torch.equal(unpack(tokens, (12, 20)), latents)
    want = FluxPipeline._prepare_latent_image_ids(2, 6, 10, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids((6, 10), torch.device("cpu")), want)


def test_positions_are_those_of_flux2(klein):
    """What the transformer is given: the pipeline's own ids, from its own functions."""
    seen = []
    hook = klein.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    base_latents(klein, PROMPTS[:1], [0], 96, 160, Sampling(num_inference_steps=1, guidance_scale=1.0))
    hook.remove()
    (call,) = seen
    assert torch.equal(call["img_ids"], Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 64, 6, 10))[0].float())
    assert torch.equal(call["txt_ids"], Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, 40, 48))[0].float())


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, tau, run",
    [(50, 400, 20), (30, 600, 18), (28, 340, 10), (4, 500, 2), (10, 1000, 10), (10, 50, 1), (7, 72, 1)],
)
def test_tau_gives_the_last_steps(flux, steps, tau, run):
    assert flux.first_step(Sampling(num_inference_steps=steps, tau=tau).over(flux.defaults)) == steps - run


def test_tau_without_a_step(flux):
    with pytest.raises(HiresError, match=r"tau = 40 of 10 steps .* from 50 to 1000"):
        flux.first_step(Sampling(num_inference_steps=10, tau=40).over(flux.defaults))


def test_first_sigma_of_a_flux_stage_is_the_papers(flux):
    """FLUX.1-dev's scheduler, 30 steps, τ = 600: 0.826 at any resolution, for μ is the base's (1.15)."""
    dev = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(CONFIGS / "flux-dev" / "scheduler")
    backbone = Backbone.from_pipeline(FluxPipeline(**{**flux.pipe.components, "scheduler": dev}), "dev", {})
    sampling = backbone.defaults
    first = backbone.first_step(sampling)
    schedule = backbone.schedule(sampling, backbone.latent_size(1024, 1024), first)
    assert first == 12
    assert schedule.sigmas[first] == pytest.approx(np.exp(1.15) * 0.6 / (np.exp(1.15) * 0.6 + 0.4), abs=1e-5)
    assert schedule.sigmas[first] == pytest.approx(0.826, abs=5e-4)


def test_first_sigma_of_a_flux2_stage(klein):
    """FLUX.2 [klein] base, 50 steps, τ = 400: 0.83, about where FLUX.1-dev's stages start."""
    sampling = Sampling(num_inference_steps=50, tau=400).over(klein.defaults)
    first = klein.first_step(sampling)
    shift = np.exp(compute_empirical_mu(4096, 50))
    schedule = klein.schedule(sampling, klein.latent_size(1024, 1024), first)
    assert schedule.sigmas[first] == pytest.approx(shift * 0.4 / (shift * 0.4 + 0.6), abs=1e-5)
    assert (first, schedule.sigmas[first]) == (30, pytest.approx(0.834, abs=1e-3))


def test_settings_over_defaults_state_what_every_image_needs(flux):
    given = Sampling(tau=300, stage_guidance_scale=4.5, stage_shift=2.0).over(Sampling(num_inference_steps=10))
    assert type(given) is Sampling and given.guidance_scale is None
    resolved = given.over(flux.defaults)
    assert type(resolved) is Resolved and resolved.guidance_scale == flux.defaults.guidance_scale
    base, first, later = resolved.at_base(), resolved.above_base(strength=0.5), resolved.above_base()
    assert (base.guidance_scale, base.stage_shift) == (resolved.guidance_scale, None)
    assert [(s.guidance_scale, s.stage_shift, s.stage_steps()) for s in (first, later)] == [
        (4.5, 2.0, 5),
        (4.5, 2.0, 3),
    ]
    with pytest.raises(HiresError, match="setting num_inference_steps"):
        Resolved.of(guidance_scale=1.0)


def load_config_only(name):
    """The backbone of a full-size architecture without its weights: on the meta device."""
    return load(name, device="meta", dtype="bfloat16", weights="random")


def test_defaults_are_the_papers():
    flux, sdxl, klein = (load_config_only(name) for name in ("flux-dev", "sdxl", "flux2-klein"))
    assert flux.defaults.model_dump(exclude_unset=True) == {
        "num_inference_steps": 30, "guidance_scale": 3.5, "tau": 600, "max_sequence_length": 512,
        "lfm_factor": 1 / 4, "sg_factor": 1 / 4, "gamma": "sigma", "local_radius": 8,
    }  # fmt: skip
    assert sdxl.defaults.model_dump(exclude_unset=True) == {
        "num_inference_steps": 50, "guidance_scale": 7.5, "tau": 400,
        "lfm_factor": 1 / 8, "sg_factor": 1 / 8, "gamma": "one_minus_alpha_bar",
    }  # fmt: skip
    assert (flux.base_resolution, flux.size_multiple, flux.latent_channels) == (1024, 64, 16)
    assert (sdxl.base_resolution, sdxl.size_multiple, sdxl.latent_channels) == (1024, 64, 4)
    assert klein.defaults.model_dump(exclude_unset=True) == {
        "num_inference_steps": 4, "guidance_scale": 1.0, "tau": 500, "max_sequence_length": 512,
        "lfm_factor": 1 / 4, "sg_factor": 1 / 4, "gamma": "sigma",
    }  # fmt: skip
    assert (klein.base_resolution, klein.size_multiple, klein.latent_channels) == (1024, 64, 32)
    # The published sizes of the models: FLUX.2 [klein] 4B has 7.75 GB of weights in bfloat16.
    assert sum(p.numel() for p in flux.model.parameters()) == pytest.approx(11.9e9, rel=1e-3)
    assert sum(p.numel() for p in sdxl.model.parameters()) == 2_567_463_684
    assert 2 * sum(p.numel() for p in klein.model.parameters()) == pytest.approx(7.75e9, rel=1e-3)
    assert sum(p.numel() for p in klein.pipe.vae.parameters()) == 84_046_115


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_are_those_of_alpha_bar(name, prediction):
    schedule = Schedule(scheduler(name), 6, 2, prediction)
    if name == "euler-karras":
        want = np.array(schedule.sigmas) ** 2 / (1 + np.array(schedule.sigmas) ** 2)
    else:
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alpha_bar = np.cumprod(1 - betas)
        ratio = np.interp(schedule.timesteps, np.arange(1000), ((1 - alpha_bar) / alpha_bar) ** 0.5) ** 2
        want = ratio / (1 + ratio)
    np.testing.assert_allclose(schedule.noise_shares, want, rtol=2e-4)
    is_euler = name.startswith("euler")
    for alpha, sigma in zip(schedule.alphas, schedule.sigmas, strict=True):
        assert alpha == 1 if is_euler else alpha**2 + sigma**2 == pytest.approx(1, abs=1e-5)


def flow(steps, first):
    return Schedule(
        diffusers.FlowMatchEulerDiscreteScheduler(), steps, first, "flow", sigmas=np.linspace(1, 1 / steps, steps)
    )


def every_schedule(steps, first):
    yield flow(steps, first)
    for name in SCHEDULERS:
        for prediction in ("epsilon", "v_prediction"):
            yield Schedule(scheduler(name, prediction_type=prediction), steps, first, prediction)


def test_model_output_and_clean_estimate_are_inverse():
    latents, output = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for schedule in every_schedule(6, 0):
        for step in (1, 3, 5):
            back = schedule.from_x0(schedule.to_x0(output, latents, step), latents, step)
            torch.testing.assert_close(back, output, atol=2e-3, rtol=1e-3)


def test_clean_estimate_of_the_true_noise_is_the_truth():
    x0, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for schedule in every_schedule(6, 2):
        noisy = schedule.add_noise(x0, noise)
        alpha, sigma = schedule.alphas[2], schedule.sigmas[2]
        norm = (alpha**2 + sigma**2) ** 0.5
        true = {
            "flow": noise - x0,
            "epsilon": noise,
            "v_prediction": alpha / norm * noise
            - sigma / norm * x0,  # Salimans and Ho 2022, in variance-preserving form
        }[schedule.prediction]
        torch.testing.assert_close(schedule.to_x0(true, noisy, 2), x0, atol=1e-4, rtol=1e-4)


def test_a_stage_that_starts_in_the_middle_ends_at_what_the_model_knows():
    """A model that always answers with the same clean image must arrive there, whatever the scheduler."""
    x0, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for schedule in every_schedule(12, 7):
        latents = schedule.add_noise(x0 + 0.5, noise)
        for step in range(7, 12):
            schedule.scale_model_input(latents, step)
            latents = schedule.step(schedule.from_x0(x0, latents, step), latents, step, generators(0))
        torch.testing.assert_close(latents, x0, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_schedulers_of_several_calls_a_step_are_refused(sdxl, name):
    sdxl.pipe.scheduler = getattr(diffusers, name)(**SDXL_BETAS)
    with pytest.raises(HiresError, match=name):
        base_latents(sdxl, PROMPTS[:1], [0], 128, 128, Sampling(num_inference_steps=4))


@pytest.mark.parametrize(
    "name, options",
    [
        ("EulerDiscreteScheduler", {}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),  # its prediction_type would be epsilon
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}),
    ],
)
@pytest.mark.parametrize("family", ["flux", "klein"])
def test_schedulers_of_noise_prediction_are_refused_by_flow_matching(request, monkeypatch, family, name, options):
    backbone = request.getfixturevalue(family)
    monkeypatch.setattr(backbone.pipe, "scheduler", getattr(diffusers, name)(**options))
    with pytest.raises(HiresError, match=f"{name} doesn't take .* FlowMatchEulerDiscreteScheduler"):
        backbone.schedule(Sampling(num_inference_steps=4).over(backbone.defaults), (16, 16))


def test_flow_matching_takes_the_multistep_solver_that_is_set_up_for_it(flux, monkeypatch):
    base = base_latents(flux, PROMPTS[:1], [0], 128, 128, Sampling(num_inference_steps=20))
    solver = diffusers.UniPCMultistepScheduler.from_config(
        flux.pipe.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    monkeypatch.setattr(flux.pipe, "scheduler", solver)
    other = base_latents(flux, PROMPTS[:1], [0], 128, 128, Sampling(num_inference_steps=20))
    assert 0 < (other - base).norm() < 0.3 * base.norm()


def test_schedulers_of_flow_matching_are_refused_by_sdxl(sdxl):
    sdxl.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(HiresError, match=r"FlowMatchEulerDiscreteScheduler .* use, for example, EulerDiscrete"):
        base_latents(sdxl, PROMPTS[:1], [0], 128, 128, Sampling(num_inference_steps=4))


# --- size conditioning, VAE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_ids, told", [("target", 256), ("base", 128)])
def test_size_that_sdxl_is_told(sdxl, time_ids, told):
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["added_cond_kwargs"]["time_ids"].tolist())

    hook = sdxl.model.register_forward_pre_hook(look, with_kwargs=True)
    hires.generate(sdxl, PROMPTS[0], "npa", height=256, width=256, num_inference_steps=2, tau=500, time_ids=time_ids)
    hook.remove()
    row = [told, told, 0, 0, told, told]
    assert seen == [[[128, 128, 0, 0, 128, 128]] * 2] * 2 + [[row] * 2]


def test_vae_runs_in_float32_under_float16_and_goes_back(sdxl, caplog):
    sdxl.pipe.vae.to(torch.float16).register_to_config(force_upcast=True)
    caplog.clear()
    seen = []
    sdxl.pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    sdxl.pipe.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert sdxl.encode(sdxl.decode(torch.randn(1, 16, 8, 8))).dtype == torch.float32
    assert seen == [torch.float32, torch.float32] and sdxl.pipe.vae.dtype == torch.float16
    assert not caplog.messages  # of diffusers' own casts


def test_vae_tiles_above_four_times_the_base_area_or_as_asked(sdxl):
    calls = []
    sdxl.defaults = Sampling()
    sdxl.pipe.vae.tile_sample_min_size, sdxl.pipe.vae.tile_latent_min_size = 128, 16
    sdxl.pipe.vae.decoder.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape[2:])))

    def tiles(side, tiling=None):
        calls.clear()
        sdxl.decode(torch.zeros(1, 16, side, side), tiling)
        return len(calls)

    assert tiles(32) == 1 and tiles(36) > 1
    assert tiles(32, True) > 1 and tiles(36, False) == 1
    sdxl.defaults = Sampling(vae_tiling=False)
    assert tiles(36) == 1 and tiles(36, True) > 1
    sdxl.defaults = Sampling()
    assert not sdxl.pipe.vae.use_tiling
    sdxl.pipe.vae.enable_tiling()
    assert tiles(32) > 1 and sdxl.pipe.vae.use_tiling


def test_latent_statistics_per_channel(sdxl):
    vae = sdxl.pipe.vae
    mean, std = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    raw = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=0.5)
    latents = sdxl.encode(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(latents, (raw - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1) * 0.5)
    torch.testing.assert_close(sdxl.decode(latents), vae.decode(raw).sample.clamp(-1, 1))


def test_posterior_sample_is_drawn_from_each_images_generator(sdxl):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    both = sdxl.encode(pixels, generators(1, 2), "sample")
    second = sdxl.encode(pixels[1:], generators(2), "sample")
    torch.testing.assert_close(both[1:], second)
    distribution = sdxl.pipe.vae.encode(pixels[1:]).latent_dist
    noise = torch.randn(1, 16, 8, 8, generator=generators(2)[0])
    torch.testing.assert_close(second, distribution.mean + distribution.std * noise)
    assert not torch.allclose(both, sdxl.encode(pixels))


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "mine"
    build_pipeline("tiny-flux").save_pretrained(folder)
    hints = {"base_resolution": 128, "size_multiple": 32, "sampling": {"tau": 340, "max_sequence_length": 40}}
    (folder / "hires.json").write_text(json.dumps(hints))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "mine")


def test_load_a_folder(folder, flux):
    backbone = load(folder, device="cpu")
    assert backbone.family == "flux" and backbone.name == str(folder) and backbone.dtype == torch.float32
    assert (backbone.base_resolution, backbone.size_multiple) == (128, 32)
    assert backbone.defaults.tau == 340 and backbone.defaults.num_inference_steps == 30
    sampling = Sampling(num_inference_steps=2, guidance_scale=2.0)
    ours, same = (base_latents(b, PROMPTS[:1], [0], 96, 96, sampling) for b in (backbone, flux))
    assert torch.equal(ours, same)


def test_load_a_flux2_folder(klein, tmp_path):
    klein.pipe.save_pretrained(tmp_path / "klein")
    (tmp_path / "klein" / "hires.json").write_text(json.dumps(tiny_flux2.HINTS))
    backbone = load(tmp_path / "klein", device="cpu")
    sampling = Sampling(num_inference_steps=2, guidance_scale=2.0)
    ours, same = (base_latents(b, PROMPTS[:1], [0], 96, 96, sampling) for b in (backbone, klein))
    assert backbone.family == "flux2" and torch.equal(ours, same)
    with pytest.raises(HiresError, match="means nothing"):  # the option beside the parts, also without their weights
        load(CONFIGS / "flux2-klein", "meta", weights="random").check_settings(Sampling(guidance_scale=2.0))


@torch.no_grad()
def test_a_step_of_the_full_size_flux2(klein):
    """FLUX.2 [klein] at 2048², without weights: every shape of NPA in its 25 blocks fits."""
    backbone = load_config_only("flux2-klein")
    sampling = backbone.defaults
    conditioning = {name: x.to("meta") for name, x in backbone.encode_prompt(PROMPTS[:1], sampling).items()}
    schedule = klein.schedule(sampling, (128, 128), 2)
    schedule.timesteps = schedule.timesteps.to("meta")
    latents = torch.empty(1, 32, 256, 256, device="meta")
    with use_attention(backbone.model, "npa", (256, 256), (128, 128)) as attention:
        output = backbone.predict(latents, schedule, 2, conditioning, sampling, (2048, 2048))
    assert output.shape == latents.shape and output.dtype == torch.float32
    assert len(attention.layers) == 25 and {(x.grid, x.window) for x in attention.layers} == {((128, 128), (64, 64))}


def test_revision_is_of_the_weights(folder):
    first = load(folder, device="cpu").revision
    assert len(first) == 64 and load(folder, device="cpu").revision == first
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert load(folder, device="cpu").revision != first


def test_random_weights_are_the_same_every_time(folder):
    for name in ("tiny-sdxl", str(folder)):
        one, two = (load(name, device="cpu", weights="random") for _ in range(2))
        assert one.revision == "random"
        for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_random_weights_without_text_encoders(folder):
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        index[part] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    backbone = load(folder, device="cpu", weights="random")
    sampling = Sampling(max_sequence_length=8).over(backbone.defaults)
    one = backbone.encode_prompt(["a", "b"], sampling)
    assert {name: tuple(t.shape) for name, t in one.items()} == {
        "prompt_embeds": (2, 8, 128),
        "pooled_prompt_embeds": (2, 128),
    }
    assert torch.equal(one["pooled_prompt_embeds"][1:], backbone.encode_prompt(["b"], sampling)["pooled_prompt_embeds"])
    assert not torch.equal(one["pooled_prompt_embeds"][0], one["pooled_prompt_embeds"][1])


def refusal(*args, **options):
    with pytest.raises(HiresError) as error:
        load(*args, device="cpu", **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_load_refuses(folder, tmp_path):
    assert "did you mean 'tiny-flux'" in refusal("tiny-flix")
    assert "bfloat16" in refusal(folder, dtype="bf16")
    assert "did you mean 'random'" in refusal("tiny-flux", weights="randon")
    assert "no model_index.json" in refusal(tmp_path)
    assert "does not exist" in refusal("./nowhere/at/all")
    assert "flux-dev" in refusal("flux-schnell", weights="random")


def test_load_refuses_broken_weights(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    for cut in (0, 5, 100, len(data) - 1):
        file.write_bytes(data[:cut])
        assert "cut short" in refusal(folder)
    file.rename(file.with_suffix(".bin"))
    assert "no *.safetensors" in refusal(folder)
    index = file.with_suffix(".safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"x": "part-1.safetensors"}}))
    assert "part-1.safetensors is missing" in refusal(folder)
    shutil.rmtree(folder / "vae")
    index.unlink()
    file.with_suffix(".bin").rename(file)
    file.write_bytes(data)
    assert "'vae' is missing" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json",
     "tokenizer_2/tokenizer.json", "transformer/config.json"],
)  # fmt: skip
def test_load_refuses_broken_configurations(folder, name):
    file = folder / name
    file.write_text(file.read_text()[:-10])
    assert f"{file} is not JSON" in refusal(folder)
    file.unlink()
    assert f"{file.parent} has no " in refusal(folder) and file.name in refusal(folder)


def test_load_refuses_parts_of_another_model(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 2}))
    assert "diffusers cannot load it" in refusal(folder)


def test_load_refuses_a_device_that_is_not_there(folder):
    for device in ("gpu", "cuda:99"):
        with pytest.raises(HiresError, match=f"device '{device}' can't be used here") as error:
            load(folder, device=device)
        assert "\n" not in str(error.value)


def test_load_refuses_another_pipeline(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    assert "StableDiffusionPipeline: allowed: FluxPipeline, Flux2KleinPipeline, StableDiffusionXLPipeline" in refusal(
        folder
    )


def test_from_pipeline_keeps_the_users_object(sdxl_pipe):
    class Mine(StableDiffusionXLPipeline):
        pass

    mine = Mine(**sdxl_pipe.components)
    backbone = Backbone.from_pipeline(mine)
    assert backbone.pipe is mine and backbone.family == "sdxl" and backbone.revision is None
    assert backbone.base_resolution == 128 and backbone.size_multiple == 64
    with pytest.raises(
        HiresError, match=r"AutoencoderKL is not supported: .*FluxPipeline, .*Flux2KleinPipeline, .*XLPipeline"
    ):
        Backbone.from_pipeline(mine.vae)


def test_bad_hints_are_told_with_their_name(sdxl_pipe):
    with pytest.raises(HiresError, match="did you mean 'tau'"):
        Backbone.from_pipeline(sdxl_pipe, "x", {"sampling": {"tua": 3}})


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_images_that_share_a_call_of_the_vae(monkeypatch, posterior):
    """As on a GPU, three images in calls of two: what each gives alone."""
    backbone = hires.load("tiny-sdxl", device="cpu", weights="random")
    pixels = torch.rand((3, 3, 64, 96), generator=torch.Generator().manual_seed(0)) * 2 - 1

    def both():
        latents = backbone.encode(pixels, [torch.Generator().manual_seed(seed) for seed in range(3)], posterior)
        return latents, backbone.decode(latents)

    alone = both()
    monkeypatch.setattr(type(backbone), "_at_once", lambda self, count: 2 if count == 64 * 96 else 1)
    for together, expected in zip(both(), alone):
        torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)
