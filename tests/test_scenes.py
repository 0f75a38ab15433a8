"""The world, its captions, its pictures and its data set."""

import colorsys
from collections import Counter
from dataclasses import replace
from math import hypot

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from hires.errors import HiresError
from hires.scenes import (
    BACKGROUNDS,
    COLOURS,
    MATERIALS,
    SHAPES,
    SIZES,
    VOCABULARY,
    WHOLE,
    Camera,
    caption,
    close_up,
    random_camera,
    reference_image,
    render,
    scene,
    scene_ids,
    scene_of_url,
    split,
    view_of_url,
    write_parquet,
)
from hires.scenes.captions import COUNTS, PLURALS, in_view, visible_share
from hires.scenes.noise import lattice, value_noise
from hires.scenes.render import PIXELS_PER_PASS
from hires.scenes.world import PALETTES, REACH

MANY = [scene(i) for i in range(1500)]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(((a - b) ** 2).mean()))


def test_scene_follows_from_its_id_alone():
    assert scene(123456789) == scene(123456789)
    first = scene(0)
    # written down once: a change here changes every stored prompt and picture
    assert (first.background, first.seed, len(first.objects)) == ("sand", 108790771, 1)
    assert (first.objects[0].colour, first.objects[0].material, first.objects[0].shape) == (
        "teal",
        "knitted",
        "square",
    )


def test_world_covers_everything():
    objects = [o for s in MANY for o in s.objects]
    assert {o.colour for o in objects} == set(COLOURS) and len(COLOURS) == 8
    assert {o.shape for o in objects} == set(SHAPES) and len(SHAPES) == 6
    assert {o.material for o in objects} == set(MATERIALS) and len(MATERIALS) == 6
    assert {o.size for o in objects} == set(SIZES)
    assert {s.background for s in MANY} == set(BACKGROUNDS) and len(BACKGROUNDS) == 6
    counts = Counter(len(s.objects) for s in MANY)
    assert set(counts) == {1, 2, 3, 4, 5} and min(counts.values()) > 150


def hue(rgb: tuple[float, float, float]) -> float:
    return colorsys.rgb_to_hsv(*rgb)[0] * 360


def test_backgrounds_share_the_hues_of_objects():
    grounds = [hue(main) for options in PALETTES.values() for main, _, _ in options]
    apart = {
        name: min(abs((hue(rgb) - ground + 180) % 360 - 180) for ground in grounds) for name, rgb in COLOURS.items()
    }
    assert max(apart.values()) < 22, apart


def test_objects_stay_apart_and_inside():
    for s in MANY:
        for k, a in enumerate(s.objects):
            reach = REACH * a.radius
            assert a.radius >= 0.085
            assert min(a.x, a.y, 1 - a.x, 1 - a.y) > reach
            for b in s.objects[k + 1 :]:
                assert hypot(a.x - b.x, a.y - b.y) > 1.03 * (a.radius + b.radius)


def test_split_holds_out_one_in_ten():
    held = sum(split(i) == "held-out" for i in range(20_000))
    assert 1_850 < held < 2_150
    train, out = scene_ids("train", 50, start=7), scene_ids("held-out", 50)
    assert train[0] >= 7 and not set(train) & set(out) and len(set(out)) == 50
    with pytest.raises(HiresError, match="held-out"):
        scene_ids("test", 3)


def test_camera_stays_inside():
    rng = np.random.default_rng(0)
    for s in MANY[:200]:
        camera = random_camera(rng, s, close_up=bool(s.id % 2))
        half = 0.5 / camera.zoom
        assert 1 <= camera.zoom <= 8
        assert half - 1e-9 <= camera.x <= 1 - half + 1e-9 and half - 1e-9 <= camera.y <= 1 - half + 1e-9
    with pytest.raises(HiresError, match="outside the scene"):
        Camera(2.0, 0.9, 0.5)
    with pytest.raises(HiresError, match="zoom"):
        Camera(0.5, 0.5, 0.5)


def read_caption(text: str) -> Counter:
    """An independent reading of a caption: how many of each (colour, shape) it claims."""
    singular = {plural: shape for shape, plural in PLURALS.items()} | {shape: shape for shape in SHAPES}
    claimed: Counter = Counter()
    number, colour = 1, None
    for word in text.replace(",", " ").split():
        if word in ("a", "an"):
            number = 1
        elif word in COUNTS:
            number = 1 + COUNTS.index(word)
        elif word in COLOURS:
            colour = word
        elif word in singular:
            claimed[colour, singular[word]] += number
    return claimed


