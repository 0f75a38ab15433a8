"""An image depends on model, prompt, seed, variant, size and settings alone: what may change around it, and how exactly
the image stays the same."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hires
from hires import layout
from hires.cascade import cascade, decode
from hires.config import load_config
from hires.settings import Sampling
from hires.stages import base, images, models, prompts
from hires.variants import VARIANTS

CONFIG = """
name: tested
prompts: {n: 2, scenes: {pool: 12}}
backbones:
  flux: {model: tiny-flux, base_resolution: 128, size_multiple: 32, sampling: &few {num_inference_steps: 1, tau: 500}}
  sdxl: {model: tiny-sdxl, base_resolution: 128, size_multiple: 32, sampling: *few}
studies:
  main: {backbones: [flux, sdxl], variants: [direct, scalediff], sizes: {256x256: 2}}
compute: {device: cpu, shard_size: 2}
"""
VARIANT = ["scalediff", "direct", "multidiffusion+lfm+sg"]
PROMPTS = ["three red wooden cubes on a brick wall", "a blue ball in the water", "two green stars", "a yellow cone"]
SAMPLING = Sampling(num_inference_steps=2, tau=500)


def make(config, jobs):
    """Run `jobs`: (backbone, shard)."""
    names = {latents.backbone: latents.name for latents in layout.base_sets(config)}
    for backbone, shard in jobs:
        base.run(config, backbone, names[backbone], shard)
        images.run(config, "main", backbone, 256, 256, shard)


def files():
    """Bytes of every latent and image."""
    found = [path for path in Path("results").rglob("*-0.*") if path.suffix in (".png", ".safetensors")]
    return {str(path): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes in one shard of each backbone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        Path("config.yaml").write_text(CONFIG)
        config = load_config("config.yaml")
        prompts.run(config)
        make(config, [("flux", 0), ("sdxl", 0)])
        yield files()


@pytest.fixture
def folder(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    prompts.run(load_config("config.yaml"))


def test_shards_and_their_order_change_nothing(folder, alone):
    config = load_config("config.yaml", {"compute": {"shard_size": 1}})
    make(config, [("sdxl", 1), ("flux", 1), ("flux", 0), ("sdxl", 0)])
    assert files() == alone


def test_jobs_side_by_side_change_nothing(folder, alone):
    """Two processes, and fewer images: of one backbone, in one variant."""
    text = CONFIG.replace("[flux, sdxl], variants: [direct, scalediff]", "[flux], variants: [scalediff]")
    Path("config.yaml").write_text(text.replace("shard_size: 2", "shard_size: 1"))
    config = load_config("config.yaml")
    (latents,) = layout.base_sets(config)
    for shard in (1, 0):
        base.run(config, "flux", latents.name, shard)
    command = "-m hires.cli images --config config.yaml --study main --backbone flux --size 256x256 --shard"
    jobs = [subprocess.Popen([sys.executable, *command.split(), str(shard)]) for shard in (1, 0)]
    assert [job.wait() for job in jobs] == [0, 0]
    made = files()
    assert len(made) == 4 and made.items() <= alone.items()


def run(backbone, variant, numbers, side=256, **settings):
    """(latents, pixels as integers) of some of the prompts, made together."""
    chosen = [PROMPTS[number] for number in numbers]
    sampling = Sampling.of(**settings).over(SAMPLING)
    *_, stage = cascade(backbone, chosen, list(numbers), VARIANTS[variant], side, side, sampling)
    return stage.latents.cpu(), np.stack([np.asarray(image, dtype=int) for image in decode(backbone, stage)])


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module", params=["tiny-flux", "tiny-sdxl"])
def on_cpu(request):
    return hires.load(request.param, device="cpu")


@pytest.mark.parametrize("variant", VARIANT)
def test_batches_move_the_last_bits_only(on_cpu, variant):
    """Trained models, as rounding grows with what they paint."""
    latents, pixels = run(on_cpu, variant, (0, 1), view_batch=5)
    alone, one = run(on_cpu, variant, (1,), view_batch=1)
    assert relative(latents[1:], alone) < 1e-4
    assert np.abs(pixels[1] - one[0]).max() <= 1


def test_the_same_twice_with_another_image_between():
    backbone = hires.load("tiny-flux", device="cpu")
    first, _ = run(backbone, "scalediff", (0,))
    run(backbone, "npa", (1,))
    torch.manual_seed(5)
    again, _ = run(hires.load("tiny-flux", device="cpu"), "scalediff", (0,))
    assert torch.equal(first, again)


def test_float32_means_float32(monkeypatch):
    """While a model in float32 runs TF32 is off, and afterwards as it was."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    backbone, seen = hires.load("tiny-sdxl", device="cpu"), []
    for part in (backbone.pipe.text_encoder, backbone.model, backbone.pipe.vae.decoder):
        part.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    run(backbone, "direct", (0,), side=128)
    assert len(seen) == 4 and not any(seen) and torch.backends.cudnn.allow_tf32
    with backbone.full_precision():
        assert not torch.backends.cudnn.allow_tf32
    backbone.model.to(torch.bfloat16)
    with backbone.full_precision():
        assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("convolutions", "recurrent"), [("ieee", "tf32"), ("tf32", "ieee"), ("ieee", "ieee")])
