"""Size rule: bases, stages, refusals."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hires.errors import HiresError
from hires.sizes import base_size, check_multiple, nearest_sizes, parse_size, stage_sizes


@pytest.mark.parametrize(
    "target, base_resolution, multiple, expected",
    [
        ((4096, 4096), 1024, 64, [(1024, 1024), (2048, 2048), (4096, 4096)]),
        ((3072, 3072), 1024, 64, [(1024, 1024), (2048, 2048), (3072, 3072)]),
        ((1024, 4096), 1024, 64, [(512, 2048), (1024, 4096)]),
        ((4096, 1024), 1024, 64, [(2048, 512), (4096, 1024)]),
        ((2112, 3840), 1024, 64, [(704, 1280), (1408, 2560), (2112, 3840)]),
        ((1024, 1024), 1024, 64, [(1024, 1024)]),
        ((512, 512), 128, 32, [(128, 128), (256, 256), (512, 512)]),
        ((384, 384), 128, 32, [(128, 128), (256, 256), (384, 384)]),
        ((96, 160), 128, 32, [(96, 160)]),
        ((192, 320), 128, 32, [(96, 160), (192, 320)]),
        ((512, 384), 128, 32, [(128, 96), (256, 192), (512, 384)]),
    ],
)
def test_known_sizes(target, base_resolution, multiple, expected):
    assert stage_sizes(*target, base_resolution, multiple) == expected


def test_single_jump():
    assert stage_sizes(4096, 4096, 1024, 64, "single") == [(1024, 1024), (4096, 4096)]
    assert stage_sizes(1024, 1024, 1024, 64, "single") == [(1024, 1024)]


@pytest.mark.parametrize(
    "target, base_resolution, multiple, two",
    [
        ((2160, 3840), 1024, 64, ["2176x3840", "2112x3840"]),  # 4K television: 2160 is no multiple of 64
        ((4096, 4032), 1024, 64, ["4032x4032", "4096x4096"]),  # 64:63 has no base but itself
        ((100, 130), 128, 32, ["96x128", "128x128"]),
        ((1, 1), 128, 32, ["96x96", "64x128"]),
    ],
)
def test_refusal_names_two_nearest_allowed_sizes(target, base_resolution, multiple, two):
    with pytest.raises(HiresError) as error:
        stage_sizes(*target, base_resolution, multiple)
    message = str(error.value)
    assert "\n" not in message and all(size in message for size in (f"{target[0]}x{target[1]}", *two))
    for size in two:
        assert stage_sizes(*parse_size(size), base_resolution, multiple)


@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from(["doubling", "single"]))
def test_rule_holds_for_every_allowed_target(rows, columns, stages):
    height, width = 32 * rows, 32 * columns
    # Every base of the exact aspect on the 32 px raster, found by trying all sides.
    candidates = [
        (h, w)
        for h in range(32, height + 1, 32)
        for w in range(32, width + 1, 32)
        if Fraction(h, w) == Fraction(height, width)
    ]
    nearest = min(abs(h * w - 128**2) for h, w in candidates)
    allowed = any(abs(h * w - 128**2) == nearest and 128**2 / 2 <= h * w <= 2 * 128**2 for h, w in candidates)
    if not allowed:
        with pytest.raises(HiresError):
            stage_sizes(height, width, 128, 32, stages)
        return
    sizes = stage_sizes(height, width, 128, 32, stages)
    assert sizes[-1] == (height, width)
    assert abs(sizes[0][0] * sizes[0][1] - 128**2) == nearest
    assert all(h % 32 == w % 32 == 0 and Fraction(h, w) == Fraction(height, width) for h, w in sizes)
    factors = [Fraction(b[0], a[0]) for a, b in pairwise(sizes)]
    if stages == "doubling":
        assert all(f == 2 for f in factors[:-1]) and all(1 < f <= 2 for f in factors[-1:])
    else:
        assert len(sizes) <= 2


def test_nearest_sizes_reach_beyond_the_first_search():
    for size in nearest_sizes(32, 32 * 600, 128, 32):
        assert stage_sizes(*size, 128, 32)


@pytest.mark.parametrize(
    ("height", "width", "base", "multiple"), [(1, 3000, 16, 8), (2400, 8, 24, 16), (5, 2000, 8, 8)]
)
def test_nearest_sizes_of_extreme_aspects(height, width, base, multiple):
    """Beside every allowed size of a raster that is large enough."""
    side = 2 * max(height, width)
    allowed = [
        (h, w)
        for h in range(multiple, side, multiple)
        for w in range(multiple, side, multiple)
        if base_size(h, w, base, multiple)
    ]
    nearest = sorted(allowed, key=lambda size: ((size[0] - height) ** 2 + (size[1] - width) ** 2, size))[:2]
    assert list(nearest_sizes(height, width, base, multiple)) == nearest


def test_multiples():
    check_multiple(32, 640, 32)
    with pytest.raises(HiresError, match="96x128"):
        check_multiple(100, 130, 32)
    with pytest.raises(HiresError):
        check_multiple(0, 32, 32)


@pytest.mark.parametrize("text, size", [("512", (512, 512)), ("512x768", (512, 768)), ("96X160", (96, 160))])
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "512x", "a", "-512", "1x2x3", "0", "51.2"])
def test_parse_size_refuses(text):
    with pytest.raises(HiresError, match="HEIGHTxWIDTH"):
        parse_size(text)
