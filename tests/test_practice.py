"""A user's own pipeline: LoRAs, ControlNets, IP-Adapters, true guidance, several images; against the stock pipelines.

Each extra is shown three ways: at the base size the image is the stock pipeline's, above it the extra acts, and a
neutral extra changes nothing.
"""

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import (
    FluxImg2ImgPipeline,
    FluxMultiControlNetModel,
    FluxPipeline,
    MultiControlNetModel,
    StableDiffusionXLImg2ImgPipeline,
)
from extended import FAMILIES, build_pipeline, controlnet, picture, with_controlnet, with_ip_adapter, wrapped
from peft import LoraConfig
from PIL import Image

import hires
from hires.additions.extras import Extras
from hires.backbones.flux import unpack
from hires.cascade import cascade, small_images
from hires.errors import HiresError
from hires.execution.offload import KINDS, offload_parts
from hires.settings import Sampling
from hires.variants import VARIANTS, Variant

PROMPTS = ["three red cubes", "a blue ball"]
FAST = Sampling(num_inference_steps=3, guidance_scale=2.0, tau=600, vae_tiling=False)


def stock(pipe, family, size=(128, 128), prompts=PROMPTS[0], seed=4, **options):
    """Latents (n, C, h, w) of the pipeline's own call."""
    if family == "tiny-flux":
        options = {"max_sequence_length": 40, **options}
    seeds = [seed] if isinstance(prompts, str) else range(seed, seed + len(prompts))
    images = pipe(
        prompts, height=size[0], width=size[1], num_inference_steps=3, guidance_scale=2.0, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], **options,
    ).images  # fmt: skip
    return unpack(images, (size[0] // 8, size[1] // 8)) if family == "tiny-flux" else images


def ours(backbone, variant="direct", size=(128, 128), sampling=FAST, **options):
    chosen = VARIANTS[variant] if isinstance(variant, str) else variant
    *_, stage = cascade(backbone, PROMPTS[:1], [4], chosen, *size, sampling, **options)
    return stage.latents


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- ControlNet -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [(0.0, 1.0), (0.3, 0.7)])
def test_controlnet_at_the_base_is_the_stock_pipelines(family, share):
    """FLUX: its pipeline draws the posterior of the control image before the noise."""
    pipe = with_controlnet(family, lambda pipe: controlnet(family, pipe))
    settings = {
        "controlnet_conditioning_scale": 0.7, "control_guidance_start": share[0], "control_guidance_end": share[1],
    }  # fmt: skip
    image = picture(100, 130)
    given = {"control_image" if family == "tiny-flux" else "image": image.resize((160, 96))}
    expected = stock(pipe, family, (96, 160), **given, **settings)
    extras = Extras(control_image=image.resize((160, 96)), **settings)
    sampling = Sampling(posterior="sample").over(FAST)
    close(ours(wrapped(pipe, family), size=(96, 160), sampling=sampling, extras=extras), expected)
    off = Extras(control_image=image.resize((160, 96)), controlnet_conditioning_scale=0.0)
    assert not torch.allclose(ours(wrapped(pipe, family), size=(96, 160), sampling=sampling, extras=off), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["scalediff", "multidiffusion+lfm+sg"])
def test_controlnet_acts_at_every_stage_and_off_is_without(family, variant):
    plain = build_pipeline(family)
    pipe = with_controlnet(family, lambda pipe: controlnet(family, pipe))
    size, image = (192, 256), picture(192, 256)
    without = ours(wrapped(plain, family), variant, size)
    off = ours(wrapped(pipe, family), variant, size, extras=Extras(image, controlnet_conditioning_scale=0.0))
    on = ours(wrapped(pipe, family), variant, size, extras=Extras(image))
    close(off, without)
    assert (on - without).abs().mean() > 1e-3
    assert dict(pipe.controlnet.attn_processors) and all("Npa" not in type(p).__name__
                                                         for p in pipe.controlnet.attn_processors.values())  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_control_images_are_resized_for_every_stage(family):
    pipe = with_controlnet(family, lambda pipe: controlnet(family, pipe))
    backbone = wrapped(pipe, family)
    image = picture(300, 400)
    generators = [torch.Generator()]
    for size in ((96, 128), (192, 256)):
        (chart,) = backbone.control(Extras(image), size, generators, FAST).maps
        pixels = torch.from_numpy(np.array(image.resize((size[1], size[0]), Image.Resampling.LANCZOS))) / 255
        pixels = pixels.permute(2, 0, 1)[None]
        if family == "tiny-flux":
            with torch.no_grad():
                pixels = pipe.vae.encode(2 * pixels - 1).latent_dist.mode()
        close(chart, pixels)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_sees_its_part_of_the_control_image(family):
    """One MultiDiffusion step, view by view through the model alone."""
    pipe = with_controlnet(family, lambda pipe: controlnet(family, pipe))
    backbone = wrapped(pipe, family)
    sampling = Sampling(num_inference_steps=1, tau=1000, view_batch=3).over(FAST).over(backbone.defaults)
    extras = Extras(picture(160, 256))
    got = ours(backbone, "multidiffusion-direct", (160, 256), sampling, extras=extras)
    schedule = backbone.schedule(sampling, (16, 16))
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 16, 20, 32, generator=generator) * schedule.init_noise_sigma
    control = backbone.control(extras, (160, 256), [generator], sampling)
    total, count = torch.zeros_like(latents), torch.zeros_like(latents)
    with torch.no_grad():
        conditioning = backbone.conditioning(PROMPTS[:1], sampling)
        k = control.maps[0].shape[2] // 20
        for i in (0, 4):
            for j in (0, 8, 16):
                view = (..., slice(i, i + 16), slice(j, j + 16))
                part = [control.maps[0][..., k * i : k * (i + 16), k * j : k * (j + 16)]]
                seen = type(control)(part, extras)
                total[view] += backbone.predict(
                    latents[view], schedule, 0, conditioning, sampling, (160, 256), seen
                )  # fmt: skip
                count[view] += 1
        close(got, schedule.step(total / count, latents, 0, [generator]), 1e-3)


