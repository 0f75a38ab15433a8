"""hires_kernels.watch: what ran, and how it was launched."""

import pytest
import torch
from hires_kernels import local_attention, neighborhood_patch_attention, watch


def tokens(grid, head_dim=32):
    return [torch.randn(1, grid[0] * grid[1], 2, head_dim) for _ in range(3)]


def test_backends_are_noted_once_and_only_while_someone_watches():
    grid, image = (8, 8), tokens((8, 8))
    with watch() as ran:
        for backend in ("sdpa", "reference", "sdpa"):
            neighborhood_patch_attention(*image, grid=grid, window=(4, 4), backend=backend)
        with watch() as inner:
            local_attention(*image, grid=grid, radius=1)
    neighborhood_patch_attention(*image, grid=grid, window=(4, 4), backend="reference")
    assert ran.operations == {"neighborhood_patch_attention": ["sdpa", "reference"], "local_attention": ["sdpa"]}
    assert inner.operations == {"local_attention": ["sdpa"]}
    assert ran.launches == inner.launches == []
    assert str(inner) == "Ran(operations={'local_attention': ['sdpa']}, launches=[])"


def test_fused_kernels_say_how_they_were_launched():
    grid, image = (8, 8), tokens((8, 8))
    with watch() as ran:
        for _ in range(2):
            neighborhood_patch_attention(*image, grid=grid, window=(4, 4), backend="triton")
        local_attention(*image, grid=grid, radius=1, backend="triton")
    assert ran.operations == {"neighborhood_patch_attention": ["triton"], "local_attention": ["triton"]}
    patches, local = ran.launches
    assert patches == {
        "kernel": "fused.npa", "queries": 32, "keys": 16, "warps": 4, "stages": 1, "programs": 1, "tile": [4, 4],
        "tma": True,
    }  # fmt: skip
    assert local["kernel"] == "fused.local_forward" and {"num_warps", "num_stages", "ROWS", "COLS"} <= set(local)


@pytest.mark.gpu
def test_what_is_chosen_on_a_gpu():
    image = [torch.randn(1, 32 * 32, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    with watch() as ran:
        neighborhood_patch_attention(*image, grid=(32, 32), window=(16, 16))
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert ran.operations == {"neighborhood_patch_attention": ["gluon" if hopper else "triton"]}
    assert ran.launches[-1]["kernel"] == ("hopper.npa" if hopper else "fused.npa")
    assert {"queries", "keys", "tile"} <= set(ran.launches[-1])
