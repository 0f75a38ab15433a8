"""GroupNorm with SiLU and the residual blocks of a VAE: the formula, PyTorch's own, and the blocks of diffusers."""

import pytest
import torch
from diffusers import AutoencoderKL
from hires_kernels import KernelError, add_bias, group_norm, watch
from torch.nn import functional

from hires import load
from hires.backbones.loading import CONFIGS
from hires.execution.residual import fused_blocks

F64 = torch.float64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # (batch, channels, height, width), groups
    "one chunk": ((2, 32, 5, 7), 8),
    "several chunks, the last one short": ((2, 64, 60, 41), 32),
    "channels of no power of two": ((1, 24, 50, 50), 8),
    "one group": ((1, 96, 9, 9), 1),
    "a pixel": ((3, 8, 1, 1), 4),
}


def draw(*shape, seed=0, mean=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + mean


def by_hand(x, groups, weight, bias, eps, silu, shift):
    """In float64, a group of one image at a time."""
    y = torch.empty_like(x)
    for image, out in zip(x + shift[:, None, None], y):
        for part, values in zip(image.chunk(groups), out.chunk(groups)):
            values.copy_((part - part.mean()) / ((part - part.mean()).square().mean() + eps).sqrt())
    y = y * weight[:, None, None] + bias[:, None, None]
    return y / (1 + (-y).exp()) if silu else y


def error(given, exact):
    return float((given.double().cpu() - exact).norm() / exact.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES)
def test_group_norm_is_the_formula(case, dtype, device):
    """Both backends, at most twice PyTorch's own error, and a rounding of the mean, which is float32 and thirty times
    the deviation: values far from zero, where squares would cancel."""
    (batch, channels, *size), groups = SHAPES[case]
    x = draw(batch, channels, *size, mean=30.0).to(dtype)
    x = x.to(memory_format=torch.channels_last) if groups > 4 else x  # any strides
    weight, bias, shift = (draw(channels, seed=seed).to(dtype) for seed in (1, 2, 3))
    for silu, moved in ((True, shift), (False, torch.zeros_like(shift))):
        exact = by_hand(x.double(), groups, weight.double(), bias.double(), 1e-3, silu, moved.double())
        x, weight, bias, moved = (value.to(device) for value in (x, weight, bias, moved))
        plain = functional.group_norm(x + moved[:, None, None], groups, weight, bias, 1e-3)
        allowed = 2 * error(functional.silu(plain) if silu else plain, exact) + torch.finfo(dtype).eps
        allowed += 30 * torch.finfo(torch.float32).eps
        for backend in ("reference", "triton"):
            found = group_norm(x, groups, weight, bias, eps=1e-3, silu=silu, shift=moved, backend=backend)
            assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
            assert error(found, exact) <= allowed, backend
        if not silu:
            assert torch.equal(found, group_norm(x, groups, weight, bias, eps=1e-3, backend="triton"))
        x, weight, bias = (value.cpu() for value in (x, weight, bias))


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_has_the_same_bits_in_every_batch(device):
    x, weight, bias = draw(3, 40, 30, 70).float().to(device), *(draw(40, seed=s).float().to(device) for s in (1, 2))
    together = group_norm(x, 5, weight, bias, silu=True, backend="triton")
    assert torch.equal(together[1:2], group_norm(x[1:2], 5, weight, bias, silu=True, backend="triton"))
    assert not torch.equal(together[1], together[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_bias(dtype, device):
    x, y, bias = draw(2, 24, 31, 17).to(dtype), draw(2, 24, 31, 17, seed=1).to(dtype), draw(24, seed=2).to(dtype)
    exact = (x.double() + y.double() + bias.double()[:, None, None]).to(dtype)
    y = y.to(memory_format=torch.channels_last)
    found = add_bias(x.to(device), y.to(device), bias.to(device), backend="triton").cpu()
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(add_bias(x, y, bias, backend="reference"), exact, rtol=4e-3, atol=4e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, 8, 8)}, r"x of shape \(4, 8, 8\): must be \(batch, channels, height, width\)"),
        ({"groups": 3}, "8 channels in 3 groups: must be as many in each"),
        ({"weight": torch.ones(4)}, r"weight of shape \(4,\): must be \(8,\), one for each channel"),
        ({"shift": torch.ones(8).half()}, "must share one floating-point dtype"),
        ({"backend": "gluon"}, "it runs neighborhood_patch_attention; able: triton, sdpa, reference"),
    ],
)
def test_input_that_does_not_fit(arguments, message):
    given = {"x": torch.zeros(1, 8, 2, 2), "groups": 4, "weight": torch.ones(8), "bias": torch.ones(8), **arguments}
    with pytest.raises(KernelError, match=message):
        group_norm(**given)


