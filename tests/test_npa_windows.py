"""NPA with windows of another size and overlap than the papers': operation, processors, cascade, arithmetic."""

import hires_kernels
import pytest
import torch
from hires_kernels import KernelError, flops
from torch.utils.flop_counter import FlopCounterMode

from hires.attention import attention_layers, draw_shifts, use_attention
from hires.attention.layers import scaled
from hires.errors import HiresError
from hires.models import build_pipeline
from hires.sizes import patch_side, scaled_window

GRID, WINDOW = (12, 9), (6, 4)


def seen(length, window, side):
    """Boolean (queries, keys) of one axis, written out."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        first = query // side * side - (window - side) // 2
        first = min(max(first, 0), length - window)
        mask[query, first : first + window] = True
    return mask


@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("patch", [(6, 4), (5, 3), (2, 1), (1, 4)])
def test_patches_of_any_side_see_the_window_around_them(patch, backend):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 12 * 9, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.einsum("ac,bd->abcd", *(seen(*axis).int() for axis in zip(GRID, WINDOW, patch))).bool()
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key) * 8**-0.5
    scores = scores.masked_fill(~mask.reshape(108, 108), float("-inf"))
    expected = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), value)
    found, _ = hires_kernels.neighborhood_patch_attention(
        query, key, value, grid=GRID, window=WINDOW, patch=patch, backend=backend
    )
    assert (found - expected).abs().max() < 1e-12


def test_backends_agree_with_text_and_shifts():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 108, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    text = tuple(torch.randn(2, 3, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    options = {"grid": GRID, "window": WINDOW, "patch": (5, 3), "text": text, "shift": torch.tensor([[0, 3], [5, 1]])}
    both = [
        hires_kernels.neighborhood_patch_attention(query, key, value, **options, backend=name)
        for name in ("reference", "sdpa")
    ]
    for reference, found in zip(*both):
        assert (reference - found).abs().max() < 1e-12


def test_other_patches_are_refused_where_they_cannot_run():
    x = torch.zeros(1, 108, 1, 32)
    with pytest.raises(KernelError, match=r"flex.*half the window's side"):
        hires_kernels.neighborhood_patch_attention(x, x, x, grid=GRID, window=WINDOW, patch=2, backend="flex")
    with pytest.raises(KernelError, match="patch 7x7: sides must be 1 … the window's, 6x4"):
        hires_kernels.neighborhood_patch_attention(x, x, x, grid=GRID, window=WINDOW, patch=7)
    half, plain = (
        hires_kernels.neighborhood_patch_attention(x, x, x, grid=GRID, window=WINDOW, **options)
        for options in ({"patch": (3, 2)}, {})
    )
    assert torch.equal(half[0], plain[0])


def test_the_papers_sides_are_the_default():
    for window in range(2, 20):
        assert patch_side(window, 0.5) == window // 2
        assert scaled_window(window, 40, 1.0) == window
    assert [patch_side(8, overlap) for overlap in (0, 0.25, 0.75, 0.9)] == [8, 6, 2, 1]
    assert [scaled_window(8, 32, scale) for scale in (0.5, 1.5, 2, 9)] == [4, 12, 16, 32]


@pytest.fixture(scope="module")
def transformer():
    return build_pipeline("tiny-flux").transformer.eval()


def test_layers_get_the_scaled_windows(transformer):
    with use_attention(transformer, "npa", (32, 48), (16, 16), window_scale=0.5, window_overlap=0.0) as handle:
        processors = [transformer.get_submodule(layer.name).processor for layer in handle.layers]
        assert {p.operation.layer.window for p in processors} == {(4, 4)}
        assert {p.operation.patch for p in processors} == {(4, 4)}
    with use_attention(transformer, "npa", (32, 48), (16, 16), window_scale=4.0) as handle:
        processor = transformer.get_submodule(handle.layers[0].name).processor
        assert not hasattr(processor, "operation")  # a window as large as the grid is the model's own attention
    with pytest.raises(HiresError, match="at least 2 tokens"):
        use_attention(transformer, "npa", (32, 48), (16, 16), window_scale=0.1).__enter__()


def test_shifts_reach_the_side_of_a_patch(transformer):
    layers = scaled(attention_layers(transformer, (64, 64), (16, 16)), 2.0)
    generators = [torch.Generator().manual_seed(0)]
    assert draw_shifts(generators, 60, layers, overlap=0.75).max() == 4
    assert draw_shifts(generators, 60, layers).max() == 8


def test_arithmetic_counts_the_patches():
    tables = {"batch": 1, "heads": 2, "head_dim": 8, "text": 3}
    image, text = flops.neighborhood_patch_attention(GRID, WINDOW, **tables, patch=(6, 4))
    assert (image, text) == (64 * 108 * 27, 64 * 2 * 3 * 3 * 27)
    assert flops.neighborhood_patch_attention(GRID, WINDOW, **tables)[1] == 64 * 4 * 5 * 3 * 27
    hires_kernels.register_flop_formulas()
    x, words = torch.zeros(1, 108, 2, 8), torch.zeros(1, 3, 2, 8)
    with FlopCounterMode(display=False) as counter:
        hires_kernels.neighborhood_patch_attention(
            x, x, x, grid=GRID, window=WINDOW, patch=(6, 4), text=(words, words, words), backend="reference"
        )
    assert counter.get_total_flops() == image + text
