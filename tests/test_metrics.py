"""FID, KID, IS and CLIP against torchmetrics; crops, spectra, objects, intervals, paired tests."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn
from torchmetrics.functional.multimodal import clip_iqa
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.multimodal import CLIPScore

from hires.analysis.tables import scores as scores_table
from hires.config import Metrics
from hires.errors import HiresError
from hires.metrics import (
    Borders,
    Clip,
    ClipFeatures,
    Crops,
    Features,
    Source,
    crops_of,
    distances,
    evaluate,
    extract,
    load_clip,
    load_features,
    paired,
    per_image,
    score,
)
from hires.metrics.bootstrap import draw_prompts, expanded_interval, interval
from hires.metrics.pixels import View, band_powers, crop_boxes
from hires.metrics.scores import ROW, ceiling, frame
from hires.models import build_clip
from hires.scenes import WHOLE, caption, reference_image, scene, scene_ids

N = 12


@pytest.fixture(scope="module")
def clip():
    return Clip(*build_clip())


@pytest.fixture(scope="module")
def network(clip):
    return ClipFeatures(clip)


@pytest.fixture(scope="module")
def scenes():
    return scene_ids("held-out", N)


@pytest.fixture(scope="module")
def prompts(scenes):
    return [caption(scene(number)) for number in scenes]


@pytest.fixture(scope="module")
def pictures(scenes):
    return [reference_image(number, 160, 192) for number in scenes]


def features_of(pictures, prompts, network, clip, scenes=None, crops=None, threads=1):
    sources = [Source(f"{i:02}", 0, picture) for i, picture in enumerate(pictures)]
    views = None if scenes is None else [(number, WHOLE) for number in scenes]
    return extract(sources, prompts, network, clip, crops or Crops(128, 3, 0), views, threads)


@pytest.fixture(scope="module")
def references(pictures, prompts, network, clip, scenes):
    return features_of(pictures, prompts, network, clip, scenes)


@pytest.fixture(scope="module")
def blurred(pictures, prompts, network, clip, scenes):
    return features_of([p.filter(ImageFilter.GaussianBlur(2)) for p in pictures], prompts, network, clip, scenes)


def settings(**fields):
    return Metrics(**{"kid_subset_size": 8, "kid_subsets": 5, "bootstrap": 50, **fields})


def random_images(n, seed, low=0, high=255):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(low, high, (n, 3, 8, 8), generator=generator).float()
    fine = torch.randint(-20, 20, (n, 3, 128, 128), generator=generator).float()
    return (nn.functional.interpolate(coarse, 128, mode="bilinear") + fine).clamp(0, 255).byte()


class Module(nn.Module):
    """One output of a feature network as the module that torchmetrics wants."""

    def __init__(self, network, output):
        super().__init__()
        self.network, self.output, self.num_features = network, output, 128

    def forward(self, images):
        with torch.inference_mode():
            return self.network(images)[self.output].double()


@pytest.mark.parametrize(("n", "m"), [(20, 30), (200, 150)])
def test_fid_is_that_of_torchmetrics(network, n, m):
    fake, real = random_images(n, 0), random_images(m, 1, high=200)
    metric = FrechetInceptionDistance(Module(network, 0)).set_dtype(torch.float64)
    metric.update(fake, real=False)
    metric.update(real, real=True)
    value = distances.fid(network(fake)[0], network(real)[0])
    assert value == pytest.approx(float(metric.compute()), rel=1e-6)


def test_fid_of_gaussians_is_the_closed_form():
    """Samples with exactly the wanted mean and diagonal covariance: Σ (μ₁ − μ₂)² + Σ (σ₁ − σ₂)²."""
    d = 5
    signs = torch.cat([torch.eye(d), -torch.eye(d)]).double() * ((2 * d - 1) / 2) ** 0.5
    first, second = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([2.0, 2, 1, 7, 5])
    expected = float((first - second).square().sum()) + d * 0.3**2
    assert distances.fid(signs * first, signs * second + 0.3) == pytest.approx(expected, rel=1e-6)


def test_weights_of_fid_count_copies():
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    copies = torch.tensor([0, 2, 1, 3, 0, 1, 1, 0, 1])
    expected = distances.fid(x.repeat_interleave(copies, 0), y)
    assert distances.fid(x, y, copies.double()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [15, 20])
def test_kid_is_that_of_torchmetrics(network, size):
    fake, real = random_images(20, 0), random_images(30, 1, high=200)
    metric = KernelInceptionDistance(Module(network, 0), subsets=7, subset_size=size)
    metric.update(fake, real=False)
    metric.update(real, real=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = [float(v) for v in metric.compute()]
    found = distances.kid(network(fake)[0], network(real)[0], size, 7, torch.Generator().manual_seed(3))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("splits", [1, 4])
def test_inception_score_is_that_of_torchmetrics(network, splits):
    images = random_images(22, 0)
    metric = InceptionScore(Module(network, 1), splits=splits)
    metric.update(images)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mean, spread = (float(v) for v in metric.compute())
    found = distances.inception_score(network(images)[1], splits, torch.Generator().manual_seed(3))
    assert found[0] == pytest.approx(mean, rel=1e-9)
    assert splits == 1 or found[1] == pytest.approx(spread, rel=1e-6)


@pytest.fixture
def pair(clip):
    """The tiny encoders as torchmetrics calls a model and its processor."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = clip.model.config
            self.model = clip.model

        def get_image_features(self, pixels):
            return self.model.get_image_features(pixels).pooler_output

        def get_text_features(self, tokens, mask):
            return self.model.get_text_features(tokens, mask).pooler_output

    def processor(text=None, images=None, return_tensors="pt", padding=True):
        if text is not None:
            return clip.tokenizer(text, return_tensors="pt", padding=True)
        return {"pixel_values": torch.stack(images).float() / 127.5 - 1}

    return Pair(), processor


