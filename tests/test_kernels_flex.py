"""FlexAttention on permuted tokens against the definition in float64: all pairs on the CPU, compiled blocks on CUDA."""

import pytest
import torch
from hires_kernels import (
    BACKENDS,
    KernelError,
    Problem,
    flex,
    local_attention,
    neighborhood_patch_attention,
    reference,
)
from hires_kernels.orders import ORDERS, inverse
from torch.nn.attention.flex_attention import create_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
F64 = torch.float64
CPU = torch.device("cpu")
SMALL = flex.Configuration(16, 8)


def tensors(generator, count, tokens, dtype=F64, dim=8, heads=2):
    return tuple(torch.randn(2, tokens, heads, dim, generator=generator, dtype=F64).to(dtype) for _ in range(count))


def positions(grid, dim=8):
    """(cos, sin) of angles that differ from token to token."""
    angles = torch.outer(torch.arange(grid[0] * grid[1], dtype=F64), 10.0 ** -torch.arange(dim // 2, dtype=F64))
    return angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1)


NPA_CASES = {  # grid, window, text tokens
    "aligned": ((16, 16), (8, 8), 16),
    "s3, non-square": ((12, 18), (4, 6), 1),
    "odd windows": ((11, 13), (5, 7), 7),
    "ragged, long text": ((9, 14), (6, 4), 77),
    "window is the grid": ((6, 8), (6, 8), 5),
    "no text": ((10, 9), (4, 8), None),
    "empty text": ((5, 7), (2, 3), 0),
}
LOCAL_CASES = {  # grid, form, reach, text tokens, guidance grid, neighbours
    "radius": ((9, 12), "radius", 2, 7, None, "row"),
    "radius, guidance": ((16, 16), "radius", 2, 3, (4, 4), "row"),
    "all neighbours": ((12, 20), "radius", 4, 0, (6, 10), "all"),
    "odd ratio": ((11, 13), "radius", 3, 1, (4, 5), "all"),
    "window": ((8, 12), "window", 4, 77, (2, 3), "row"),
    "ragged window": ((10, 7), "window", 4, None, (5, 3), "all"),
}


def same(given, expected):
    for one, other in zip(given, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text_rows", ["patch", "global"])
@pytest.mark.parametrize("case", NPA_CASES)
def test_npa_is_the_definition(case, text_rows):
    grid, window, text_tokens = NPA_CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    image = tensors(generator, 3, grid[0] * grid[1])
    text = None if text_tokens is None else tensors(generator, 3, text_tokens)
    options = {"grid": grid, "window": window, "text": text, "rope": positions(grid), "text_rows": text_rows}
    given = neighborhood_patch_attention(*image, **options, backend="flex")
    same(given, neighborhood_patch_attention(*image, **options, backend="reference"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", LOCAL_CASES)
def test_local_is_the_definition(case, order):
    grid, form, reach, text_tokens, guidance_grid, neighbours = LOCAL_CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    image = tensors(generator, 3, grid[0] * grid[1])
    text = None if text_tokens is None else tensors(generator, 3, text_tokens)
    guidance = guidance_grid and tensors(generator, 2, guidance_grid[0] * guidance_grid[1])
    options = {"text": text, "guidance": guidance, "guidance_grid": guidance_grid, "guidance_neighbours": neighbours}
    options |= {"grid": grid, form: reach, "order": order}
    given = local_attention(*image, **options, backend="flex")
    same(given, local_attention(*image, **options, backend="reference"))


def listed(mask):
    """Boolean (blocks of queries, blocks of keys): partial and full blocks of a block mask."""
    both = []
    for numbers, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        blocks = torch.zeros(indices.shape[2:], dtype=torch.bool)
        for row, (number, index) in enumerate(zip(numbers[0, 0], indices[0, 0])):
            blocks[row, index[:number].long()] = True
        both.append(blocks)
    return both


def check_blocks(mask, configuration):
    """What FlexAttention is told of blocks is true of all their pairs."""
    pairs = create_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu")[0, 0]
    partial, full = listed(mask)
    assert not (partial & full).any()
    for i in range(partial.shape[0]):
        for j in range(partial.shape[1]):
            queries, keys = i * configuration.queries, j * configuration.keys
            block = pairs[queries : queries + configuration.queries, keys : keys + configuration.keys]
            assert bool(full[i, j]) <= bool(block.all())
            assert bool(block.any()) <= bool(partial[i, j] | full[i, j])


@pytest.mark.parametrize("case", NPA_CASES)
def test_npa_blocks_are_what_the_mask_says(case):
    grid, window, text = NPA_CASES[case]
    plan = flex._npa_plan(grid, window, text or 0, "patch", SMALL, CPU)
    check_blocks(plan.mask, SMALL)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", LOCAL_CASES)
def test_local_blocks_are_what_the_mask_says(case, order):
    grid, form, reach, text, guidance_grid, neighbours = LOCAL_CASES[case]
    plan = flex._local_plan(grid, form, reach, text or 0, guidance_grid, neighbours, order, SMALL, CPU)
    check_blocks(plan.mask, SMALL)


def test_aligned_windows_are_whole_blocks():
    """On tiles of a quarter of the window NPA is block-sparse: nothing to mask, nothing loaded in vain."""
    plan = flex._npa_plan((64, 64), (32, 32), 64, "patch", flex.Configuration(64, 64), CPU)
    partial, full = listed(plan.mask)
    assert not partial.any()
    assert full.sum(1).eq(32 * 32 // 64 + 1).all()


def test_orders_that_keep_boxes_together_load_less():
    share = {}
    for order in ORDERS:
        mask = flex._local_plan((128, 128), "radius", 8, 128, None, "row", order, flex.Configuration(), CPU).mask
        share[order] = (mask.kv_num_blocks + mask.full_kv_num_blocks).sum().item()
    assert max(share["hilbert"], share["morton"], share["window"]) < 0.6 * share["raster"]


def test_orders_have_inverses():
    plan = flex._npa_plan((11, 13), (5, 7), 0, "patch", SMALL, CPU)
    assert torch.equal(inverse(plan.order), plan.back)
    assert torch.equal(plan.order[plan.back], torch.arange(143))


def test_what_it_refuses_is_one_clear_line():
    image = tensors(torch.Generator().manual_seed(0), 3, 16)
    with pytest.raises(KernelError, match="shift: backend 'flex' has one mask for all samples: allowed: no shift"):
        options = {"grid": (4, 4), "window": 2, "shift": torch.zeros(2, 2, dtype=torch.long)}
        neighborhood_patch_attention(*image, **options, backend="flex")
    refusal = BACKENDS["flex"].refusal
    cuda = torch.device("cuda")
    assert refusal(Problem("local_attention", cuda, torch.float16, 64)) is None
    assert "got float64" in refusal(Problem("local_attention", cuda, F64, 64))
    assert "head_dim 16 or more, got 8" in refusal(Problem("local_attention", cuda, torch.float16, 8))
    assert "it runs neighborhood_patch_attention" in refusal(Problem("qk_norm_rope", CPU, torch.float32, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("configuration", flex.CONFIGURATIONS)
@pytest.mark.parametrize("operation", ["npa", "local"])
def test_compiled_errs_no_more_than_plain_pytorch(operation, configuration):
    generator = torch.Generator().manual_seed(11)
    device = torch.device("cuda")
    image, text = tensors(generator, 3, 4096, dim=64), tensors(generator, 3, 77, dim=64)
    guidance = tensors(generator, 2, 256, dim=64)

    def run(module, dtype, device, **extra):
        def move(parts):
            return tuple(x.to(device, dtype) for x in parts)

        options = {"grid": (64, 64), "text": move(text), "scale": 0.125, **extra}
        if operation == "npa":
            options |= {"window": (16, 32), "shift": None, "text_rows": "patch"}
            rope = tuple(x.to(device) for x in positions((64, 64), 64))
            return module.neighborhood_patch_attention(*move(image), rope=rope, **options)
        options |= {"form": "radius", "reach": 8, "order": "hilbert"}
        options |= {"guidance": move(guidance), "guidance_grid": (16, 16), "guidance_neighbours": "row"}
        return module.local_attention(*move(image), **options)

    truth, plain = run(reference, F64, device), run(reference, torch.bfloat16, device)
    given = run(flex, torch.bfloat16, device, configuration=configuration)
    for exact, low, result in zip(truth, plain, given):
        rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (result - exact).abs().max() <= 2 * (low - exact).abs().max() + rounding