def test_a_controlnet_with_an_input_block_reads_pixels():
    """XLabs' form: no VAE, and its few blocks repeat over the transformer's."""
    net = {"conditioning_embedding_channels": 16, "patch_size": 2}
    pipe = with_controlnet("tiny-flux", lambda pipe: controlnet("tiny-flux", pipe, **net))
    image = picture()
    expected = stock(pipe, "tiny-flux", control_image=image)
    close(ours(wrapped(pipe, "tiny-flux"), extras=Extras(image)), expected)
    assert ours(wrapped(pipe, "tiny-flux"), "npa", (256, 256), extras=Extras(image)).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_controlnet_is_one_of_its_model(family):
    plain = with_controlnet(family, lambda pipe: controlnet(family, pipe))
    want = ours(wrapped(plain, family), extras=Extras(picture()))
    plain.controlnet = torch.compile(plain.controlnet, backend=lambda graph, inputs: graph.forward)
    with torch.compiler.set_stance("force_eager"):  # what is compiled isn't the question here
        close(ours(wrapped(plain, family), extras=Extras(picture())), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_controlnets(family):
    several = FluxMultiControlNetModel if family == "tiny-flux" else MultiControlNetModel
    pipe = with_controlnet(family, lambda pipe: several([controlnet(family, pipe, seed) for seed in (5, 6)]))
    images = [picture(seed=1), picture(seed=2)]
    settings = {"controlnet_conditioning_scale": [0.5, 0.9], "control_guidance_start": [0.0, 0.3]}
    given = {"control_image" if family == "tiny-flux" else "image": images}
    if family == "tiny-flux":
        given["control_guidance_end"] = [1.0, 1.0]
    expected = stock(pipe, family, **given, **settings)
    sampling = Sampling(posterior="sample").over(FAST)
    backbone = wrapped(pipe, family)
    close(ours(backbone, sampling=sampling, extras=Extras(images, **settings)), expected)
    alone = ours(backbone, sampling=sampling, extras=Extras(images, controlnet_conditioning_scale=[0.5, 0.0]))
    assert not torch.allclose(alone, expected, atol=1e-3)


def test_a_union_controlnet_is_told_what_the_image_shows():
    pipe = with_controlnet("tiny-flux", lambda pipe: controlnet("tiny-flux", pipe, num_mode=3))
    backbone, image = wrapped(pipe, "tiny-flux"), picture()
    sampling = Sampling(posterior="sample").over(FAST)
    one, two = (ours(backbone, sampling=sampling, extras=Extras(image, control_mode=mode)) for mode in (0, 2))
    close(two, stock(pipe, "tiny-flux", control_image=image, control_mode=2))
    assert not torch.allclose(one, two, atol=1e-3)
    for mode in (None, 3):
        with pytest.raises(HiresError, match=rf"control_mode {mode}: .* allowed: 0 to 2"):
            ours(backbone, extras=Extras(image, control_mode=mode))
    pipe.controlnet = FluxMultiControlNetModel([pipe.controlnet])
    both = ours(backbone, "npa", (192, 192), extras=Extras([picture(seed=1), image], control_mode=[0, 2]))
    assert both.isfinite().all()


# --- IP-Adapter -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ip_adapter_at_the_base_is_the_stock_pipelines(family):
    pipe = with_ip_adapter(family, adapters=2)
    pipe.set_ip_adapter_scale([0.8, 0.4])
    images = [picture(60, 40, seed=1), picture(seed=2)]
    expected = stock(pipe, family, ip_adapter_image=images)
    backbone = wrapped(pipe, family)
    close(ours(backbone, extras=Extras(ip_adapter_image=images)), expected)
    guided = () if family == "tiny-flux" else (True,)
    embeds = pipe.prepare_ip_adapter_image_embeds(images, None, "cpu", 1, *guided)
    close(ours(backbone, extras=Extras(ip_adapter_image_embeds=embeds)), expected)
    assert not torch.allclose(ours(backbone, extras=Extras(ip_adapter_image=images[::-1])), expected, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["scalediff", "multidiffusion+lfm+sg"])
def test_ip_adapter_acts_inside_the_stages(family, variant):
    """The base latents are given, so that only the stage above can differ."""
    plain = wrapped(build_pipeline(family), family)
    pipe = with_ip_adapter(family)
    backbone, size = wrapped(pipe, family), (192, 192)
    base = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    without = ours(plain, variant, size, base=base)
    one, two = (
        ours(backbone, variant, size, base=base, extras=Extras(ip_adapter_image=picture(seed=seed))) for seed in (1, 2)
    )
    pipe.set_ip_adapter_scale(0.0)
    off = ours(backbone, variant, size, base=base, extras=Extras(ip_adapter_image=picture(seed=1)))
    close(off, without)
    assert (one - without).abs().mean() > 1e-3 and (one - two).abs().mean() > 1e-4
    pipe.unload_ip_adapter()
    close(ours(backbone, variant, size, base=base), without)


def test_ip_adapter_acts_beside_scale_dits_attention():
    local = Variant(attention="scale_dit", lfm=True)
    base = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(lr_ratio=2, local_radius=2).over(FAST)
    without = ours(wrapped(build_pipeline("tiny-flux"), "tiny-flux"), local, (192, 192), sampling, base=base)
    pipe = with_ip_adapter("tiny-flux")
    extras = Extras(ip_adapter_image=picture())
    one = ours(wrapped(pipe, "tiny-flux"), local, (192, 192), sampling, base=base, extras=extras)
    pipe.set_ip_adapter_scale(0.0)
    close(ours(wrapped(pipe, "tiny-flux"), local, (192, 192), sampling, base=base, extras=extras), without)
    assert (one - without).abs().mean() > 1e-3


# --- guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [0, 1])
def test_true_guidance_of_flux_is_the_stock_pipelines(adapters):
    pipe = with_ip_adapter("tiny-flux") if adapters else build_pipeline("tiny-flux")
    images = {"ip_adapter_image": [picture()]} if adapters else {}
    expected = stock(pipe, "tiny-flux", negative_prompt="a grey cone", true_cfg_scale=2.5, **images)
    sampling = Sampling(negative_prompt="a grey cone", true_cfg_scale=2.5).over(FAST)
    backbone = wrapped(pipe, "tiny-flux")
    close(ours(backbone, sampling=sampling, extras=Extras(**images)), expected)
    other = Sampling(negative_prompt="a blue ball").over(sampling)
    one, two = (ours(backbone, "npa", (192, 192), s, extras=Extras(**images)) for s in (sampling, other))
    assert (one - two).abs().mean() > 1e-4
    with pytest.raises(HiresError, match="sees one prompt"):
        ours(backbone, Variant(attention="scale_dit"), (192, 192), sampling, extras=Extras(**images))


def test_negative_prompts_act_in_the_stages_of_sdxl():
    backbone = wrapped(build_pipeline("tiny-sdxl"), "tiny-sdxl")
    base = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    one, two = (
        ours(backbone, "npa", (192, 192), Sampling(negative_prompt=text).over(FAST), base=base)
        for text in ("", "a grey cone")
    )
    assert (one - two).abs().mean() > 1e-4


def test_guidance_of_the_stages_alone():
    """The base goes without classifier-free guidance, the stages with it."""
    backbone = wrapped(build_pipeline("tiny-sdxl"), "tiny-sdxl")
    sampling = Sampling(guidance_scale=1.0, stage_guidance_scale=3.0).over(FAST)
    plain = Sampling(guidance_scale=1.0).over(FAST)
    base = ours(backbone, "npa", (128, 128), plain)
    assert torch.equal(ours(backbone, "npa", (128, 128), sampling), base)
    one, two = (ours(backbone, "npa", (256, 256), s, base=base) for s in (sampling, plain))
    assert (one - two).abs().mean() > 1e-4


# --- LoRA -----------------------------------------------------------------------------------------------------------


def add_lora(model, name, seed, zero=False):
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=zero), name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loras_act_as_in_the_stock_pipeline_and_in_every_stage(family):
    pipe = build_pipeline(family)
    backbone = wrapped(pipe, family)
    size = (192, 192)
    base = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    bare = ours(backbone, "scalediff", size, base=base)
    add_lora(backbone.model, "nothing", 0, zero=True)
    assert torch.equal(ours(backbone, "scalediff", size, base=base), bare)
    add_lora(backbone.model, "one", 1)
    add_lora(backbone.model, "two", 2)
    made = []
    for weights in ([1.0, 0.0], [0.7, 0.4]):
        pipe.set_adapters(["one", "two"], weights)
        close(ours(backbone), stock(pipe, family))
        made.append(ours(backbone, "scalediff", size, base=base))
    assert (made[0] - bare).abs().mean() > 1e-3 and (made[0] - made[1]).abs().mean() > 1e-4
    pipe.fuse_lora(adapter_names=["one", "two"])
    close(ours(backbone, "scalediff", size, base=base), made[1], 1e-4)