def test_clip_score_is_that_of_torchmetrics(clip, network, pair):
    images, prompts = random_images(6, 0), ["a red disc on sand", "two blue stars"] * 3
    metric = CLIPScore(lambda: pair)
    metric.update(list(images), prompts)
    features = features_of([Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], prompts, network, clip)
    table = per_image(features, ["clip"])
    expected = metric.score / metric.n_samples  # compute() cuts at 0, where an untrained pair may well be
    assert table["value"].mean() == pytest.approx(float(expected), abs=1e-4)


def test_clip_iqa_is_that_of_torchmetrics(clip, network, pair):
    model, processor = pair
    images, name = random_images(6, 0), "openai/clip-vit-large-patch14"
    anchors = clip_iqa._clip_iqa_get_anchor_vectors(name, model, processor, ["Good photo.", "Bad photo."], "cpu")
    embedded = clip_iqa._clip_iqa_update(name, images, model, processor, 1.0, "cpu")
    expected = clip_iqa._clip_iqa_compute(embedded, anchors, ["quality"])
    pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images]
    photographs = Clip(clip.model, clip.tokenizer, photographs=True)
    features = features_of(pictures, ["a red disc"] * 6, network, photographs)
    table = per_image(features, ["clip_iqa"])
    assert table["value"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.std() > 1e-3
    (row,) = score(features, features, settings(scores=["clip_iqa"]), table)
    assert "'Good photo.' against 'Bad photo.'" in row.protocol and 0 < row.value < 1
    scenes_alone = features_of(pictures, ["a red disc"] * 6, network, clip)
    assert per_image(scenes_alone, ["clip_iqa"]).empty  # scenes are no photographs to the tiny encoders


def test_scores_leave_the_global_generator_alone(references, blurred):
    state = torch.random.get_rng_state()
    score(blurred, references, settings(), per_image(blurred, settings().scores))
    assert torch.equal(state, torch.random.get_rng_state())


def test_replicates_without_resampling_are_the_scores():
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randn(15, 6, dtype=torch.float64) + 0.2
    once = torch.ones(1, 15, dtype=torch.long)
    x_prompts, y_prompts = torch.arange(15).repeat_interleave(2), torch.arange(15)
    both = distances.kid_replicates(y, y + 1, y_prompts, y_prompts, once)
    exact, _ = distances.kid(y, y + 1, 15, 1, torch.Generator())
    assert float(both) == pytest.approx(exact, rel=1e-9)
    within = distances.kernel(x, x).fill_diagonal_(0).sum() / (30 * 29)
    other = distances.kernel(y, y).fill_diagonal_(0).sum() / (15 * 14)
    expected = within + other - 2 * distances.kernel(x, y).mean()
    assert float(distances.kid_replicates(x, y, x_prompts, y_prompts, once)) == pytest.approx(float(expected), rel=1e-9)
    value, _ = distances.inception_score(x, 1, torch.Generator())
    assert float(distances.inception_score_replicates(x, x_prompts, once)) == pytest.approx(value, rel=1e-9)


def test_kid_replicates_never_compare_an_image_with_its_copy():
    """Against the estimator written out over every pair of drawn samples of different origin."""
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    drawn = torch.tensor([2, 0, 1, 1, 1])
    rows = torch.arange(5).repeat_interleave(drawn).tolist()

    def mean(a, b, skip):
        k = distances.kernel(a, b)
        return np.mean([float(k[i, j]) for i in rows for j in rows if not (skip and i == j)])

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    found = distances.kid_replicates(x, y, torch.arange(5), torch.arange(5), drawn[None])
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_intervals_cover_the_truth():
    """Mean of 40 draws, 300 times: the 95 % interval holds the true mean about 95 times in a hundred."""
    rng, hits = np.random.default_rng(0), 0
    draws = draw_prompts(40, 400).numpy()
    for _ in range(300):
        low, high = interval(draws @ rng.exponential(size=40) / 40)
        hits += low <= 1 <= high
    assert 0.88 <= hits / 300 <= 0.98


def test_draws_are_shared_and_never_of_one_prompt():
    draws = draw_prompts(2, 500)
    assert torch.equal(draws, draw_prompts(2, 500))
    assert (draws == 1).all()
    assert (draw_prompts(9, 100).sum(1) == 9).all()


def test_crops_are_the_pixels_of_shared_boxes(pictures, prompts, network, clip, references, blurred):
    boxes = crop_boxes("03", 160, 192, 128, 3, seed=0)
    assert references.metadata["files"]["03-0"]["boxes"] == blurred.metadata["files"]["03-0"]["boxes"] == boxes
    assert boxes != crop_boxes("03", 160, 192, 128, 3, seed=1)
    assert boxes != crop_boxes("04", 160, 192, 128, 3, seed=0)
    top, left = boxes[1]
    crop = torch.from_numpy(np.array(pictures[3])[top : top + 128, left : left + 128]).permute(2, 0, 1)
    assert torch.allclose(references.tensors["crop_features"][3 * 3 + 1], network(crop[None])[0][0], atol=1e-5)


def test_crops_reach_every_border():
    boxes = np.array(crop_boxes("a", 130, 129, 128, 200, seed=0))
    assert set(boxes[:, 0]) == {0, 1, 2}
    assert set(boxes[:, 1]) == {0, 1}
    with pytest.raises(HiresError, match="smaller than a crop of 128 px"):
        crop_boxes("a", 127, 400, 128, 1, seed=0)


def test_crops_must_fit_the_network(pictures, prompts, network, clip):
    with pytest.raises(HiresError, match="tiny-clip takes crops of 128 px"):
        features_of(pictures, prompts, network, clip, crops=Crops(96, 3, 0))


def test_views():
    ramp = torch.arange(60).repeat(3, 40, 1).byte()
    assert View(None)(ramp) is ramp
    assert torch.equal(View(128)(random_images(1, 0)[0]), random_images(1, 0)[0].float())
    squashed, centre = View(20)(ramp)[0, 0], View(20, "centre")(ramp)[0, 0]
    assert (float(squashed[0]), float(squashed[-1])) == pytest.approx((1, 58), abs=0.6)
    assert (float(centre[0]), float(centre[-1])) == pytest.approx((10.5, 48.5), abs=0.6)


@pytest.mark.parametrize(("cycles", "band"), [(10, 0), (14, 0), (18, 1), (30, 1), (34, 2), (60, 2)])
def test_a_wave_lies_in_its_band_with_its_variance(cycles, band):
    wave = 100 + 40 * torch.sin(2 * torch.pi * cycles * torch.arange(128) / 128)
    powers = band_powers(wave.repeat(3, 128, 1))
    assert powers[band] == pytest.approx(np.log10(40**2 / 2), abs=0.01)
    assert (np.delete(powers, band) < -0.9).all()
    assert band_powers(wave.repeat(3, 128, 1).mT) == pytest.approx(powers, abs=1e-6)


def test_a_flat_image_has_a_finite_spectrum():
    assert band_powers(torch.full((3, 32, 48), 7, dtype=torch.uint8)) == pytest.approx(np.log10([1 / 12] * 3))


def test_objects_of_true_renders_are_all_there(references):
    table = per_image(references, settings().scores).groupby("metric")["value"].mean()
    assert (table["count"], table["colours"], table["repetition"]) == (1, 1, 0)


def test_extra_and_missing_objects(references):
    changed = references.take([0, 1])
    found = changed.tensors["true_objects"].clone()
    found[0, 3] += 2
    found[1, found[1].argmax()] = 0
    changed.tensors["objects"] = found
    table = per_image(changed, ["count", "colours", "repetition"]).set_index(["metric", "id"])["value"]
    assert table["count"].tolist() == [0, 0]
    assert table["colours"].tolist() == [1, 0]
    assert table["repetition"].tolist() == [2, 0]


def test_every_score_has_a_finite_tidy_row(references, blurred):
    manifest = pd.DataFrame({"id": blurred.ids, "seed": 0, "seconds": np.arange(N) + 1.0, "peak_bytes": range(N)})
    asked = settings()
    borders = Borders((64, 128), (64, 128))
    table = per_image(blurred, asked.scores, manifest, references, borders)
    rows = frame(score(blurred, references, asked, table), study="main")
    expected = {*asked.scores, "spectrum_low", "spectrum_mid", "spectrum_high"} - {"clip_iqa"}
    assert set(rows["metric"]) == expected
    assert len(rows) == len(expected)
    assert np.isfinite(rows[["value", "low", "high"]].to_numpy()).all()
    assert (rows["n"] == N).all()
    assert rows["protocol"].str.len().min() > 20
    values = rows.set_index("metric")["value"]
    assert values["seconds"] == 6.5
    assert values["peak_bytes"] == N - 1
    for row in rows.itertuples():
        assert row.low <= row.value <= row.high
        assert len(row.replicates) == 50


def test_small_n_is_flagged_and_undefined_scores_have_no_row(references, blurred):
    asked = settings(minimum_n=N, kid_subset_size=N + 1)
    rows = frame(score(blurred, references, asked, per_image(blurred, asked.scores))).set_index("metric")
    assert "kid" not in rows.index
    assert "kid_patch" in rows.index
    assert rows.loc["fid", "flag"] == f"{N} samples for 128 dimensions: biased upwards"
    assert rows.loc["is", "flag"] == ""
    short = asked.model_copy(update={"minimum_n": N + 1})
    rows = frame(score(blurred, references, short, per_image(blurred, asked.scores))).set_index("metric")
    assert rows.loc["is", "flag"] == f"n = {N}, below {N + 1}"
    assert rows.loc["count", "flag"] == ""
    usual = asked.model_copy(update={"minimum_n": None})
    rows = frame(score(blurred, references, usual, per_image(blurred, asked.scores))).set_index("metric")
    assert rows.loc["is", "flag"] == f"n = {N}, below 128"


def test_one_image_has_no_interval(references, blurred):
    one = blurred.take([4])
    rows = frame(score(one, references, settings(), per_image(one, settings().scores))).set_index("metric")
    assert "fid" not in rows.index
    assert "fid_patch" in rows.index
    assert rows["flag"].str.contains("one prompt: no interval").all()
    assert (rows["low"] == rows["high"]).all()
    two = blurred.take([4, 5])
    rows = frame(score(two, references, settings(), per_image(two, settings().scores))).set_index("metric")
    assert rows["flag"].str.contains("two prompts: no interval").all() and "fid" in rows.index
    assert (rows["low"] == rows["high"]).all()


def test_blur_is_seen(references, blurred):
    def values(features):
        found = score(features, references, settings(), per_image(features, settings().scores))
        return {s.metric: s.value for s in found}

    true, soft = values(references), values(blurred)
    assert true["spectrum"] == 0
    assert true["fid"] == pytest.approx(0, abs=1e-6)
    assert soft["spectrum"] > 0.5
    assert soft["spectrum_high"] < true["spectrum_high"] - 0.5
    assert soft["fid_patch"] > true["fid_patch"] + 1e-3


def test_missing_references_are_left_out(references, blurred):
    some = references.take([i for i in range(N) if i != 5])
    rows = frame(score(blurred, some, settings(), per_image(blurred, settings().scores))).set_index("metric")
    assert "12 against 11 images" in rows.loc["fid", "protocol"]
    keep = [i for i in range(N) if i != 5]
    expected = distances.fid(blurred.tensors["features"], references.tensors["features"][keep])
    assert rows.loc["fid", "value"] == pytest.approx(expected)


def test_some_images_keep_their_own_crops(references):
    rows = [7, 2]
    crops = references.take(rows).tensors["crop_features"].view(2, 3, -1)
    assert torch.equal(crops, references.tensors["crop_features"].view(N, 3, -1)[rows])


def test_several_seeds_are_resampled_by_prompt(references, blurred):
    """Two equal images a prompt carry the information of one: the interval must not shrink."""
    twice = blurred.take([*range(N), *range(N)])
    narrow = frame(score(blurred, references, settings(), per_image(blurred, ["clip"]))).set_index("metric")
    wide = frame(score(twice, references, settings(), per_image(twice, ["clip"]))).set_index("metric")
    assert wide.loc["clip", ["low", "high"]].tolist() == pytest.approx(narrow.loc["clip", ["low", "high"]].tolist())
    assert wide.loc["clip", "n"] == 2 * N


def test_references_show_what_can_be_reached(references):
    rows = frame(ceiling(references, settings())).set_index("metric")
    assert rows.loc["count", "value"] == 1
    assert rows.loc["spectrum", "value"] == 0
    x = references.tensors["features"]
    assert rows.loc["fid", "value"] == pytest.approx(distances.fid(x[::2], x[1::2]))
    assert rows.loc["fid", "n"] == N // 2
    assert "kid" in rows.index


def test_paired_differences_are_those_of_the_images(references, blurred):
    """A shift common to all images: no spread between pairs, however wide each interval is."""
    shifted = blurred.take(range(N))
    table = per_image(blurred, ["spectrum"])
    other = table.assign(value=table["value"] + 0.25)
    names = {"study": "main", "setting": "default", "backbone": "b", "height": 160, "width": 192}
    a = frame(score(blurred, references, settings(scores=["spectrum"]), table), variant="a", **names)
    b = frame(score(shifted, references, settings(scores=["spectrum"]), other), variant="b", **names)
    tests = paired(pd.concat([b, a])).set_index("metric").loc["spectrum_mid"]
    assert (tests["a"], tests["b"], tests["n"]) == ("b", "a", N)
    assert [tests["difference"], tests["low"], tests["high"]] == pytest.approx([0.25] * 3)
    single = a.set_index("metric").loc["spectrum_mid"]
    assert single["high"] - single["low"] > 0.01


def test_settings_are_averaged_image_by_image(references, blurred):
    """The mean over two settings has the value and interval of the per-image means; without all settings, none."""
    table = per_image(blurred, ["spectrum"])
    names = {"study": "tau", "backbone": "b", "height": 160, "width": 192}
    bumps = [np.linspace(0, scale, len(table)) for scale in (0.2, 0.6)]

    def rows(variant, setting, bump):
        made = score(blurred, references, settings(scores=["spectrum"]), table.assign(value=table["value"] + bump))
        return frame(made, variant=variant, setting=setting, **names)

    sweep = [rows("a", name, bump) for name, bump in zip(("x", "y"), bumps)] + [rows("b", s, 0.0) for s in ("x", "y")]
    found = paired(pd.concat(sweep)).set_index(["setting", "metric"]).sort_index()
    averaged = paired(pd.concat([rows("a", "z", (bumps[0] + bumps[1]) / 2), rows("b", "z", 0.0)])).set_index("metric")
    for metric in ("spectrum_low", "spectrum_mid", "spectrum_high"):
        expected = averaged.loc[metric]
        mean = found.loc[("mean", metric)]
        for column in ("difference", "low", "high"):
            assert mean[column] == pytest.approx(expected[column])
        assert expected["low"] < expected["high"]
    assert set(paired(pd.concat(sweep[:3]))["setting"]) == {"x", "between"}


def test_settings_of_a_variant_are_compared_on_the_same_resamples(references, blurred):
    """Differences and intervals are those of a bootstrap by hand, over the images' own differences."""
    table = per_image(blurred, ["spectrum"])
    names = {"study": "ablation", "backbone": "b", "height": 160, "width": 192}
    bumps = {"x": np.linspace(0, 0.3, len(table)), "y": np.cos(np.arange(len(table))), "z": 0.0}

    def rows(variant, setting, bump):
        made = score(blurred, references, settings(scores=["spectrum"]), table.assign(value=table["value"] + bump))
        return frame(made, variant=variant, setting=setting, **names)

    made = pd.concat([rows(variant, setting, bump) for variant in "ab" for setting, bump in bumps.items()])
    found = paired(made)
    found = found[found["setting"] == "between"].set_index(["a", "b", "metric"]).sort_index()
    pairs = {(f"{variant}, {one}", f"{variant}, {two}") for variant in "ab" for one, two in ("xy", "xz", "yz")}
    assert set(found.index.droplevel("metric")) == pairs
    shift = pd.Series(bumps["x"] - bumps["y"], index=table.index)[table["metric"] == "spectrum_mid"].to_numpy()
    rng = np.random.default_rng([0, N])
    means = [np.mean(np.repeat(shift, rng.multinomial(N, [1 / N] * N))) for _ in range(50)]
    for variant in "ab":
        row = found.loc[(f"{variant}, x", f"{variant}, y", "spectrum_mid")]
        assert row["difference"] == pytest.approx(shift.mean())
        assert [row["low"], row["high"]] == pytest.approx(expanded_interval(np.array(means), N))
        assert row["n"] == N
    alone = paired(made[made["setting"] == "x"])
    assert set(alone["setting"]) == {"x"}


def test_paired_fid_resamples_both_sides_together(references, blurred):
    names = {"study": "main", "setting": "default", "backbone": "b", "height": 160, "width": 192}
    asked = settings(scores=["fid", "kid"])
    empty = per_image(blurred, [])
    rows = [frame(score(f, references, asked, empty), variant=v, **names) for f, v in ((blurred, "a"), (blurred, "b"))]
    assert (paired(pd.concat(rows))[["difference", "low", "high"]] == 0).all(axis=None)


def test_features_survive_storage_byte_for_byte(tmp_path, references, pictures, prompts, network, clip, scenes):
    references.save(tmp_path / "a.safetensors")
    features_of(pictures, prompts, network, clip, scenes, threads=3).save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    back = Features.load(tmp_path / "a.safetensors")
    assert back.ids == references.ids
    assert back.metadata["files"]["03-0"]["sha256"] == references.metadata["files"]["03-0"]["sha256"]
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in references.tensors.items())
    with pytest.raises(HiresError, match="extract the features first"):
        Features.load(tmp_path / "c.safetensors")


