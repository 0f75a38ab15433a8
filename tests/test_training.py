"""Training: the pool, the loop and its average, the losses, a run of every model that a stock pipeline can load."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from hires.cli import main
from hires.scenes import WHOLE, caption, split
from hires.training.data import Pool, draw_views, render_pool
from hires.training.loop import EMA, fit
from hires.training.vae import laplacian, texture_energy


def test_views_come_from_training_scenes_and_follow_their_seed():
    views = draw_views(200, seed=1)
    assert all(split(scene.id) == "train" for scene in views.scenes)
    assert draw_views(200, seed=1) == views != draw_views(200, seed=2)
    whole = np.mean([camera == WHOLE for camera in views.cameras])
    assert 0.4 < whole < 0.7
    zooms = [camera.zoom for camera in views.cameras if camera != WHOLE]
    assert min(zooms) >= 1 and 6 < max(zooms) <= 8
    told = [caption(s, c, np.random.default_rng(0)) for s, c in zip(views.scenes, views.cameras)]
    assert len(told) == len(views.captions)


def test_a_pool_comes_back_from_disk(tmp_path):
    pool = render_pool(8, 64, seed=3, workers=0, device=torch.device("cpu"))
    pool.save(tmp_path)
    again = Pool.load(tmp_path, 6, torch.device("cpu"))
    assert torch.equal(again.images, pool.images[:6])
    assert again.captions == pool.captions[:6]


def test_the_average_is_the_recursion_written_out():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    average = EMA([layer], decay=0.9)
    expected = layer.weight.detach().clone().double()
    for step in range(1, 30):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        average.update()
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * layer.weight.detach().double()
    average.copy_to_source()
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_fit_finds_a_least_squares_solution_and_stops_at_nan():
    torch.manual_seed(0)
    x, truth = torch.randn(64, 4), torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    layer = nn.Linear(4, 1)
    log = fit(
        lambda: (layer(x) - x @ truth.T).square().mean(),
        [layer], steps=600, lr=0.05, warmup=10, weight_decay=0.0, ema=0.9, log_every=50,
    )  # fmt: skip
    torch.testing.assert_close(layer.weight.detach(), truth, atol=0.02, rtol=0)
    assert log[-1]["step"] == 600 and log[-1]["loss"] < log[0]["loss"]
    with pytest.raises(ValueError, match="became nan at step"):
        fit(lambda: layer.weight.sum() * float("nan"), [layer], steps=5, lr=0.1, name="broken")


def test_bands_sum_up_to_the_image():
    x = torch.rand(2, 3, 32, 32)
    bands = laplacian(x, levels=3)
    image = bands[-1]
    for band in reversed(bands[:-1]):
        image = band + nn.functional.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(image, x)


def test_texture_energy_knows_amount_not_phase():
    wave = torch.sin(torch.arange(64) * torch.pi / 4).expand(1, 3, 64, 64)
    assert torch.allclose(texture_energy(wave), texture_energy(wave.roll(3, -1)), atol=1e-6)
    assert torch.allclose(texture_energy(2 * wave), 2 * texture_energy(wave), rtol=1e-3)


def test_every_model_trains_and_loads(tmp_path, capsys):
    """The real command line for a few steps; then the stock loader."""
    common = ["--device", "cpu", "--steps", "2", "--batch", "4", "--views", "16", "--pool", str(tmp_path / "pool")]
    assert main(["train", "pool", "--views", "16", "--out", str(tmp_path / "pool"), "--device", "cpu"]) == 0
    vae = str(tmp_path / "vae")
    assert main(["train", "tiny-vae", *common, "--out", vae]) == 0
    clip = str(tmp_path / "clip")
    assert main(["train", "tiny-clip", *common, "--out", clip]) == 0
    assert main(["train", "tiny-clip", *common, "--out", clip, "--resume", clip]) == 0
    for name in ("tiny-flux", "tiny-sdxl"):
        out = str(tmp_path / name)
        assert main(["train", name, *common, "--vae", vae, "--distil-seconds", "0.5", "--out", out]) == 0
        pipe = DiffusionPipeline.from_pretrained(out)
        assert {part.dtype for part in pipe.components.values() if isinstance(part, nn.Module)} == {torch.float32}
        assert json.loads((tmp_path / name / "training.json").read_text())["log"]
    assert (
        main(["train", "evaluate", "--model-folder", out, "--device", "cpu", "--prompts", "1", "--guidance", "1"]) == 0
    )
    assert json.loads((tmp_path / name / "evaluation.json").read_text())[0]["n"] == 1
    capsys.readouterr()
    assert main(["train", "evaluate", "--model-folder", str(tmp_path), "--device", "cpu"]) == 2
    assert "no model_index.json" in capsys.readouterr().err
    assert main(["train", "tiny-vae", "--views", "1500", "--device", "cpu"]) == 2
    assert "1500 views: give a multiple of 1024" in capsys.readouterr().err
    assert main(["train", "tiny-vae", "--device", "gpu"]) == 2
    assert "device 'gpu' can't be used here" in capsys.readouterr().err
    assert main(["train", "tiny-flux", *common, "--vae", str(tmp_path / "nowhere")]) == 2
    assert "make one with `hires train tiny-vae`" in capsys.readouterr().err
    assert main(["train", "tiny-vea"]) == 2
    assert "did you mean 'tiny-vae'" in capsys.readouterr().err
