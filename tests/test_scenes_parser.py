"""The parser against the truth, on clean and on damaged pictures."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from hires.errors import HiresError
from hires.scenes import parse, parse_batch, render, scene, scene_ids

SCENES = [scene(i) for i in scene_ids("held-out", 160)]


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return render(SCENES, 128, 128)


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = int(4 * sigma)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = functional.pad(images, (reach,) * 4, mode="replicate")
    padded = functional.conv2d(padded, kernel[:, :, :, None], groups=3)
    return functional.conv2d(padded, kernel[:, :, None], groups=3)


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    return (images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return functional.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def accuracy(images: torch.Tensor, scenes=SCENES) -> tuple[float, float]:
    """Shares of pictures with the right count and with the right colours."""
    readings = parse_batch(images)
    counts = [r.count == len(s.objects) for r, s in zip(readings, scenes)]
    colours = [r.colours == Counter(o.colour for o in s.objects) for r, s in zip(readings, scenes)]
    return float(np.mean(counts)), float(np.mean(colours))


def test_true_renders_at_128(pictures):
    assert min(accuracy(pictures)) >= 0.98


def test_true_renders_at_512():
    scenes = SCENES[:50]
    pictures = torch.cat([render([s], 512, 512) for s in scenes])
    assert min(accuracy(pictures, scenes)) >= 0.98


def test_other_aspect_ratios():
    assert min(accuracy(render(SCENES[:80], 96, 176), SCENES[:80])) >= 0.98


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda x: noisy(blur(x, 1.0), 0.03), id="blur-and-noise"),
        pytest.param(lambda x: noisy(resized(resized(x, 85, 85), 128, 128), 0.02), id="lost-octave"),
        pytest.param(lambda x: resized(x, 512, 512), id="upsampled"),
        pytest.param(lambda x: (x * 255).round().to(torch.uint8), id="8-bit"),
    ],
)
def test_damaged_pictures(pictures, damage):
    assert min(accuracy(damage(pictures))) >= 0.95


def test_repeated_objects_are_counted_where_they_are(pictures):
    """Two pictures side by side hold the objects of both: what repetition looks like."""
    pair = torch.cat([pictures[0], pictures[1]], dim=2)
    reading = parse(pair)
    assert reading.count == len(SCENES[0].objects) + len(SCENES[1].objects)
    left = sorted((2 * o.x, o.y) for o in reading.objects if o.x < 0.5)
    truth = sorted((o.x, o.y) for o in SCENES[0].objects)
    np.testing.assert_allclose(left, truth, atol=0.04)


def test_small_repeats_count_and_specks_do_not():
    ground = render([scene(i) for i in range(40) if scene(i).background == "snow"][:1], 128, 128)[0]
    before = parse(ground).count
    for side, extra in ((2, 0), (7, 1)):
        picture = ground.clone()
        picture[:, 100 : 100 + side, 60 : 60 + side] = torch.tensor([0.1, 0.29, 0.88])[:, None, None]
        assert parse(picture).count == before + extra


def test_touching_objects_of_two_colours_are_two():
    picture = torch.full((3, 128, 128), 0.6)
    for left, colour in ((40, (0.84, 0.10, 0.10)), (60, (0.10, 0.29, 0.88))):
        picture[:, 50:70, left : left + 20] = torch.tensor(colour)[:, None, None]
    assert parse(picture).colours == {"red": 1, "blue": 1}


def test_kinds_of_input(pictures):
    as_bytes = (pictures[3] * 255).round().to(torch.uint8)
    as_image = Image.fromarray(as_bytes.permute(1, 2, 0).numpy())
    assert parse(as_bytes).objects == parse(as_image).objects
    assert parse(torch.full((3, 128, 128), 0.5)).count == 0
    with pytest.raises(HiresError, match="RGB"):
        parse(pictures[:1])
