"""The cascade: stages, batches, guidance, views, img2img, on tiny pipelines of the real classes."""

import numpy as np
import pytest
import tiny_flux2
import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from hires.backbones import Backbone
from hires.cascade import base_latents, cascade, decode, seed_stage, to_images, to_pixels
from hires.errors import HiresError
from hires.execution.meter import Meter
from hires.layout import BASE_SETTINGS
from hires.methods import resize, sharpen
from hires.methods.diffusehigh import approximation
from hires.models import HINTS, build_pipeline
from hires.settings import Sampling
from hires.variants import VARIANTS, Variant

PROMPTS = ["three red cubes", "a blue ball on a green plane", "a cone"]
FAST = Sampling(num_inference_steps=3, guidance_scale=2.0, tau=600, vae_tiling=False)


def build(name):
    if name == "tiny-flux2":
        return Backbone.from_pipeline(tiny_flux2.build_pipeline(), name, tiny_flux2.HINTS)
    return Backbone.from_pipeline(build_pipeline(name), name, HINTS[name])


@pytest.fixture(scope="module", params=["tiny-flux", "tiny-sdxl", "tiny-flux2"])
def backbone(request):
    return build(request.param)


@pytest.fixture(scope="module", params=["tiny-flux", "tiny-flux2"])
def joint(request):
    return build(request.param)


@pytest.fixture(scope="module")
def flux():
    return Backbone.from_pipeline(build_pipeline("tiny-flux"), "tiny-flux", HINTS["tiny-flux"])


def last(*args, **options):
    *_, stage = cascade(*args, **options)
    return stage


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def counting(backbone):
    """Rows of every model call, while the list is alive."""
    rows = []
    name = None if backbone.family == "sdxl" else "hidden_states"
    hook = backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs[name] if name else args[0])), with_kwargs=True
    )
    return rows, hook


# --- stages ---------------------------------------------------------------------------------------------------------


