"""The trained tiny-clip as a judge of images: what is worse scores worse."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from hires.metrics import Crops, Source, distances, extract, load_clip, load_features
from hires.scenes import caption, reference_image, scene, scene_ids

N = 40


@pytest.fixture(scope="module")
def world():
    ids = scene_ids("held-out", N)
    return ids, [caption(scene(number)) for number in ids], [reference_image(number, 512, 512) for number in ids]


def features_of(pictures, prompts):
    sources = [Source(str(i), 0, picture) for i, picture in enumerate(pictures)]
    return extract(sources, prompts, load_features("tiny-clip"), load_clip("tiny-clip"), Crops(128, 2, 0))


@pytest.fixture(scope="module")
def true(world):
    return features_of(world[2], world[1])


def blur(picture, level):
    return picture.filter(ImageFilter.GaussianBlur(level))


def noise(picture, level):
    grain = np.random.default_rng(0).normal(0, 6 * level, (picture.height, picture.width, 3))
    return Image.fromarray((np.array(picture) + grain).clip(0, 255).astype(np.uint8))


def upsample(picture, level):
    """As if rendered at 1 / 2^level of the side and enlarged."""
    side = picture.width >> level
    return picture.resize((side, side), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("degrade", "levels"), [(blur, (0, 0.7, 1.5, 3)), (noise, (0, 1, 2)), (upsample, (0, 1, 2))])
def test_patch_distances_rise_with_damage(world, true, degrade, levels):
    """KID and FID of crops of every second image against crops of the others, undamaged."""
    _, prompts, pictures = world
    real = true.take(range(1, N, 2)).tensors["crop_features"]
    kid, fid = [], []
    for level in levels:
        damaged = [degrade(p, level) if level else p for p in pictures[::2]]
        fake = features_of(damaged, prompts[::2]).tensors["crop_features"]
        kid.append(distances.kid(fake, real, len(fake), 1, torch.Generator())[0])
        fid.append(distances.fid(fake, real))
    assert kid == sorted(kid)
    assert fid == sorted(fid)


def test_captions_find_their_images():
    """Of 100 held-out captions the nearest to an image is its own for at least 80, and the other way round."""
    ids = scene_ids("held-out", 100, start=5000)
    pictures = [reference_image(number, 128, 128) for number in ids]
    tensors = features_of(pictures, [caption(scene(number)) for number in ids]).tensors
    image, text = (torch.nn.functional.normalize(tensors[f"clip_{side}"], dim=1) for side in ("image", "text"))
    similarity = image @ text.T
    for axis in (0, 1):
        assert (similarity.argmax(axis) == torch.arange(100)).float().mean() >= 0.8


def test_clip_score_falls_when_prompts_are_shuffled(true):
    image, text = true.tensors["clip_image"], true.tensors["clip_text"]
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(image, text).mean() > cosine(image, text.roll(1, 0)).mean() + 0.2


def test_classes_are_told_apart(true):
    """IS of crops: the mean is far from that of one class, so zero-shot logits carry what is in view."""
    assert distances.inception_score(true.tensors["crop_logits"], 1, torch.Generator())[0] > 3
