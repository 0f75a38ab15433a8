"""Bands of rows on several processes: put together they are the whole operation."""

import gluon_on_cpu
import hires_kernels
import pytest
import torch
import torch.distributed as dist
from hires_kernels import KernelError, band, hopper, seen_rows
from hires_kernels.backends import BACKENDS
from processes import in_processes

CASES = [  # grid, window, edges of the bands
    ((16, 8), (8, 4), (0, 8, 16)),
    ((24, 8), (8, 4), (0, 4, 16, 24)),  # a band of one row of patches, and one whose windows lie in it but at both ends
    ((14, 6), (6, 6), (0, 9, 14)),  # a shorter last patch
    ((11, 8), (7, 4), (0, 3, 9, 11)),  # odd window; the last band is a rest of two rows, which sees all three
    ((9, 3), (3, 3), (0, 4, 7, 9)),  # two rows of patches at an edge
]

LARGE = {"grid": (256, 128), "text": 256, "heads": 8, "dim": 128, "dtype": torch.bfloat16}  # what two GPUs share


def inputs(grid, batch=2, text=3, heads=2, dim=32, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def draw(tokens):
        shape = (batch, tokens, heads, dim)
        return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))

    tokens = grid[0] * grid[1]
    angle = torch.randn(tokens, dim // 2, generator=generator).repeat_interleave(2, 1).to(device)
    return draw(tokens), draw(text), (angle.cos(), angle.sin())


def own_part(image, rope, grid, window, edges, rank):
    """Query, key and value of a process's rows, and the rope of those that it sees."""
    share, width = band.shares(grid, window, edges)[rank], grid[1]
    own, seen = slice(share.first * width, share.last * width), slice(share.low * width, share.high * width)
    return [x[:, own] for x in image], tuple(x[seen] for x in rope)


def put_together(image, text, rope, grid, window, edges, backend):
    """All bands one after the other in one process, with rows of others cut out of the whole."""
    images, total, width = [], 0, grid[1]
    for rank, share in enumerate(band.shares(grid, window, edges)):
        own, own_rope = own_part(image, rope, grid, window, edges, rank)
        windows = [slice(patch.window * width, (patch.window + window[0]) * width) for patch in share.outer]
        fetched = [tuple(x[:, seen] for x in image[1:]) for seen in windows]
        found, later, part = band.attend(
            share,
            *own,
            text,
            own_rope,
            own[0].shape[-1] ** -0.5,
            BACKENDS[backend].module,
            lambda fetched=fetched: fetched,
        )
        for place, rows in later:
            found[place] = rows
        images.append(found)
        total = total + part
    return torch.cat(images, 1), total / -(-grid[0] // (window[0] // 2))


def whole(image, text, rope, grid, window, backend="reference"):
    return hires_kernels.neighborhood_patch_attention(
        *image, grid=grid, window=window, text=text, rope=rope, backend=backend
    )


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize(("grid", "window", "edges"), CASES)
def test_bands_make_the_whole(grid, window, edges, backend):
    image, text, rope = inputs(grid)
    found = put_together(image, text, rope, grid, window, edges, backend)
    for one, other in zip(found, whole(image, text, rope, grid, window), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_bands_of_the_gluon_kernel_make_the_whole(monkeypatch):
    kernels = gluon_on_cpu.interpret("hires_kernels.hopper.npa", monkeypatch, seed=0)
    monkeypatch.setattr("hires_kernels.hopper.npa.attend", kernels.attend)
    monkeypatch.setattr(band, "choose", lambda *_: hopper)
    monkeypatch.setattr(band, "EXCHANGING", 1)
    grid, window, edges = (24, 8), (8, 8), (0, 12, 24)
    image, text, rope = inputs(grid, batch=1, heads=1, dim=64, dtype=torch.float16)
    given = put_together(image, text, rope, grid, window, edges, "gluon")
    for one, other in zip(given, whole(image, text, rope, grid, window), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=4e-3)


def test_three_processes_exchange_what_they_need(tmp_path):
    parts = in_processes("bands_in_processes.py", 3, tmp_path, "cpu")
    for grid, window, _ in (case for case in CASES if len(case[2]) == 4):
        image, text, rope = inputs(grid)
        rows, text_rows = whole(image, text, rope, grid, window)
        found = [part[grid] for part in parts]
        torch.testing.assert_close(torch.cat([one for one, _ in found], 1), rows, rtol=0, atol=2e-5)
        for _, one in found:
            torch.testing.assert_close(one, text_rows, rtol=0, atol=2e-5)


def test_windows_at_an_inner_edge_are_not_moved_inwards():
    """What a band alone would have there: its last window, moved up, holds no row of the next band."""
    grid, window, edges = (16, 8), (8, 4), (0, 8, 16)
    share = band.shares(grid, window, edges)[0]
    assert [patch.start for patch in share.inner] == [0] and [patch.start for patch in share.outer] == [4]
    image, text, rope = inputs(grid)
    (query, key, value), own_rope = own_part(image, rope, grid, window, edges, 0)
    alone = whole((query, key, value), text, tuple(x[: 8 * 8] for x in own_rope), (8, 8), window)[0]
    right = whole(image, text, rope, grid, window)[0][:, : 8 * 8]
    assert (alone - right)[:, : 4 * 8].abs().max() < 2e-5 and (alone - right)[:, 4 * 8 :].abs().max() > 0.1


def test_rows_that_a_band_sees():
    assert seen_rows(16, 8, 0, 8) == (0, 10)
    assert seen_rows(16, 8, 8, 16) == (6, 16)
    assert seen_rows(18, 8, 16, 18) == (10, 18)  # the last window is moved inwards


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("edges", "rows", "message"),
    [
        ((0, 7), 8, "bands are whole patches of 2 rows"),
        ((0, 3, 8), 3, "bands are whole patches of 2 rows"),
        ((0, 8), 6, "query of 24 tokens: rows 0 … 7 need 8x4"),
    ],
)
def test_what_bands_must_be(edges, rows, message, one_process):
    image, text, rope = inputs((8, 4))
    with pytest.raises(KernelError, match=message):
        hires_kernels.band_attention(
            *(x[:, : rows * 4] for x in image), grid=(8, 4), window=(4, 4), edges=edges, text=text, rope=rope
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("edges", [(0, 32, 128), (0, 96, 128), (0, 64, 96, 128)])
def test_bands_make_the_whole_on_a_gpu(backend, edges):
    grid, window = (128, 96), (64, 64)
    image, text, rope = inputs(grid, text=256, heads=4, dim=128, dtype=torch.bfloat16, device="cuda")
    rows, text_rows = whole(image, text, rope, grid, window, backend)
    found = put_together(image, text, rope, grid, window, edges, backend)
    assert torch.equal(found[0], rows)  # the same tiles in the same order
    assert (found[1] - text_rows.float()).norm() < 0.01 * text_rows.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_exchange_what_they_need(tmp_path):
    parts = in_processes("bands_in_processes.py", 2, tmp_path, "cuda")
    image, text, rope = inputs(**LARGE, device="cuda")
    rows, text_rows = (x.cpu() for x in whole(image, text, rope, LARGE["grid"], (64, 64), "auto"))
    first, second = (part[LARGE["grid"]] for part in parts)
    assert torch.equal(torch.cat([first[0], second[0]], 1), rows)
    assert torch.equal(first[1], second[1])
    assert (first[1] - text_rows).float().norm() < 0.01 * text_rows.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_kernels_run_where_their_tensors_are(backend):
    """And not on the current GPU."""
    with torch.cuda.device(0):
        first, second = (
            whole(*inputs(**LARGE, device=device), LARGE["grid"], (64, 64), backend) for device in ("cuda:0", "cuda:1")
        )
    assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second))
