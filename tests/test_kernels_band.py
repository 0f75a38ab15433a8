"""Bands of rows: put together they are the whole operation."""

import hires_kernels
import pytest
import torch
from hires_kernels import KernelError, band_attention, seen_rows


def inputs(grid, batch=1, text=3, heads=2, dim=32, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def draw(tokens):
        shape = (batch, tokens, heads, dim)
        return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))

    tokens = grid[0] * grid[1]
    angle = torch.randn(tokens, dim // 2, generator=generator).repeat_interleave(2, 1).to(device)
    return draw(tokens), draw(text), (angle.cos(), angle.sin())


def put_together(image, text, rope, grid, window, bands, backend):
    """Every band from the rows that it sees alone; text rows weighted by patches."""
    query, key, value = image
    width, side, images, total, count = grid[1], window[0] // 2, [], 0, 0
    for first, last in bands:
        low, high = seen_rows(grid[0], window[0], first, last)
        seen, own = slice(low * width, high * width), slice(first * width, last * width)
        found, text_rows = band_attention(
            query[:, own], key[:, seen], value[:, seen],
            grid=(high - low, width), window=window, first=first - low, text=text,
            rope=tuple(x[seen] for x in rope), backend=backend,
        )  # fmt: skip
        patches = -(-(last - first) // side)
        images.append(found)
        total, count = total + patches * text_rows.float(), count + patches
    return torch.cat(images, 1), total / count


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize(
    ("grid", "window", "bands"),
    [
        ((16, 8), (8, 4), [(0, 8), (8, 16)]),
        ((16, 8), (8, 4), [(0, 4), (4, 12), (12, 16)]),
        ((14, 6), (6, 6), [(0, 9), (9, 14)]),  # a shorter last patch
        ((11, 8), (7, 4), [(0, 3), (3, 9), (9, 11)]),  # odd window; the last band is a rest of two rows
    ],
)
def test_bands_make_the_whole(grid, window, bands, backend):
    image, text, rope = inputs(grid, batch=2)
    whole = hires_kernels.neighborhood_patch_attention(
        *image, grid=grid, window=window, text=text, rope=rope, backend="reference"
    )
    found = put_together(image, text, rope, grid, window, bands, backend)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_rows_that_a_band_sees():
    assert seen_rows(16, 8, 0, 8) == (0, 10)
    assert seen_rows(16, 8, 8, 16) == (6, 16)
    assert seen_rows(18, 8, 16, 18) == (10, 18)  # the last window is moved inwards


@pytest.mark.parametrize(("first", "rows"), [(0, 3), (6, 4), (3, 6)])
def test_bands_are_whole_patches(first, rows):
    (query, key, value), text, rope = inputs((8, 4))
    with pytest.raises(KernelError, match="whole patches of 2 rows"):
        band_attention(
            query[:, : rows * 4], key, value, grid=(8, 4), window=(4, 4), first=first, text=text, rope=rope
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_bands_make_the_whole_on_a_gpu(backend):
    grid, window = (128, 96), (64, 64)
    image, text, rope = inputs(grid, text=77, heads=4, dim=128, dtype=torch.bfloat16, device="cuda")
    whole = hires_kernels.neighborhood_patch_attention(
        *image, grid=grid, window=window, text=text, rope=rope, backend=backend
    )
    found = put_together(image, text, rope, grid, window, [(0, 32), (32, 128)], backend)
    assert torch.equal(found[0], whole[0])  # the same tiles in the same order
    assert (found[1] - whole[1].float()).norm() < 0.01 * whole[1].float().norm()