def test_broken_files_are_one_line(tmp_path, network, clip):
    whole = tmp_path / "whole.png"
    Image.new("RGB", (128, 128), "red").save(whole)
    broken = tmp_path / "broken.png"
    broken.write_bytes(whole.read_bytes()[:-40])
    for source in (Source("a", 0, broken), Source("a", 0, tmp_path / "none.png"), Source("a", 0, whole, "0" * 64)):
        with pytest.raises(HiresError) as error:
            extract([source], ["a red disc"], network, clip)
        assert str(source.image) in str(error.value)
        assert "\n" not in str(error.value)


def test_long_prompts_are_cut_and_counted(clip, network):
    picture = Image.new("RGB", (128, 128), "red")
    features = features_of([picture] * 3, ["a red disc", "red " * 90, "red " * 95], network, clip)
    assert features.tensors["cut"].tolist() == [False, True, True]
    assert torch.equal(features.tensors["clip_text"][1], features.tensors["clip_text"][2])
    rows = frame(score(features, features, settings(scores=["clip"]), per_image(features, ["clip"])))
    assert f"2 of 3 prompts cut at {clip.length} tokens" in rows["protocol"][0]


def test_tables_say_how_many_references_survive(references, blurred):
    asked = settings(scores=["fid", "clip"])
    place = {"study": "main", "setting": "default", "trial": "all", "backbone": "b", "variant": "npa"}
    for kept, told in ((range(N), str(N)), (range(3, N), f"{N} ({N - 3} references)")):
        found = score(blurred, references.take(kept), asked, per_image(blurred, asked.scores))
        shown = scores_table(frame(found, **place, height=160, width=192))
        assert shown["n"].tolist() == [told]