def test_stages_of_a_target(backbone):
    stages = list(cascade(backbone, PROMPTS[:1], [0], VARIANTS["scalediff"], 384, 288, FAST))
    assert [(s.name, s.height, s.width, s.steps) for s in stages] == [
        ("base", 128, 96, 3), ("stage-1", 256, 192, 2), ("stage-2", 384, 288, 2),
    ]  # fmt: skip
    for stage in stages:
        assert stage.latents.shape == (1, 16, stage.height // 8, stage.width // 8)
        assert stage.latents.dtype == torch.float32 and stage.latents.isfinite().all()
        assert stage.seconds > 0 and stage.peak_bytes > 2**24 and stage.pixels is None
    assert decode(backbone, stages[-1])[0].size == (288, 384)


def test_the_peak_is_that_of_the_block_alone():
    with Meter(torch.device("cpu")) as large:
        torch.ones(100_000_000)
    with Meter(torch.device("cpu")) as small:
        torch.ones(25_000_000)
    assert 250e6 < large.peak_bytes - small.peak_bytes < 350e6 and small.peak_bytes > 100e6


# One other value for every setting, each of which would show in the base image if it reached it.
OTHERS = {
    "num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "blurry", "true_cfg_scale": 2.0,
    "prompt_suffix": " red", "max_sequence_length": 8, "tau": 300, "low_pass": "fft", "lfm_factor": 0.5,
    "sg_factor": 0.5, "upsampling": "bilinear", "reference": "latent", "posterior": "sample", "gamma": "t_raw",
    "gamma_scale": 2.0, "dwt_steps": 1, "text_rows": "global", "window_scale": 0.5, "window_overlap": 0.25,
    "random_shift": True, "local_radius": 2, "local_window": 2, "token_order": "raster", "lr_ratio": 2.0,
    "lr_keys": False, "lr_neighbours": "all", "lr_anchors": False, "lr_adapter": False, "stage_guidance_scale": 3.0,
    "stage_shift": 2.0, "view_overlap": 0.25, "view_batch": 1, "vae_tiling": True, "linears": "fp8", "step_cache": 2,
    "attention_backend": "reference",
}  # fmt: skip


def test_base_latents_depend_on_the_base_settings_alone(flux):
    """They are stored under a key of these, and shared by all settings that agree in them."""

    def latents(**settings):
        return base_latents(flux, PROMPTS[:1], [0], 256, 256, Sampling(**{**given, **settings}))

    given = {"num_inference_steps": 5, "guidance_scale": 2.0, "true_cfg_scale": 1.5, "negative_prompt": "grey"}
    want = latents()
    assert {*OTHERS, *flux.unused_settings} == {*Sampling.model_fields}
    assert torch.equal(latents(**{name: value for name, value in OTHERS.items() if name not in BASE_SETTINGS}), want)
    for name in BASE_SETTINGS:
        assert not torch.equal(latents(**{name: OTHERS[name]}), want), name


def test_single_jump_and_target_at_the_base(backbone):
    jump = Variant(attention="npa", stages="single")
    stages = list(cascade(backbone, PROMPTS[:1], [0], jump, 384, 384, FAST))
    assert [(s.name, s.height) for s in stages] == [("base", 128), ("stage-1", 384)]
    stages = list(cascade(backbone, PROMPTS[:1], [0], VARIANTS["scalediff"], 128, 128, FAST))
    assert [(s.name, s.height) for s in stages] == [("base", 128)]


@pytest.mark.parametrize("variant", ["scalediff", "multidiffusion+lfm+sg", "npa-direct"])
def test_an_image_does_not_depend_on_its_batch(backbone, variant):
    sampling = Sampling(posterior="sample", random_shift=variant != "npa-direct", view_batch=3).over(FAST)
    seeds = [5, 6, 7]
    together = last(backbone, PROMPTS, seeds, VARIANTS[variant], 192, 192, sampling).latents
    for index in (2, 0):
        alone = last(
            backbone, PROMPTS[index : index + 1], seeds[index : index + 1], VARIANTS[variant], 192, 192, sampling
        )
        close(alone.latents[0], together[index])
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_stored_base_latents_give_the_same_image(backbone):
    base = base_latents(backbone, PROMPTS[:2], [1, 2], 192, 192, FAST)
    want = list(cascade(backbone, PROMPTS[:2], [1, 2], VARIANTS["scalediff"], 192, 192, FAST))
    got = list(cascade(backbone, PROMPTS[:2], [1, 2], VARIANTS["scalediff"], 192, 192, FAST, base=base))
    assert torch.equal(want[0].latents, base) and torch.equal(got[0].latents, base)
    assert torch.equal(want[1].latents, got[1].latents)
    assert [s.steps for s in got] == [0, 2]


def test_stages_draw_their_own_numbers():
    generators = [torch.Generator(), torch.Generator()]
    draws = []
    for stage in (0, 1, 2):
        seed_stage(generators, [3, 4], stage)
        draws += [torch.randn(4, generator=g) for g in generators]
    assert torch.equal(draws[0], torch.randn(4, generator=torch.Generator().manual_seed(3)))
    assert len({tuple(d.tolist()) for d in draws}) == 6


def test_dense_stage_of_flux_is_the_papers_formulas(flux):
    """Written out again, step by step, with nothing of the library but its filter-free parts: ScaleDiff's stage."""
    sampling = Sampling(low_pass="bilinear", lfm_factor=1 / 4, sg_factor=1 / 2, gamma="sigma", gamma_scale=0.7).over(
        FAST
    )
    base, stage = cascade(flux, PROMPTS[:1], [9], VARIANTS["dense+lfm+sg"], 256, 256, sampling)
    pipe, vae = flux.pipe, flux.pipe.vae

    def lp(x, f):
        small = F.interpolate(x, scale_factor=f, mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)

    with torch.no_grad():
        z_lu = F.interpolate(base.latents, scale_factor=2, mode="bicubic", align_corners=False)
        pixels = vae.decode(base.latents).sample.clamp(-1, 1)
        z_ru = vae.encode(F.interpolate(pixels, scale_factor=2, mode="bicubic", align_corners=False)).latent_dist.mode()
        z_ref = z_ru + lp(z_lu, 1 / 4) - lp(z_ru, 1 / 4)
        embeds, pooled, text_ids = pipe.encode_prompt(PROMPTS[:1], max_sequence_length=40)
        ids = pipe._prepare_latent_image_ids(1, 16, 16, "cpu", torch.float32)
        shift = np.exp(1.15)  # of tiny-flux's scheduler, at every size
        times = np.append(np.linspace(1, 1 / 3, 3), 0)
        sigmas = shift * times / (1 + (shift - 1) * times)
        generator = torch.Generator()
        seed_stage([generator], [9], 1)
        x = sigmas[1] * torch.randn(z_ref.shape, generator=generator) + (1 - sigmas[1]) * z_ref
        for i in (1, 2):
            tokens = pipe.transformer(
                hidden_states=pipe._pack_latents(x, 1, 16, 32, 32), timestep=torch.tensor([float(sigmas[i])]),
                guidance=torch.tensor([2.0]), pooled_projections=pooled, encoder_hidden_states=embeds,
                txt_ids=text_ids, img_ids=ids,
            ).sample  # fmt: skip
            velocity = pipe._unpack_latents(tokens, 256, 256, 8)
            x0 = x - sigmas[i] * velocity
            x0 = x0 + 0.7 * sigmas[i] * (lp(z_ref, 1 / 2) - lp(x0, 1 / 2))
            x = x + (sigmas[i + 1] - sigmas[i]) * (x - x0) / sigmas[i]
    close(stage.latents, x.float())


def test_sg_of_full_strength_ends_on_the_reference(joint):
    """γ = 1 over all frequencies leaves nothing but Z_ref, whatever the model says."""
    sampling = Sampling(sg_factor=1.0, gamma="normalised", num_inference_steps=1, tau=1000).over(FAST)
    base, stage = cascade(
        joint, PROMPTS[:1], [0], Variant(sg=True), 256, 256, Sampling(reference="latent").over(sampling)
    )
    close(stage.latents, F.interpolate(base.latents, scale_factor=2, mode="bicubic", align_corners=False))


def test_diffusehigh_is_its_definition(backbone):
    """A stage step by step: decode, the enlarged image's wavelet approximation, encode, for the first step of two."""
    sampling = Sampling(dwt_steps=1).over(FAST)
    base, stage = cascade(backbone, PROMPTS[:1], [9], VARIANTS["diffusehigh"], 256, 256, sampling)
    sampling = sampling.over(backbone.defaults)
    image = sharpen(resize(backbone.decode(base.latents), (256, 256), "bicubic"), 1.0)
    schedule = backbone.schedule(sampling, (16, 16), 1)
    generator = torch.Generator()
    seed_stage([generator], [9], 1)
    x = schedule.add_noise(backbone.encode(image), backbone.noise([generator], (32, 32)))
    with torch.no_grad():
        text = backbone.encode_prompt(PROMPTS[:1], sampling)
        for step in (1, 2):
            output = backbone.predict(x, schedule, step, text, sampling, (256, 256))
            if step == 1:
                pixels = backbone.decode(schedule.to_x0(output, x, step))
                guided = pixels + approximation(image) - approximation(pixels)
                output = schedule.from_x0(backbone.encode(guided), x, step)
            x = schedule.step(output, x, step, [generator])
    close(stage.latents, x, 1e-3)
    plain = last(backbone, PROMPTS[:1], [9], Variant(), 256, 256, sampling, base=base.latents).latents
    unguided = Variant(dwt=True)
    none = Sampling(dwt_steps=0).over(sampling)
    assert torch.equal(last(backbone, PROMPTS[:1], [9], unguided, 256, 256, none, base=base.latents).latents, plain)
    assert (stage.latents - plain).abs().mean() > 1e-2


@pytest.mark.parametrize(
    "setting",
    [
        {"lfm": True},
        {"sg": True},
        {"attention": "npa"},
        {"views": "multidiffusion"},
        {"dwt": True},
        {"sharpening": 1.0},
    ],
)
def test_every_part_of_a_variant_acts(flux, setting):
    base = base_latents(flux, PROMPTS[:1], [0], 192, 192, FAST)
    plain = last(flux, PROMPTS[:1], [0], Variant(), 192, 192, FAST, base=base).latents
    other = last(flux, PROMPTS[:1], [0], Variant(**setting), 192, 192, FAST, base=base).latents
    assert (plain - other).abs().mean() > 1e-3


def test_a_variant_without_denoising_enlarges_to_the_target_at_once(flux):
    base = torch.zeros(1, 16, 16, 16)
    stages = list(cascade(flux, PROMPTS[:1], [0], Variant(denoise=False), 512, 512, FAST, base=base))
    assert [(stage.name, stage.height) for stage in stages] == [("base", 128), ("upsample", 512)]


def test_upsample_is_the_bicubic_enlargement_of_the_decoded_base(backbone):
    base, stage = cascade(backbone, PROMPTS[:1], [0], VARIANTS["upsample"], 384, 384, FAST)
    with torch.no_grad():
        pixels = backbone.pipe.vae.decode(backbone._denormalise(base.latents)).sample.clamp(-1, 1)
    want = F.interpolate(pixels, scale_factor=3, mode="bicubic", align_corners=False)
    assert stage.latents is None and (stage.name, stage.steps) == ("upsample", 0)
    assert torch.equal(stage.pixels, want)
    assert np.array_equal(np.array(decode(backbone, stage)[0]), np.array(to_images(want)[0]))


# --- attention and views --------------------------------------------------------------------------------------------


def test_processors_are_the_users_again(backbone):
    before = dict(backbone.model.attn_processors)
    last(backbone, PROMPTS[:1], [0], VARIANTS["npa"], 192, 192, FAST)
    assert all(backbone.model.attn_processors[name] is processor for name, processor in before.items())

    def stop(name, step, steps, latents):
        if name == "stage-1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        last(backbone, PROMPTS[:1], [0], VARIANTS["npa"], 192, 192, FAST, callback=stop)
    assert all(backbone.model.attn_processors[name] is processor for name, processor in before.items())


def test_npa_at_the_base_size_is_dense(backbone):
    direct, npa = (
        last(backbone, PROMPTS[:1], [0], VARIANTS[name], 128, 128, FAST).latents for name in ("direct", "npa-direct")
    )
    close(direct, npa)


def test_multidiffusion_sees_every_view_at_every_step(backbone):
    base = base_latents(backbone, PROMPTS[:2], [0, 1], 384, 288, FAST)
    rows, hook = counting(backbone)
    variant = Variant(views="multidiffusion", stages="single")
    last(backbone, PROMPTS[:2], [0, 1], variant, 384, 288, Sampling(view_batch=7).over(FAST), base=base)
    hook.remove()
    guidance = 1 if backbone.family == "flux" else 2
    assert sum(rows) == 2 * (2 * 3 - 1) ** 2 * guidance * 2  # images, views at s = 3, CFG, steps
    assert max(rows) == 7 * (2 if backbone.family == "sdxl" else 1)  # FLUX.2's CFG is two calls


def test_multidiffusion_step_is_the_mean_of_single_views(backbone):
    """One step of one image, view by view through the backbone alone."""
    sampling = Sampling(num_inference_steps=2, tau=500, reference="latent").over(FAST).over(backbone.defaults)
    base = base_latents(backbone, PROMPTS[:1], [0], 192, 320, sampling)  # 96x160, s = 2
    got = last(backbone, PROMPTS[:1], [0], Variant(views="multidiffusion"), 192, 320, sampling, base=base).latents
    schedule = backbone.schedule(sampling, (12, 20), 1)
    generator = torch.Generator()
    seed_stage([generator], [0], 1)
    reference = F.interpolate(base, scale_factor=2, mode="bicubic", align_corners=False)
    latents = schedule.add_noise(reference, backbone.noise([generator], (24, 40)))
    total, count = torch.zeros_like(latents), torch.zeros_like(latents)
    with torch.no_grad():
        conditioning = backbone.encode_prompt(PROMPTS[:1], sampling)
        for i in (0, 6, 12):
            for j in (0, 10, 20):
                view = (..., slice(i, i + 12), slice(j, j + 20))
                total[view] += backbone.predict(latents[view], schedule, 1, conditioning, sampling, (192, 320))
                count[view] += 1
        close(got, schedule.step(total / count, latents, 1, [generator]))


@pytest.mark.parametrize(
    "setting",
    [
        {"low_pass": "bicubic"}, {"low_pass": "nearest"}, {"low_pass": "lanczos"}, {"low_pass": "fft"},
        {"low_pass": "wavelet"}, {"lfm_factor": 0.5}, {"sg_factor": 0.5}, {"gamma": "normalised"}, {"gamma": "t_raw"},
        {"gamma_scale": 0.5}, {"upsampling": "lanczos"}, {"posterior": "sample"}, {"random_shift": True}, {"tau": 400},
        {"guidance_scale": 3.0}, {"prompt_suffix": " on sand"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_acts(backbone, setting):
    base = base_latents(backbone, PROMPTS[:1], [0], 192, 192, FAST)
    plain, one, two = (
        last(backbone, PROMPTS[:1], [0], VARIANTS["scalediff"], 192, 192, sampling, base=base).latents
        for sampling in (FAST, *2 * [Sampling.of(**setting).over(FAST)])
    )
    assert one.isfinite().all() and torch.equal(one, two) and (plain - one).abs().mean() > 1e-5


def test_text_rows_act_on_joint_attention(joint):
    base = base_latents(joint, PROMPTS[:1], [0], 192, 192, FAST)
    patch, everything = (
        last(joint, PROMPTS[:1], [0], VARIANTS["npa"], 192, 192, Sampling(text_rows=rows).over(FAST), base=base).latents
        for rows in ("patch", "global")
    )
    assert (patch - everything).abs().mean() > 1e-5


def test_random_shift_changes_the_image_and_repeats(backbone):
    shifted = Sampling(random_shift=True).over(FAST)
    base = base_latents(backbone, PROMPTS[:1], [0], 192, 192, FAST)
    plain, one, two = (
        last(backbone, PROMPTS[:1], [0], VARIANTS["npa"], 192, 192, sampling, base=base).latents
        for sampling in (FAST, shifted, shifted)
    )
    assert torch.equal(one, two) and (plain - one).abs().mean() > 1e-4


# --- from noise -----------------------------------------------------------------------------------------------------


def test_direct_is_the_stock_pipeline_at_the_target_size(backbone, monkeypatch):
    if backbone.family == "flux2":  # a shift that doesn't follow the token count, as tiny-flux has it
        monkeypatch.setattr(backbone.pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    if backbone.family == "sdxl":  # where hires takes Euler's step as diffusers does
        monkeypatch.setattr(backbone.pipe, "scheduler", EulerDiscreteScheduler(prediction_type="v_prediction"))
    options = {} if backbone.family == "sdxl" else {"max_sequence_length": backbone.defaults.max_sequence_length}
    images = backbone.pipe(
        prompt=PROMPTS[0], height=160, width=224, num_inference_steps=2, guidance_scale=2.0, output_type="latent",
        generator=torch.Generator().manual_seed(4), **options,
    ).images  # fmt: skip
    if backbone.family == "flux":
        images = backbone.pipe._unpack_latents(images, 160, 224, 8)
    stage = last(backbone, PROMPTS[:1], [4], VARIANTS["direct"], 160, 224, Sampling(num_inference_steps=2).over(FAST))
    latents = backbone._denormalise(stage.latents) if backbone.family == "flux2" else stage.latents
    assert (stage.name, stage.steps) == ("noise", 2) and torch.equal(latents, images)


@pytest.mark.parametrize("variant", ["npa-direct", "multidiffusion-direct"])
def test_panorama(backbone, variant):
    stage = last(backbone, PROMPTS[:1], [0], VARIANTS[variant], 128, 416, FAST)
    assert stage.latents.shape == (1, 16, 16, 52) and stage.latents.isfinite().all()
    with pytest.raises(HiresError, match="larger"):
        last(backbone, PROMPTS[:1], [0], VARIANTS[variant], 96, 416, FAST)


# --- img2img --------------------------------------------------------------------------------------------------------


def picture(width=128, height=128):
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows % 256, columns % 256, (rows + columns) % 256], -1).astype(np.uint8))


def test_own_image_takes_the_place_of_the_base(joint):
    image = to_pixels(picture(), (128, 128))
    base, one, two = cascade(joint, PROMPTS[:1], [0], VARIANTS["npa"], 512, 512, FAST, image=image, strength=0.3)
    assert [s.steps for s in (base, one, two)] == [0, 1, 2]  # strength in the first stage only, then τ
    assert np.array_equal(np.array(decode(joint, base)[0]), np.array(picture()))
    with torch.no_grad():
        enlarged = F.interpolate(image, scale_factor=2, mode="bicubic", align_corners=False)
        reference = joint._normalise(joint.pipe.vae.encode(enlarged).latent_dist.mode())
    weak, strong = (next_stage(joint, image, strength).latents for strength in (0.3, 1.0))
    assert (weak - reference).abs().mean() < (strong - reference).abs().mean()


def next_stage(backbone, image, strength):
    return last(backbone, PROMPTS[:1], [0], VARIANTS["npa"], 256, 256, FAST, image=image, strength=strength)


def test_pixels_go_to_images_and_back():
    image = picture(160, 96)
    pixels = to_pixels(image, (96, 160))
    assert pixels.shape == (1, 3, 96, 160) and pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(np.array(to_images(pixels)[0]), np.array(image))
    assert to_pixels(image, (48, 80)).shape == (1, 3, 48, 80)
    levels = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert np.array(to_images(levels)[0])[0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]


# --- callback and refusals ------------------------------------------------------------------------------------------


def test_callback_follows_every_step(flux):
    seen = []

    def callback(name, step, steps, latents):
        seen.append((name, step, steps, tuple(latents.shape)))

    last(flux, PROMPTS[:1], [0], VARIANTS["npa"], 256, 256, FAST, callback=callback)
    small, large = (1, 16, 16, 16), (1, 16, 32, 32)
    assert seen == [
        ("base", 1, 3, small), ("base", 2, 3, small), ("base", 3, 3, small), ("stage-1", 1, 2, large),
        ("stage-1", 2, 2, large),
    ]  # fmt: skip


def test_a_window_of_one_token_is_refused_at_once():
    """A base of 32x512 leaves a single row on the U-Net's lowest level."""
    sdxl = Backbone.from_pipeline(build_pipeline("tiny-sdxl"), "tiny-sdxl", HINTS["tiny-sdxl"])
    with pytest.raises(HiresError, match="at least 2 tokens"):
        next(cascade(sdxl, PROMPTS[:1], [0], VARIANTS["scalediff"], 64, 1024, FAST))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seeds": [0, 1]}, "1 prompts and 2 seeds"),
        ({"seeds": [-1]}, "seed -1"),
        ({"height": 500}, "nearest allowed sizes"),
        ({"variant": Variant(start="noise", sg=True)}, "no base image"),
        ({"variant": Variant(start="noise", sharpening=1.0)}, "lfm, sharpening, sg, dwt must be off"),
        ({"variant": Variant(sharpening=1.0), "sampling": Sampling(reference="latent").over(FAST)}, "be sharpened"),
        ({"variant": Variant(start="noise"), "height": 100}, "multiples of 32"),
        ({"variant": Variant(start="noise"), "strength": 0.5}, "no strength"),
        ({"variant": Variant(start="noise"), "image": torch.zeros(1, 3, 128, 128)}, "takes no image"),
        ({"variant": Variant(start="noise"), "base": torch.zeros(1, 16, 16, 16)}, "no base latents"),
        ({"variant": Variant(views="multidiffusion", attention="npa")}, "allowed: dense"),
        ({"variant": Variant(adapter="detail")}, "only attention 'scale_dit' uses one"),
        ({"sampling": Sampling(tau=10).over(FAST)}, "tau = 10 of 3 steps"),
        ({"sampling": Sampling(attention_backend="spda").over(FAST)}, "did you mean 'sdpa'"),
        ({"sampling": Sampling(sg_factor=0.01).over(FAST)}, "low-pass factor 0.01"),
        ({"variant": Variant(attention="scale_dit", start="noise")}, "start from the base"),
        ({"variant": Variant(attention="scale_dit"), "sampling": Sampling(lr_ratio=3).over(FAST)}, "10.6667x10.6667"),
        ({"base": torch.zeros(1, 16, 8, 8)}, r"latents of shape \(1, 16, 8, 8\): this target needs \(1, 16, 16, 16\)"),
        ({"image": torch.zeros(1, 3, 64, 64)}, r"needs \(1, 3, 128, 128\)"),
        ({"sampling": Sampling(negative_prompt="blurry").over(FAST)}, "negative_prompt = .blurry. .* true_cfg_scale"),
        ({"strength": 0.5}, "give an image"),
        ({"strength": 1.5, "image": torch.zeros(1, 3, 128, 128)}, "strength 1.5"),
        ({"strength": 0.1, "image": torch.zeros(1, 3, 128, 128)}, "leaves no step"),
    ],
)  # fmt: skip
def test_refusals_come_before_any_model_call(flux, change, message):
    rows, hook = counting(flux)
    given = {"prompts": PROMPTS[:1], "seeds": [0], "variant": VARIANTS["scalediff"], "height": 256, "width": 256,
             "sampling": FAST}  # fmt: skip
    with pytest.raises(HiresError, match=message) as error:
        next(cascade(flux, **{**given, **change}))
    hook.remove()
    assert not rows and "\n" not in str(error.value)
