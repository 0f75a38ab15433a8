"""One image on several devices: the latents and pixels of one process, here with gloo on the CPU."""

import os
import sys
from contextlib import nullcontext

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from processes import in_processes

from hires import load
from hires.attention import bands
from hires.cascade import cascade
from hires.cli import main
from hires.errors import HiresError
from hires.execution import parallel
from hires.settings import Sampling
from hires.variants import VARIANTS

SAMPLING = Sampling.of(num_inference_steps=2, tau=500, vae_tiling=True)


def made(device):
    """Latents of a ScaleDiff stage, its decoded pixels in tiles, and one more stage of a batch of two, tall."""
    backbone = load("tiny-flux", device)
    found = []
    for prompts, height, width in ((["a red disc"], 256, 256), (["a red disc", "two stars"], 256, 128)):
        seeds = list(range(len(prompts)))
        stages = list(cascade(backbone, prompts, seeds, VARIANTS["scalediff"], height, width, SAMPLING))
        found.append(stages[-1].latents.cpu())
    found.append(backbone.decode(found[0].to(backbone.device), True).cpu())
    return found


@pytest.fixture(scope="module")
def alone():
    return made("cpu")


def test_three_processes_make_the_same(alone, tmp_path):
    for found in in_processes("divided_on_cpu.py", 3, tmp_path):
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_make_the_same(tmp_path):
    alone = made("cuda")
    first, second = in_processes("divided_on_cpu.py", 2, tmp_path, "cuda")
    for one, twin, other in zip(first, second, alone, strict=True):
        assert torch.equal(one, twin)
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)  # float32, but other tiles of matrix products


def test_bands_are_whole_patches_and_hold_every_row():
    for height, window, count in ((512, 64, 2), (256, 64, 3), (100, 30, 4)):
        found = bands.bands(height, window, count)
        assert [one.first for one in found[1:]] == [one.last for one in found[:-1]]
        assert found[0].first == 0 and found[-1].last == height
        assert all(one.first % (window // 2) == 0 and one.low <= one.first < one.last <= one.high for one in found)
        rows = [one.last - one.first for one in found]
        assert max(rows) - min(rows) <= window // 2
    assert bands.bands(512, 64, 2)[1] == (256, 512, 240, 512)
    with pytest.raises(HiresError, match="5 devices for 4 rows of patches"):
        bands.bands(16, 8, 5)


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    [
        ("multidiffusion+lfm+sg", {}, "only variants with attention 'npa'"),
        ("scalediff", {"text_rows": "global"}, "text_rows must have its default"),
    ],
)
def test_what_cannot_be_divided_is_refused(variant, settings, message):
    with pytest.raises(HiresError, match=message):
        bands._check(load("tiny-flux", "cpu").model, VARIANTS[variant], Sampling.of(**settings))


def test_a_unet_cannot_be_divided():
    with pytest.raises(HiresError, match="a UNet2DConditionModel can't be divided"):
        bands._check(load("tiny-sdxl", "cpu").model, VARIANTS["scalediff"], Sampling())


def test_the_command_line_starts_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", "") or os.pathsep.join(sys.path))
    arguments = ["generate", "--prompt", "a red disc", "--size", "256", "--device", "cpu", "--set", "tau=500"]
    arguments += ["--set", "num_inference_steps=2"]
    assert main([*arguments, "--out", str(tmp_path / "two.png"), "--gpus", "2"]) == 0
    assert main([*arguments, "--out", str(tmp_path / "one.png")]) == 0
    two, one = (torch.tensor(list(Image.open(tmp_path / f"{name}.png").tobytes())) for name in ("two", "one"))
    assert (two - one).abs().max() <= 1


def test_a_process_that_fails_ends_all_with_one_line(capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", "") or os.pathsep.join(sys.path))
    assert parallel.launch(2, ["plan", "--config", "nowhere.yaml"]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    arguments = ["generate", "--prompt", "a red disc", "--size", "256", "--device", "cpu", "--gpus", "2"]
    assert main([*arguments, "--set", "attention_backend=gluon"]) == 2
    told = capfd.readouterr().err
    assert "backend 'gluon' can't run" in told and "Traceback" not in told


def test_an_encoder_is_not_shared_where_a_convolution_reads_each_tile_at_once(monkeypatch):
    monkeypatch.setattr(parallel, "active", lambda: True)
    for convolution in (True, False):
        vae = AutoencoderKL(sample_size=64, use_quant_conv=convolution, block_out_channels=(32,))
        vae.enable_tiling()
        shared = [not isinstance(parallel.shared_tiles(vae, (128, 128), factor), nullcontext) for factor in (1, 8)]
        assert shared == [not convolution, True]


def test_alone_nothing_is_joined():
    with parallel.joined("cpu") as device:
        assert device == "cpu" and not parallel.active() and parallel.first()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_of_several_is_known_before_they_are_joined(rank, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert parallel.first() == (rank == "0")