def test_real_prompts_have_no_counts(pictures, prompts, network, clip):
    features = features_of(pictures, prompts, network, clip, scenes=None)
    found = score(features, features, settings(), per_image(features, settings().scores))
    names = {s.metric for s in found}
    assert not names & {"count", "colours", "repetition", "spectrum"}
    assert "spectrum_high" in names


def test_crops_are_cut_only_when_asked_for():
    assert crops_of(settings()) == Crops(128, 10, 0)
    assert crops_of(settings(scores=["fid", "clip"])) is None


def test_inception_needs_its_extra():
    with pytest.raises(HiresError, match=r"\[paper\]"):
        load_features("inception")


def test_a_missing_pair_of_encoders_is_named(tmp_path):
    with pytest.raises(HiresError, match=r"metrics\.clip"):
        load_clip(str(tmp_path))


@pytest.fixture
def assets(tmp_path, monkeypatch, clip):
    """An untrained tiny-clip where the trained one lies."""
    clip.model.save_pretrained(tmp_path / "tiny-clip")
    clip.tokenizer.save_pretrained(tmp_path / "tiny-clip")
    monkeypatch.setattr("hires.models.ASSETS", tmp_path)
    load_clip.cache_clear()
    load_features.cache_clear()
    yield tmp_path
    load_clip.cache_clear()
    load_features.cache_clear()


