"""Strips of a tiled VAE blended at once: the bits of diffusers' own methods, which go row by row."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch.utils._python_dispatch import TorchDispatchMode

from hires import load
from hires.execution.blending import BLENDS, blend, whole_strips
from hires.execution.residual import fused_blocks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderKLFlux2])
def test_bits_of_diffusers(kind, dtype, device):
    """Every extent up to 40 and those of real tiles, whole and cut by a smaller tile, numbers large and small."""
    vae, generator = object.__new__(kind), torch.Generator().manual_seed(0)
    for extent in (*range(41), 64, 128, 256):
        for above, below in ((extent, extent), (extent + 3, extent // 2 + 1), (max(extent // 3, 1), extent + 1)):
            scale = 10 ** torch.randint(-6, 5, (2, 5, 1), generator=generator)
            a, b = (
                (torch.randn(2, 5, rows, 3, generator=generator) * scale[..., None]).to(device, dtype)
                for rows in (above, below)
            )
            for name, dim in (("blend_v", 2), ("blend_h", 3)):
                if dim == 3:
                    a, b = a.mT, b.mT
                expected, found = b.clone(), b.clone()
                getattr(kind, name)(vae, a, expected, extent)
                assert blend(a, found, extent, dim) is found
                assert torch.equal(found, expected), (extent, above, below, dim)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("model", "dtype"), [("tiny-flux", torch.bfloat16), ("tiny-sdxl", torch.float32)])
@torch.no_grad()
def test_a_backbones_tiles_are_its_vaes(model, dtype, device):
    backbone = load(model, device, dtype, weights="random")
    vae = backbone.pipe.vae
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    state, generator = dict(vars(vae)), torch.Generator().manual_seed(1)
    pixels = torch.rand(1, 3, 168, 232, generator=generator).to(device) * 2 - 1
    latents = torch.randn(1, backbone.latent_channels, 21, 29, generator=generator).to(device)
    found = backbone.encode(pixels, tiling=True), backbone.decode(latents, tiling=True)
    assert vars(vae) == state
    vae.enable_tiling()
    mean, scale = backbone.latent_statistics()
    with backbone.full_precision(), fused_blocks(vae):
        encoded = vae.encode(pixels.to(dtype)).latent_dist.mode().float()
        decoded = vae.decode((latents / scale + mean).to(dtype)).sample.float()
    assert torch.equal(found[0], (encoded - mean) * scale) and torch.equal(found[1], decoded.clamp(-1, 1))
    assert not torch.equal(found[1], backbone.decode(latents, tiling=False))


class Computing(TorchDispatchMode):
    """Counts operations that aren't views: on a GPU, launches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seam_takes_few_launches(dtype):
    tiles = [torch.ones(1, 3, 512, 512, dtype=dtype) for _ in range(2)]
    blend(*tiles, 256, 2)  # makes the weights
    with Computing() as ours:
        blend(*tiles, 256, 2)
    with Computing() as theirs:
        AutoencoderKL.blend_v(None, *tiles, 256)
    assert theirs.count == 4 * 256 and ours.count <= 6


def test_other_methods_stay():
    class Linear(AutoencoderKL):
        def blend_h(self, a, b, blend_extent):
            return b

    tiny = {"block_out_channels": (4,), "norm_num_groups": 1, "mid_block_add_attention": False}
    other, own, plain = Linear(**tiny), AutoencoderKL(**tiny), AutoencoderKL(**tiny)
    own.blend_v = lambda a, b, blend_extent: b
    for vae in (other, own):
        before = dict(vars(vae))
        with whole_strips(vae):
            assert vars(vae) == before
    with pytest.raises(KeyError), whole_strips(plain):
        assert {name: vars(plain)[name] for name in BLENDS} == BLENDS
        raise KeyError
    assert not vars(plain).keys() & BLENDS