# --- where weights rest, how they are stored and run --------------------------------------------------------------


def offloaded(pipe, model, way):
    """diffusers' own ways, on the CPU as the device."""
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif way == "leaf_level":
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    elif way == "block_level":
        pipe.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    else:  # accelerate's, which leaves no weight on any device but while its layer runs
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                add_hook_to_module(module, AlignDevicesHook(execution_device=torch.device("cpu"), offload=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["model", "leaf_level", "block_level", "sequential"])
def test_offloaded_models_make_the_same_image(family, way):
    want = ours(wrapped(build_pipeline(family), family), "scalediff", (192, 192))
    pipe = build_pipeline(family)
    backbone = wrapped(pipe, family)
    offloaded(pipe, backbone.model, way)
    if way == "sequential":
        assert next(backbone.model.parameters()).device.type == "meta"
    close(ours(backbone, "scalediff", (192, 192)), want)
    backbone.free()
    if way == "model":
        assert all(part.device.type == "cpu" for part in (pipe.vae, backbone.model))
        close(ours(backbone, "scalediff", (192, 192)), want)


def test_a_controlnet_is_offloaded_too():
    want, got = None, None
    for way in (None, "model", "leaf_level"):
        pipe = with_controlnet("tiny-flux", lambda pipe: controlnet("tiny-flux", pipe))
        if way:
            offloaded(pipe, pipe.transformer, way)
        got = ours(wrapped(pipe, "tiny-flux"), "npa", (192, 192), extras=Extras(picture()))
        want = got if want is None else want
        close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_models_make_the_same_image_on_a_gpu(family, kind):
    pipe = build_pipeline(family)
    pipe.to("cuda")
    want = ours(wrapped(pipe, family), "scalediff", (192, 192)).cpu()
    pipe = build_pipeline(family)
    offload_parts(pipe, kind, torch.device("cuda"))
    for _ in range(2):
        torch.testing.assert_close(ours(wrapped(pipe, family), "scalediff", (192, 192)).cpu(), want, atol=1e-3, rtol=0)
        pipe.maybe_free_model_hooks()


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_storage_is_the_stock_pipelines(family):
    pipe = build_pipeline(family)
    backbone = wrapped(pipe, family)
    plain = ours(backbone)
    backbone.model.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert backbone.dtype == torch.float32
    close(ours(backbone), stock(pipe, family))
    assert not torch.equal(ours(backbone), plain)
    assert ours(backbone, "scalediff", (192, 192)).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_may_be_of_another_precision(family):
    """As when only the large model is loaded in bfloat16."""
    pipe = build_pipeline(family)
    backbone = wrapped(pipe, family)
    plain = ours(backbone)
    backbone.model.to(torch.bfloat16)
    latents = ours(backbone)
    assert 0 < (latents - plain).norm() < 0.1 * plain.norm()


def test_pipelines_without_text_encoders_are_refused():
    parts = build_pipeline("tiny-flux").components | {"text_encoder_2": None, "tokenizer_2": None}
    with pytest.raises(HiresError, match="the pipeline has no text_encoder_2, tokenizer_2: load it whole"):
        wrapped(FluxPipeline(**parts), "tiny-flux")


def short(family):
    """A pipeline with few layers, which take long to trace."""
    pipe = build_pipeline(family)
    if family == "tiny-flux":
        pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
        pipe.transformer.single_transformer_blocks = pipe.transformer.single_transformer_blocks[:1]
    return pipe


@pytest.mark.parametrize("family, way", [("tiny-flux", "whole"), ("tiny-sdxl", "blocks")])
def test_compiled_models_follow_the_change_of_processors(family, way):
    base = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, pipe = wrapped(short(family), family), short(family)
    if way == "whole":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.unet.compile_repeated_blocks(backend="eager")
    compiled = wrapped(pipe, family)
    for variant in ("npa", "dense+lfm+sg", "npa"):
        close(*(ours(backbone, variant, (192, 192), base=base) for backbone in (compiled, plain)))


# --- images of several prompts, pipelines of the family, previews ---------------------------------------------------


def test_several_images_of_several_prompts():
    backbone = wrapped(build_pipeline("tiny-flux"), "tiny-flux")
    options = {"height": 128, "width": 96, "num_inference_steps": 2, "tau": 500}
    images = hires.generate(backbone, PROMPTS, seed=[3, 7], num_images_per_prompt=2, **options)
    assert len(images) == 4
    for image, (prompt, seed) in zip(images, [(0, 3), (0, 4), (1, 7), (1, 8)], strict=True):
        (alone,) = hires.generate(backbone, PROMPTS[prompt], seed=seed, **options)
        assert np.abs(np.array(image, dtype=int) - np.array(alone, dtype=int)).max() <= 1
    with pytest.raises(HiresError, match="num_images_per_prompt = 0"):
        hires.generate(backbone, PROMPTS, num_images_per_prompt=0, **options)


@pytest.mark.parametrize(
    "sibling, family", [(FluxImg2ImgPipeline, "tiny-flux"), (StableDiffusionXLImg2ImgPipeline, "tiny-sdxl")]
)
def test_image_to_image_pipelines_are_known(sibling, family):
    plain = build_pipeline(family)
    own = {"height": 256, "width": 192, "image": picture(200, 150), "strength": 0.5, "num_inference_steps": 4}
    one, two = (
        hires.generate(wrapped(pipe, family), PROMPTS[0], **own)[0] for pipe in (plain, sibling.from_pipe(plain))
    )
    assert np.array_equal(np.array(one), np.array(two))


def test_previews_come_after_every_stage_but_the_last():
    backbone = wrapped(build_pipeline("tiny-flux"), "tiny-flux")
    seen = []
    hires.generate(
        backbone, PROMPTS[0], height=512, width=256, num_inference_steps=2, tau=500,
        preview=lambda name, images: seen.append((name, [image.size for image in images])),
    )  # fmt: skip
    assert seen == [("base", [(32, 64)]), ("stage-1", [(32, 64)])]


def test_a_preview_is_the_small_image():
    """Of a smooth image, as random weights paint nothing: the enlargement, and pixels that the control gives."""
    backbone = hires.load("tiny-flux", device="cpu")
    rows, columns = np.mgrid[:128, :128]
    image = Image.fromarray(np.stack([rows, columns, 0 * rows + 90], -1).astype(np.uint8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    (small,) = small_images(backbone, backbone.encode(pixels))
    want = np.array(image.resize((64, 64), Image.Resampling.BOX), dtype=int)
    assert small.size == (64, 64) and np.abs(np.array(small, dtype=int) - want).mean() < 12
    *_, control = cascade(backbone, PROMPTS[:1], [0], VARIANTS["upsample"], 256, 256, FAST)
    assert small_images(backbone, control)[0].size == (64, 64)


# --- bad input ------------------------------------------------------------------------------------------------------


def refused(backbone, message, **options):
    calls = []
    hook = backbone.model.register_forward_pre_hook(lambda module, args: calls.append(args))
    given = {"height": 192, "width": 192, "num_inference_steps": 2, "tau": 500, **options}
    with pytest.raises(HiresError, match=message) as error:
        hires.generate(backbone, PROMPTS[0], **given)
    hook.remove()
    assert not calls and "\n" not in str(error.value)


def test_refusals_of_control_images():
    plain = wrapped(build_pipeline("tiny-flux"), "tiny-flux")
    refused(plain, "no ControlNet: make one", control_image=picture())
    refused(plain, "scale 0.5: the pipeline has no ControlNet", controlnet_conditioning_scale=0.5)
    refused(plain, "crop cuts your own", crop=True)
    pipe = with_controlnet("tiny-flux", lambda pipe: controlnet("tiny-flux", pipe))
    backbone = wrapped(pipe, "tiny-flux")
    refused(backbone, "0 control images for 1 ControlNets")
    refused(backbone, "2 control images for 1 ControlNets", control_image=[picture(), picture()])
    refused(backbone, r"control image is 96x128 .* \(crop=True", control_image=picture(96, 128))
    refused(backbone, "control_image of type Tensor: give a PIL image", control_image=torch.zeros(3, 8, 8))
    refused(backbone, "2 values of controlnet_conditioning_scale for 1", control_image=picture(),
            controlnet_conditioning_scale=[1.0, 1.0])  # fmt: skip
    refused(backbone, "start < end", control_image=picture(), control_guidance_start=0.6, control_guidance_end=0.5)
    refused(backbone, "control_mode 1: .* leave it out", control_image=picture(), control_mode=1)
    refused(backbone, "choose another variant", control_image=picture(), variant=Variant(attention="scale_dit"))


def test_refusals_of_ip_adapter_images():
    plain = wrapped(build_pipeline("tiny-sdxl"), "tiny-sdxl")
    refused(plain, "call pipe.load_ip_adapter first", ip_adapter_image=picture())
    backbone = wrapped(with_ip_adapter("tiny-sdxl"), "tiny-sdxl")
    refused(backbone, "0 IP-Adapter images for 1 loaded")
    refused(backbone, "2 IP-Adapter images for 1 loaded", ip_adapter_image=[picture(), picture()])
    refused(backbone, "not both", ip_adapter_image=picture(), ip_adapter_image_embeds=[torch.zeros(2, 1, 24)])
    refused(backbone, "give a list of them", ip_adapter_image_embeds=torch.zeros(2, 1, 24))
    refused(backbone, "needs two rows", ip_adapter_image_embeds=[torch.zeros(1, 1, 24)])


def test_controlnets_of_other_models_are_refused():
    def make(family, net):
        with pytest.raises(HiresError) as error:
            wrapped(with_controlnet(family, net), family)
        return str(error.value)

    sdxl = build_pipeline("tiny-sdxl")
    assert "a ControlNetModel on a flux model: allowed: FluxControlNetModel" in make(
        "tiny-flux", lambda pipe: controlnet("tiny-sdxl", sdxl)
    )
    narrow = "its joint_attention_dim is 64, this model's 128"
    assert narrow in make("tiny-flux", lambda pipe: controlnet("tiny-flux", pipe, joint_attention_dim=64))

    def pooled(pipe):
        net = controlnet("tiny-sdxl", pipe)
        net.register_to_config(global_pool_conditions=True)
        return net

    assert "global_pool_conditions" in make("tiny-sdxl", pooled)


def test_models_of_other_tasks_are_refused():
    """Inpainting and control models load as plain pipelines, but read more channels than a latent has."""
    pipe = build_pipeline("tiny-flux")
    pipe.transformer.register_to_config(in_channels=128)
    with pytest.raises(HiresError, match="reads latents of 32 channels and the VAE makes 16"):
        wrapped(pipe, "tiny-flux")
    pipe = build_pipeline("tiny-sdxl")
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(HiresError, match="time_cond_proj_dim"):
        wrapped(pipe, "tiny-sdxl")
    refiner = StableDiffusionXLImg2ImgPipeline(**build_pipeline("tiny-sdxl").components, requires_aesthetics_score=True)
    with pytest.raises(HiresError, match="refiner"):
        wrapped(refiner, "tiny-sdxl")


def test_images_of_another_aspect_are_cut_when_asked():
    backbone = wrapped(build_pipeline("tiny-flux"), "tiny-flux")
    wide = picture(130, 300)
    refused(backbone, "image of type ndarray: give a PIL image", image=np.array(wide))
    refused(backbone, r"image is 130x300 .* its centre of 130x130 \(crop=True, --crop\)", image=wide)
    options = {"height": 192, "width": 192, "num_inference_steps": 2, "tau": 500}
    (cut,) = hires.generate(backbone, PROMPTS[0], image=wide, crop=True, **options)
    (same,) = hires.generate(backbone, PROMPTS[0], image=wide.crop((85, 0, 215, 130)), **options)
    assert np.array_equal(np.array(cut), np.array(same))
