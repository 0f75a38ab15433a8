"""Seams, bands against true images, means over trials, protocols, and the closed form of FID's bootstrap."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFilter
from pydantic import ValidationError
from test_metrics import features_of, settings

from hires.attention import attention_layers
from hires.config import Config
from hires.errors import HiresError
from hires.metrics import (
    Clip,
    ClipFeatures,
    Crops,
    Features,
    Protocol,
    Source,
    distances,
    extract,
    patch_borders,
    per_image,
    score,
)
from hires.metrics.bootstrap import draw_prompts
from hires.metrics.pixels import View, line_steps
from hires.metrics.scores import frame, over_trials
from hires.metrics.seams import TOKEN, Borders, seams
from hires.models import build_clip, build_pipeline
from hires.scenes import WHOLE, caption, reference_image, scene, scene_ids

N, SIDE = 24, 256
BORDERS = patch_borders((SIDE, SIDE), (128, 128))


@pytest.fixture(scope="module")
def renders():
    return [reference_image(number, SIDE, SIDE) for number in scene_ids("held-out", N)]


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def seam_scores(images, borders=BORDERS):
    rows, columns = zip(*(line_steps(pixels(image) if not torch.is_tensor(image) else image) for image in images))
    return seams(torch.stack(rows), torch.stack(columns), borders)


def patched(image, level, rng, side=64):
    """The image with another brightness in each patch."""
    offsets = torch.from_numpy(rng.normal(0, level, (SIDE // side, SIDE // side)))
    offsets = offsets.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return (pixels(image) + offsets).clamp(0, 255).round().byte()


def test_steps_across_a_line_are_the_definition():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 6, 5), dtype=np.uint8))
    grey = image.numpy().astype(float).mean(0)
    rows = [np.mean([(grey[y, x] - grey[y - 1, x]) ** 2 for x in range(5)]) + 1 / 6 for y in range(1, 6)]
    columns = [np.mean([(grey[y, x] - grey[y, x - 1]) ** 2 for y in range(6)]) + 1 / 6 for x in range(1, 5)]
    found = line_steps(image)
    assert found[0].numpy() == pytest.approx(rows, rel=1e-5)
    assert found[1].numpy() == pytest.approx(columns, rel=1e-5)


def test_the_seam_score_is_a_ratio_of_pooled_energies():
    rows, columns = torch.ones(1, 31), torch.ones(1, 47)  # of an image of 32x48 with tokens of 16
    rows[0, 15], columns[0, 15], columns[0, 31] = 9.0, 3.0, 1.0
    borders = Borders(rows=(16,), columns=(16,), token=16)
    # borders: a line of 48 pixels with energy 9, one of 32 with 3; others: one of 32 with 1
    expected = np.log10((48 * 9 + 32 * 3) / 80)
    assert seams(rows, columns, borders) == pytest.approx([expected])
    assert seams(rows, columns, Borders((), ())) is None


def test_true_renders_have_no_seams_and_patches_of_another_brightness_have(renders):
    true = seam_scores(renders)
    assert abs(true.mean()) < 3 * true.std() / N**0.5
    rng = np.random.default_rng(0)
    rising = [seam_scores([patched(image, level, rng) for image in renders]).mean() for level in (4, 8, 16)]
    assert true.mean() + 0.05 < rising[0] < rising[1] < rising[2]
    grid = seam_scores([patched(image, 16, rng, side=16) for image in renders]).mean()
    assert abs(grid) < 0.1  # a grid on all tokens singles out no patch border


def test_borders_are_those_of_the_finest_windowed_layer():
    for name in ("tiny-flux", "tiny-sdxl"):
        pipe = build_pipeline(name)
        model = getattr(pipe, "transformer", None) or pipe.unet
        layers = attention_layers(model, (64, 96), (16, 24))  # 512x768, base 128x192
        finest = max(layers, key=lambda layer: layer.grid)
        assert finest.grid == (512 // TOKEN, 768 // TOKEN)
        rows, columns = (TOKEN * (side // 2) for side in finest.window)
        found = patch_borders((512, 768), (128, 192))
        assert found.rows == tuple(range(rows, 512, rows))
        assert found.columns == tuple(range(columns, 768, columns))


def test_borders_follow_scale_and_overlap():
    assert patch_borders((512, 512), (128, 128)).rows == (64, 128, 192, 256, 320, 384, 448)
    assert patch_borders((512, 512), (128, 128), scale=2).rows == (128, 256, 384)
    assert patch_borders((512, 512), (128, 128), overlap=0).rows == (128, 256, 384)
    assert patch_borders((512, 512), (128, 128), overlap=0.75).rows == tuple(range(32, 512, 32))
    assert patch_borders((512, 512), (128, 128), scale=4).rows == ()  # one window holds all
    assert patch_borders((128, 128), (128, 128)).rows == ()
    assert patch_borders((96, 416), (128, 128)).rows == ()  # lower than a window


@pytest.fixture(scope="module")
def extracted(renders):
    clip = Clip(*build_clip())
    ids = scene_ids("held-out", 12)
    prompts = [caption(scene(number)) for number in ids]
    some = renders[:12]

    def features(pictures):
        return features_of(pictures, prompts, ClipFeatures(clip), clip, ids, Crops(128, 2, 0))

    soft = [picture.filter(ImageFilter.GaussianBlur(2)) for picture in some]
    flipped = [picture.transpose(0) for picture in some]
    noisy = [patched(picture, 20, np.random.default_rng(1), side=2) for picture in some]
    return {
        "true": features(some),
        "soft": features(soft),
        "flipped": features(flipped),
        "noisy": features([_image(x) for x in noisy]),
    }


def _image(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def test_bands_against_the_true_image(extracted):
    def mean(name, metric):
        table = per_image(extracted[name], ["high_band", "low_band"], references=extracted["true"])
        return table.loc[table["metric"] == metric, "value"].mean()

    assert mean("true", "high_band") == 0
    assert mean("true", "low_band") == 0
    assert mean("soft", "high_band") < -0.5
    assert mean("noisy", "high_band") > 0.5
    assert mean("soft", "low_band") < 3  # smoothing keeps the layout
    assert mean("flipped", "low_band") > 3 * mean("soft", "low_band")
    assert abs(mean("flipped", "high_band")) < 1e-6


def test_seams_are_those_beyond_the_true_images_own(extracted, renders):
    table = per_image(extracted["flipped"], ["seams"], references=extracted["true"], borders=BORDERS)
    flipped = seam_scores([picture.transpose(0) for picture in renders[:12]])
    assert table["value"].to_numpy() == pytest.approx(flipped - seam_scores(renders[:12]))
    same = per_image(extracted["true"], ["seams"], references=extracted["true"], borders=BORDERS)
    assert (same["value"] == 0).all()


def test_images_without_a_reference_are_left_aside(extracted):
    few = extracted["true"].take(range(5))
    table = per_image(extracted["soft"], ["high_band", "clip", "seams"], references=few, borders=BORDERS)
    assert table.groupby("metric").size().to_dict() == {"clip": 12, "seams": 5, "high_band": 5}
    rows = frame(score(extracted["soft"], few, settings(scores=["high_band"]), table)).set_index("metric")
    whole = per_image(extracted["soft"].take(range(5)), ["high_band"], references=few)
    assert rows.loc["high_band", "value"] == pytest.approx(whole["value"].mean())
    assert rows.loc["high_band", "low"] <= rows.loc["high_band", "value"] <= rows.loc["high_band", "high"]


def test_trials_are_averaged_score_by_score(extracted):
    trials = [
        score(extracted[name], extracted["true"], settings(), per_image(extracted[name], ["clip", "count"]))
        for name in ("soft", "noisy")
    ]
    both = frame(over_trials(trials)).set_index("metric")
    single = [frame(trial).set_index("metric") for trial in trials]
    for metric in ("fid", "kid_patch", "clip"):
        assert both.loc[metric, "value"] == pytest.approx(np.mean([one.loc[metric, "value"] for one in single]))
        replicates = np.mean([one.loc[metric, "replicates"] for one in single], axis=0)
        assert both.loc[metric, "replicates"] == pytest.approx(replicates)
    assert (both["n"] == 24).all()
    assert both.loc["fid", "protocol"].startswith("mean over 2 seeds; ")
    assert both.loc["fid", "flag"] == single[0].loc["fid", "flag"]
    pd.testing.assert_frame_equal(frame(over_trials(trials[:1])), frame(trials[0]))


def test_replicates_of_fid_need_no_loop(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40 * 3, 8, generator=generator) * scale + 100 for scale in (1.0, 1.3))
    prompts, draws = torch.arange(40).repeat_interleave(3), draw_prompts(40, 6)
    expected = [distances.fid(x, y, w[prompts], w[prompts]) for w in draws.double()]
    assert distances.fid_replicates(x, y, prompts, prompts, draws).tolist() == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(distances, "MOMENTS", 0)  # as for Inception's 2048 dimensions
    assert distances.fid_replicates(x, y, prompts, prompts, draws).tolist() == pytest.approx(expected, rel=1e-12)


def test_kernel_sums_in_parts_are_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 6, generator=generator), torch.randn(20, 6, generator=generator)
    own, other, draws = torch.arange(30) % 10, torch.arange(20) % 10, draw_prompts(10, 5)
    whole = distances.kid_replicates(x, y, own, other, draws)
    monkeypatch.setattr(distances, "ROWS", 7)
    assert torch.allclose(distances.kid_replicates(x, y, own, other, draws), whole, rtol=1e-12)


def test_images_of_two_sizes_are_refused(renders):
    clip = Clip(*build_clip())
    with pytest.raises(HiresError, match="images of 192x192, 256x256: all must be of one size"):
        features_of([renders[0].resize((192, 192)), renders[1]], ["a", "b"], ClipFeatures(clip), clip)


@pytest.fixture(scope="module")
def protocols(renders):
    clip = Clip(*build_clip())
    network, ids = ClipFeatures(clip), scene_ids("held-out", 8)
    prompts = [caption(scene(number)) for number in ids]

    def features(pictures):
        sources = [Source(f"{i:02}", 0, picture) for i, picture in enumerate(pictures)]
        views = [(number, WHOLE) for number in ids]
        return extract(sources, prompts, network, clip, Crops(128, 4, 0), views, aliased=True)

    noisy = [_image(patched(picture, 20, np.random.default_rng(1), side=2)) for picture in renders[:8]]
    return features(renders[:8]), features(noisy), network, noisy


def test_scores_under_other_protocols_are_those_of_other_samples(protocols):
    true, noisy, network, pictures = protocols
    asked = settings(scores=["fid", "fid_aliased", "kid_patch", "kid_patch_3"], kid_subset_size=4)
    rows = frame(score(noisy, true, asked, per_image(noisy, asked.scores))).set_index("metric")
    few = asked.model_copy(update={"scores": ["kid_patch"]})
    three = [first_three(features) for features in (noisy, true)]
    expected = frame(score(*three, few, per_image(noisy, []))).set_index("metric")
    assert rows.loc["kid_patch_3", "value"] == pytest.approx(expected.loc["kid_patch", "value"])
    assert rows.loc["kid_patch", "value"] != rows.loc["kid_patch_3", "value"]
    assert rows.loc["fid", "value"] != rows.loc["fid_aliased", "value"]
    assert "bicubic not antialiased" in rows.loc["fid_aliased", "protocol"]
    assert "3 crops of 128 px" in rows.loc["kid_patch_3", "protocol"]
    assert "4 crops of 128 px" in rows.loc["kid_patch", "protocol"]
    plain = View(network.view.size, antialias=False)
    found = network(torch.stack([plain(pixels(picture)) for picture in pictures]))[0]
    assert torch.allclose(noisy.tensors["aliased_features"], found, atol=1e-5)


def first_three(features):
    """The same features as if only the first three crops had been cut."""
    tensors = dict(features.tensors)
    for name in ("crop_features", "crop_logits"):
        tensors[name] = tensors[name].unflatten(0, (len(features), -1))[:, :3].flatten(0, 1)
    crops = {"size": 128, "per_image": 3, "seed": 0}
    return Features(features.ids, features.seeds, tensors, {**features.metadata, "crops": crops})


def test_a_protocol_is_an_object(protocols):
    true, noisy, *_ = protocols
    whole, crops = (Protocol.of(samples, noisy, true) for samples in ("whole", "patch_3"))
    assert (whole.crop, whole.crops, whole.references) == (None, 1, 8)
    assert (crops.crop, crops.crops, crops.seed, crops.dimension) == (128, 3, 0, 128)
    assert whole != crops
    assert Protocol.of("whole", noisy, true) == whole


def test_three_crops_need_three():
    study = {"backbones": ["b"], "variants": ["direct"], "sizes": {"128x128": 1}}
    backbone = {"model": "tiny-flux", "base_resolution": 128, "size_multiple": 32}
    metrics = {"scores": ["fid_patch_3"], "patch": {"per_image": 2}}
    given = {"name": "few", "backbones": {"b": backbone}, "studies": {"s": study}, "metrics": metrics}
    with pytest.raises(ValidationError, match="scores of three crops need three or more"):
        Config.model_validate(given)