def test_captions_are_true_short_and_in_the_vocabulary():
    rng = np.random.default_rng(1)
    words, texts = set(), set()
    for s in MANY:
        for camera in (WHOLE, random_camera(rng, s, close_up=bool(s.id % 2))):
            text = caption(s, camera, rng)
            split_words = text.replace(",", "").split()
            assert 0 < len(split_words) <= 28 and text == text.lower()
            words |= set(split_words)
            texts.add(text)
            truth = Counter((o.colour, o.shape) for o, _ in in_view(s, camera))
            assert read_caption(text) == truth, text
    assert words <= set(VOCABULARY) and len(VOCABULARY) <= 120 and list(VOCABULARY) == sorted(VOCABULARY)
    assert set(VOCABULARY) - words == set()
    assert len(texts) > 2500
    assert caption(MANY[5]) == caption(scene(5))


@pytest.mark.parametrize(
    "word, sign, axis", [("left", -1, "x"), ("right", 1, "x"), ("above", -1, "y"), ("below", 1, "y")]
)
def test_relations_hold(word, sign, axis):
    checked = 0
    for s in MANY:
        text, kinds = caption(s), {(o.colour, o.shape, o.material) for o in s.objects}
        if f" {word} " not in text or len(kinds) != 2 or len({kind[:2] for kind in kinds}) != 2:
            continue
        first = next(iter(read_caption(text.split(f" {word} ")[0])))
        a = [getattr(o, axis) for o in s.objects if (o.colour, o.shape) == first]
        b = [getattr(o, axis) for o in s.objects if (o.colour, o.shape) != first]
        assert min(sign * (p - q) for p in a for q in b) > 0, text
        checked += 1
    assert checked > 20


def test_visible_share():
    item = next(o for s in MANY for o in s.objects if o.shape == "square" and o.radius > 0.15)
    assert visible_share(item, WHOLE) == 1
    half = min(max(item.x, 1 / 16), 15 / 16)
    middle = Camera(8.0, half, min(max(item.y, 1 / 16), 15 / 16))
    side = (1 / 8) ** 2
    assert visible_share(item, middle) == pytest.approx(side / (2 * (1.1 * item.radius) ** 2), rel=0.1)


def test_lattice_is_uniform_and_white():
    y, x = torch.meshgrid(torch.arange(-128, 128), torch.arange(-128, 128), indexing="ij")
    values = lattice(x.int(), y.int(), torch.tensor(77, dtype=torch.int32))
    assert abs(float(values.mean())) < 0.01 and float(values.var()) == pytest.approx(1 / 3, rel=0.02)
    spectrum = torch.fft.fft2(values).abs() ** 2 / values.numel() * 3
    assert float(spectrum.max()) < 20  # an exponential law's largest of 65,536


def test_noise_slopes_are_derivatives():
    x, y = torch.rand(2, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9 - 4
    seed = torch.tensor(5, dtype=torch.int32)
    _, dx, dy = value_noise(x, y, seed)
    h = 1e-5
    for step, slope in (((h, 0), dx), ((0, h), dy)):
        up = value_noise(x + step[0], y + step[1], seed)[0]
        down = value_noise(x - step[0], y - step[1], seed)[0]
        torch.testing.assert_close((up - down).double() / (2 * h), slope.double(), rtol=0, atol=2e-2)


def test_render_is_independent_of_batch_and_bands(monkeypatch):
    scenes = MANY[:6]
    together = render(scenes, 64, 96)
    assert together.shape == (6, 3, 64, 96) and together.min() >= 0 and together.max() <= 1
    alone = torch.cat([render([s], 64, 96) for s in scenes])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-3)
    monkeypatch.setitem(PIXELS_PER_PASS, "cpu", 96 * 10)
    torch.testing.assert_close(render(scenes, 64, 96), together, rtol=0, atol=2e-3)


@pytest.mark.gpu
def test_gpu_draws_the_same_picture():
    rng = np.random.default_rng(0)
    cameras = [random_camera(rng, s) for s in MANY[:48]]
    there = render(MANY[:48], 128, 128, cameras, device="cuda").cpu()
    assert min(psnr(a, b) for a, b in zip(there, render(MANY[:48], 128, 128, cameras))) > 40