@pytest.mark.parametrize(
    "settings, message",
    [({"featuers": "x"}, "did you mean 'features'"), ({"patch": {"size": 0}}, "metrics setting patch.size = 0: ")],
)
def test_evaluate_refuses_wrong_settings_in_a_line(settings, message):
    image = Image.new("RGB", (128, 128))
    with pytest.raises(HiresError, match=message) as refused:
        evaluate([image], [image], ["a cone"], **settings)
    assert "\n" not in str(refused.value)


def test_evaluate(assets, pictures, prompts, scenes, references):
    soft = [p.filter(ImageFilter.GaussianBlur(2)) for p in pictures]
    rows = evaluate(soft, pictures, prompts, scenes, bootstrap=20, patch={"per_image": 3})
    assert list(rows.columns) == ROW
    values = rows.set_index("metric")["value"]
    assert {"fid", "kid", "is", "clip", "fid_patch", "kid_patch", "is_patch", "count", "spectrum"} <= set(values.index)
    assert values["spectrum"] > 0.5
    again = evaluate(soft, pictures, prompts, scenes, bootstrap=20, patch={"per_image": 3})
    pd.testing.assert_frame_equal(rows, again, check_exact=True)
    with pytest.raises(HiresError, match="12 images, 11 references"):
        evaluate(soft, pictures[:-1], prompts)