def test_images_of_two_shapes():
    with pytest.raises(KernelError, match=r"images of shapes \(1, 8, 2, 2\) and \(1, 8, 2, 3\): must be the same"):
        add_bias(torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 3), torch.zeros(8))


def test_gradients_flow_through_the_plain_path():
    x = draw(1, 8, 3, 3).requires_grad_()
    weight, bias = draw(8, seed=1), draw(8, seed=2)
    assert torch.autograd.gradcheck(lambda x: group_norm(x, 4, weight, bias, silu=True), x)


# A VAE's blocks


def passes(vae, latents, pixels):
    return vae.decode(latents).sample, vae.encode(pixels).latent_dist.mode()


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_vae_is_diffusers_own(device):
    """In 16 bits at most twice the plain VAE's error, and nothing stays changed; every block is taken."""
    half = torch.float16 if device == "cpu" else torch.bfloat16  # which Triton's interpreter cuts, and doesn't round
    backbone = load("tiny-flux", device, torch.float32)
    vae = backbone.pipe.vae
    latents = draw(1, backbone.latent_channels, 6, 7).float().to(device)
    pixels = draw(1, 3, 24, 40).float().clamp(-1, 1).to(device)
    with backbone.full_precision():
        exact = [x.double().cpu() for x in passes(vae.double(), latents.double(), pixels.double())]
    vae.to(half)
    state = {name: dict(vars(module)) for name, module in vae.named_modules()}
    plain = passes(vae, latents.to(half), pixels.to(half))
    with fused_blocks(vae, backend="triton"), watch() as ran:
        found = passes(vae, latents.to(half), pixels.to(half))
        blocks = [module for module in vae.modules() if type(module).__name__ == "ResnetBlock2D"]
        assert blocks and all("forward" in vars(module) for module in blocks)
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} == state
    assert {entry["kernel"] for entry in ran.launches} == {"fused.group_norm", "fused.add_bias"}
    for given, expected, true in zip(found, plain, exact):
        assert not torch.equal(given, expected)
        assert error(given, true) <= 2 * error(expected, true)


@torch.no_grad()
def test_what_is_not_plain_is_left_alone():
    vae = load("tiny-sdxl", "cpu").pipe.vae

    def taken(backend="triton"):
        with fused_blocks(vae, backend):
            return {name for name, module in vae.named_modules() if "forward" in vars(module)}

    everything = taken()
    block = "decoder.up_blocks.0.resnets.0"
    assert {block, "decoder.conv_norm_out", "encoder.conv_act"} < everything
    assert taken("auto") == set()  # here "auto" is plain PyTorch
    with torch.enable_grad():
        assert taken() == set()
    hook = vae.get_submodule(f"{block}.conv1").register_forward_pre_hook(lambda *_: None)
    assert everything - taken() == {block}
    hook.remove()
    vae.get_submodule(block).output_scale_factor = 2.0
    assert everything - taken() == {block}
    vae.decoder.compile(backend="eager")
    assert taken() == set()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("model", "dtype"), [("flux-dev", torch.bfloat16), ("sdxl", torch.float32)])
@torch.no_grad()
def test_a_full_size_vae(model, dtype, device):
    """Float32 in TF32's products; at most twice the plain VAE's error."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / model / "vae")).to(device).eval()
    latents = draw(1, vae.config.latent_channels, 24, 20).to(device)
    pixels = draw(1, 3, 192, 160).clamp(-1, 1).to(device)
    exact = [x.cpu() for x in passes(vae.double(), latents, pixels)]
    vae.to(dtype)
    plain = passes(vae, latents.to(dtype), pixels.to(dtype))
    with fused_blocks(vae):
        found = passes(vae, latents.to(dtype), pixels.to(dtype))
    for given, expected, true in zip(found, plain, exact):
        assert not torch.equal(given, expected)
        assert error(given, true) <= 2 * error(expected, true)