@pytest.mark.parametrize("camera", [WHOLE, Camera(4.0, 0.4, 0.6)])
def test_every_size_shows_the_same_picture(camera):
    scenes, cameras = MANY[:8], [camera] * 8
    small = render(scenes, 128, 128, cameras)
    large = functional.interpolate(render(scenes, 512, 512, cameras), (128, 128), mode="area")
    scores = [psnr(a, b) for a, b in zip(small, large)]
    assert min(scores) > 22 and float(np.mean(scores)) > 28, scores


def test_a_zoomed_view_is_a_part_of_the_picture():
    whole, part = render(MANY[:3], 256, 256), render(MANY[:3], 128, 128, [Camera(2.0, 0.25, 0.75)] * 3)
    torch.testing.assert_close(part, whole[:, :, 128:, :128], rtol=0, atol=2e-3)


def high_band(images: torch.Tensor) -> float:
    """Mean power at ½–1 of the Nyquist frequency."""
    n = images.shape[-1]
    frequency = torch.fft.fftfreq(n)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt()
    grey = images.mean(1)
    power = torch.fft.fft2(grey - grey.mean((1, 2), keepdim=True)).abs() ** 2 / n**2
    return float(power[:, (radius > 0.25) & (radius <= 0.5)].mean())


@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_more_pixels_show_more_detail(side):
    picks = [next(s for s in MANY if s.background == b and len(s.objects) > 2) for b in BACKGROUNDS]
    if side == 2048:
        picks = picks[1::3]
    for s in picks:
        large = render([s], side, side)
        small = functional.interpolate(large, (side // 4, side // 4), mode="area")
        upsampled = functional.interpolate(small, (side, side), mode="bicubic")
        assert high_band(large) > 10 * high_band(upsampled), s.background


def test_shapes_keep_their_proportions_at_any_aspect():
    s = next(s for s in MANY if len(s.objects) == 1 and s.objects[0].shape == "disc")
    bare = render([replace(s, objects=())], 96, 192)
    y, x = ((render([s], 96, 192) - bare).abs().amax(1)[0] > 0.25).nonzero(as_tuple=True)
    assert float(x.max() - x.min()) == pytest.approx(2 * s.objects[0].radius * 96, abs=6)
    assert float(y.max() - y.min()) == pytest.approx(2 * s.objects[0].radius * 96, abs=6)


def test_render_refuses_bad_input():
    with pytest.raises(HiresError, match="at least 1 pixel"):
        render(MANY[:1], 0, 64)
    with pytest.raises(HiresError, match="one camera per scene"):
        render(MANY[:2], 64, 64, [WHOLE])
    with pytest.raises(HiresError, match="scene id"):
        scene(-1)


def test_parquet_has_laion_columns_and_leads_back_to_the_scenes(tmp_path):
    path = tmp_path / "scenes.parquet"
    ids = scene_ids("held-out", 20)
    write_parquet(path, ids, width=256, height=128)
    table = pq.read_table(path)
    assert table.column_names == [
        "URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE", "hash",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert [scene_of_url(row["URL"]) for row in rows] == ids
    assert [row["TEXT"] for row in rows] == [caption(scene(i)) for i in ids]
    assert {(row["WIDTH"], row["HEIGHT"]) for row in rows} == {(256, 128)}
    assert len({row["hash"] for row in rows}) == 20
    write_parquet(tmp_path / "again.parquet", ids, width=256, height=128)
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.parquet", "scenes.parquet"]
    assert reference_image(ids[0], 48, 64).size == (64, 48)
    for url in ("http://x", "scene://", "scene://-1", "scene://one"):
        with pytest.raises(HiresError, match="scene address"):
            scene_of_url(url)


def test_close_ups_have_rows_of_their_own(tmp_path):
    path, ids = tmp_path / "close.parquet", scene_ids("held-out", 8)
    write_parquet(path, ids, width=256, height=256, close_ups=True)
    for row, scene_id in zip(pq.read_table(path).to_pylist(), ids):
        camera = close_up(scene(scene_id))
        assert 2 <= camera.zoom <= 4
        assert view_of_url(row["URL"]) == (scene_id, camera)
        assert row["TEXT"] == caption(scene(scene_id), camera)
        assert in_view(scene(scene_id), camera)
    close, whole = (reference_image(ids[0], 64, 64, view) for view in (camera, WHOLE))
    assert close.tobytes() != whole.tobytes()
    assert view_of_url("scene://42") == (42, WHOLE)
    with pytest.raises(HiresError, match="no scene address"):
        view_of_url("scene://x?close-up")