def test_precisions_that_the_user_chose_stay(convolutions, recurrent):
    """Through PyTorch's newer names, under which reading `allow_tf32` raises where the two differ."""
    backbone, cudnn = hires.load("tiny-sdxl", device="cpu", weights="random"), torch.backends.cudnn
    try:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = convolutions, recurrent
        with backbone.full_precision():
            assert cudnn.conv.fp32_precision != "tf32"
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == (convolutions, recurrent)
    finally:
        cudnn.allow_tf32 = True


def test_damaged_weights_make_no_image():
    """A flipped bit in an exponent: numbers beyond all bounds, and no picture of them."""
    backbone = hires.load("tiny-flux", device="cpu")
    weight = backbone.model.proj_out.weight.data
    weight[0, 0] = float("inf")
    with pytest.raises(hires.errors.HiresError, match="the model gives NaN: its weights are damaged"):
        run(backbone, "direct", (0,))


# on a GPU


@pytest.fixture(scope="module", params=["tiny-flux", "tiny-sdxl"])
def on_gpu(request):
    return hires.load(request.param, device="cuda", dtype="float32")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sdxl"])
@pytest.mark.parametrize("variant", VARIANT)
def test_the_same_gpu_gives_the_same_bits(model, variant, dtype):
    backbone = hires.load(model, device="cuda", dtype=dtype)
    first, pixels = run(backbone, variant, (0, 1), side=512)
    run(backbone, "npa", (2,))
    again, twice = run(hires.load(model, device="cuda", dtype=dtype), variant, (0, 1), side=512)
    assert torch.equal(first, again) and np.array_equal(pixels, twice)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANT)
def test_gpu_and_cpu_agree(on_gpu, variant):
    latents, pixels = run(on_gpu, variant, (0,))
    expected, picture = run(hires.load(on_gpu.name, device="cpu", dtype="float32"), variant, (0,))
    assert relative(latents, expected) < 1e-4
    assert np.abs(pixels - picture).max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANT)
def test_batches_on_a_gpu(on_gpu, variant):
    """Float32: as on the CPU. bfloat16: the error against float32 is at most twice that of the image made alone."""
    latents, pixels = run(on_gpu, variant, (0, 1, 2, 3), side=512)
    one, picture = run(on_gpu, variant, (2,), side=512)
    assert relative(latents[2:3], one) < 1e-4 and np.abs(pixels[2] - picture[0]).max() <= 1
    low = hires.load(on_gpu.name, device="cuda", dtype="bfloat16")
    together, _ = run(low, variant, (0, 1, 2, 3), side=512)
    by_itself, _ = run(low, variant, (2,), side=512)
    assert relative(together[2:3], one) <= 2 * relative(by_itself, one)


@pytest.mark.gpu
def test_half_precision_changes_less_than_a_grey_level(on_gpu):
    """As in config/studies.yaml; an error of one grey level is 48.1 dB."""
    half = hires.load(on_gpu.name, device="cuda", dtype="float16")
    pictures = []
    for backbone in (on_gpu, half):
        *_, stage = cascade(backbone, PROMPTS, range(4), VARIANTS["scalediff"], 512, 512, backbone.defaults)
        pictures.append(np.stack([np.asarray(picture, dtype=float) for picture in decode(backbone, stage)]))
    error = np.square(pictures[0] - pictures[1]).mean()
    assert error < 1


@pytest.mark.gpu
def test_stages_on_a_gpu_give_the_same_files(tmp_path, monkeypatch):
    """Shards in another order, the models loaded again: the same bytes."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG.replace("device: cpu", "device: cuda"))
    config = load_config("config.yaml")
    prompts.run(config)
    make(config, [("flux", 0), ("sdxl", 0)])
    before = files()
    for path in before:
        Path(path).unlink()
    models._load.cache_clear()
    config = load_config("config.yaml", {"compute": {"shard_size": 1}})
    make(config, [(backbone, shard) for shard in (1, 0) for backbone in ("sdxl", "flux")])
    assert files() == before
