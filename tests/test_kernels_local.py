"""Fused local attention against the definition in float64, forward and backward: interpreted here, compiled on CUDA."""

import pytest
import torch
from hires_kernels import KernelError, local_attention
from hires_kernels.fused import local
from hires_kernels.orders import ORDERS, permutation

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # places outside the grid hold anything
F64 = torch.float64
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICES = [pytest.param(CPU, id="interpreter"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)]
FLUX = {"grid": (256, 256), "form": "radius", "reach": 8, "guidance_grid": (64, 64), "guidance_neighbours": "row"}


def projections(generator, parts, batch, tokens, heads, dim, dtype):
    """What one linear layer gives for queries, keys and values at once."""
    return torch.randn(batch, tokens, parts, heads, dim, generator=generator).to(dtype)


def run(leaves, backend, dtype, device, weights, **options):
    """Outputs of image and text, and the gradients of the projections `leaves`."""
    leaves = {name: x.to(device, dtype).detach().requires_grad_() for name, x in leaves.items()}
    for name in ("text", "guidance"):
        if name in leaves:
            options[name] = leaves[name].unbind(2)
    outputs = local_attention(*leaves["image"].unbind(2), backend=backend, **options)
    outputs = [x for x in outputs if x is not None and x.numel()]
    loss = sum((x * weight.to(x)).sum() for x, weight in zip(outputs, weights))
    return [*outputs, *(x for x in torch.autograd.grad(loss, list(leaves.values())) if x.numel())]


def check(device, grid, text, dtype, batch=1, heads=1, dim=32, seed=0, **options):
    """The pass rule: error <= 2 x the error of plain PyTorch in the same precision, both against float64."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {"image": projections(generator, 3, batch, grid[0] * grid[1], heads, dim, dtype)}
    if text is not None:
        leaves["text"] = projections(generator, 3, batch, text, heads, dim, dtype)
    if (guidance_grid := options.get("guidance_grid")) is not None:
        leaves["guidance"] = projections(generator, 2, batch, guidance_grid[0] * guidance_grid[1], heads, dim, dtype)
    weights = [torch.randn(batch, n, heads, dim, generator=generator) for n in (grid[0] * grid[1], text or 0)]
    options |= {"grid": grid, "weights": weights}
    truth = run(leaves, "reference", F64, CPU, **options)
    plain = run(leaves, "reference", dtype, CPU, **options)
    given = run(leaves, "triton", dtype, device, **options)
    assert len(given) == len(truth)
    for exact, low, result in zip(truth, plain, given):
        assert result.dtype == dtype and result.shape == exact.shape
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (result.cpu() - exact).abs().max() <= 2 * (low - exact).abs().max() + rounding


CASES = {  # grid, form, text tokens, guidance grid, neighbours, batch, heads
    "radius": ((9, 12), {"radius": 2}, 7, None, "row", 2, 1),
    "radius, guidance": ((16, 16), {"radius": 2}, 1, (4, 4), "row", 1, 2),
    "all neighbours": ((12, 20), {"radius": 4}, 0, (6, 10), "all", 1, 1),
    "odd ratio, long text": ((11, 13), {"radius": 3}, 77, (4, 5), "all", 1, 1),
    "window": ((8, 12), {"window": 4}, 33, (2, 3), "row", 1, 1),
    "ragged window": ((10, 7), {"window": 4}, None, (5, 3), "all", 2, 1),
    "window 1": ((4, 5), {"window": 1}, None, (4, 3), "row", 1, 1),
    "panorama, everything seen": ((3, 40), {"radius": 50}, 2, (1, 10), "row", 1, 1),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_is_the_definition(case, device):
    grid, form, text, guidance_grid, neighbours, batch, heads = CASES[case]
    dtype = torch.float32 if device == CPU else torch.bfloat16
    options = {"guidance_grid": guidance_grid, "guidance_neighbours": neighbours, **form}
    check(device, grid, text, dtype, batch, heads, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("seed", range(2))
def test_random_geometry_in_half_precision(seed, dim, device):
    generator = torch.Generator().manual_seed(100 * seed + dim)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    grid = draw(5, 24), draw(5, 24)
    form = {"radius": draw(1, 9)} if draw(0, 1) else {"window": draw(2, 9)}
    options = {
        "guidance_grid": (draw(1, grid[0]), draw(1, grid[1])),
        "guidance_neighbours": ("row", "all")[draw(0, 1)],
        "order": ORDERS[draw(0, 3)],
    }
    check(device, grid, draw(1, 40), torch.float16, dim=dim, batch=1 + seed, seed=seed, **form, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_long_rows_in_one_program_or_many(device, monkeypatch):
    """Text rows and the gradients of text keys are split over programs, on a small grid to single steps."""
    for programs in (1, 4, 1000):
        monkeypatch.setattr(local, "PROGRAMS", programs)
        check(device, (16, 20), 70, torch.float16, radius=1)


def inputs(device, grid, batch=1, heads=1, dtype=torch.float16, text=5):
    generator = torch.Generator().manual_seed(1)
    image = projections(generator, 3, batch, grid[0] * grid[1], heads, 32, dtype).to(device).unbind(2)
    return image, projections(generator, 3, batch, text, heads, 32, dtype).to(device).unbind(2)


@pytest.mark.parametrize("device", DEVICES)
def test_order_and_batch_change_no_bit(device):
    image, text = inputs(device, (24, 40), batch=2)
    options = {"grid": (24, 40), "radius": 4, "backend": "triton"}
    outputs = [local_attention(*image, text=text, order=order, **options) for order in ORDERS]
    assert all(torch.equal(x, y) for other in outputs[1:] for x, y in zip(other, outputs[0]))
    alone = local_attention(*(x[1:] for x in image), text=tuple(x[1:] for x in text), **options)
    assert all(torch.equal(x, y[1:]) for x, y in zip(alone, outputs[0]))


@pytest.mark.parametrize("device", DEVICES)
def test_every_output_is_written_and_repeats(device, monkeypatch):
    """Fresh memory holds NaN: a token that is never written shows. The same bits every time: no atomics."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    image, text = inputs(device, (7, 21), batch=2, heads=2, text=9)
    leaves = [x.detach().requires_grad_() for x in (*image, *text)]
    torch.use_deterministic_algorithms(True)
    try:
        repeats = []
        for _ in range(2):
            outputs = local_attention(*leaves[:3], text=leaves[3:], grid=(7, 21), radius=2, backend="triton")
            repeats.append([*outputs, *torch.autograd.grad([x.float().sum() for x in outputs], leaves)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() and torch.equal(x, y) for x, y in zip(*repeats))


def counted(view, owner, walked):
    """Steps of all tiles, one by one."""
    steps = 0
    for row in range(0, view.grid[0], owner[0]):
        for col in range(0, view.grid[1], owner[1]):
            sides = []
            for axis, (first, size) in enumerate(((row, owner[0]), (col, owner[1]))):
                low, high = view.seen(axis)
                place = torch.arange(first, min(first + size, view.grid[axis]))
                sides.append(-(-int(high[place].max() - low[place].min()) // walked[axis]))
            steps += sides[0] * sides[1]
    return steps


@pytest.mark.parametrize("seed", range(4))
def test_tiles_are_counted_and_inverses_are_inverse(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, cols, reach = (int(torch.randint(3, 30, (), generator=generator)) for _ in range(3))
    views = (
        local.View((rows, cols), (rows, cols), ("radius", "window")[seed % 2], reach),
        local.View((rows, cols), (rows // 3 + 1, cols // 2 + 1), "guidance", 2 * reach, (seed % 2, 1)),
    )
    shapes = local.tiles(64, 32, views, 70)
    tiles = -(-rows // shapes.owner[0]) * -(-cols // shapes.owner[1])
    assert shapes.steps == sum(counted(view, shapes.owner, shapes.walked) for view in views) + 3 * tiles
    for view in views:
        for axis in (0, 1):
            seen, seeing = view.seen(axis), view.seeing(axis)
            assert torch.equal(seen.mask(view.key_grid[axis]).T, seeing.mask(view.grid[axis]))


def test_keys_loaded_for_flux_as_documented():
    options = local.Options(**FLUX, order="hilbert", scale=1.0)
    shapes = local.tiles(64, 64, (options.near, options.guidance), 512)
    assert (shapes.owner, shapes.walked) == ((8, 8), (8, 8))
    assert shapes.steps * 64 == pytest.approx(1184 * 1024, rel=1e-3)


def test_strided_views_are_not_copied():
    fused = torch.zeros(2, 35, 3, 4, 64, dtype=torch.bfloat16)
    assert all(local._loadable(x).data_ptr() == x.data_ptr() for x in fused.unbind(2))
    odd = torch.zeros(2, 35, 4, 65, dtype=torch.bfloat16)[..., :64]
    assert local._loadable(odd).data_ptr() != odd.data_ptr()


def test_morton_reads_quadrants_in_turn():
    assert permutation("morton", (4, 4)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert permutation("morton", (3, 3)).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


def test_bad_input_is_one_clear_line():
    image, text = inputs(CPU, (3, 3))
    options = {"grid": (3, 3), "radius": 1, "backend": "triton"}
    with pytest.raises(KernelError, match="must share one floating-point dtype"):
        local_attention(*image, text=tuple(x.float() for x in text), **options)
    with pytest.raises(KernelError, match=r"scale 0.0: .* needs a positive one"):
        local_attention(*image, scale=0, **options)
    with pytest.raises(KernelError, match=r"'triton' can't run local_attention: it needs head_dim 32, 64, 128, got 16"):
        local_attention(*(x[..., :16] for x in image), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [(256, 256), (96, 512)])
def test_flux_sizes(grid):
    """Truth: gathered windows in float32; plain: the same in bfloat16."""
    generator = torch.Generator().manual_seed(2)
    guidance_grid = grid[0] // 4, grid[1] // 4
    sizes = {"image": (3, grid[0] * grid[1]), "text": (3, 512), "guidance": (2, guidance_grid[0] * guidance_grid[1])}
    leaves = {name: projections(generator, n, 1, t, 4, 128, torch.bfloat16) for name, (n, t) in sizes.items()}
    weights = [torch.randn(1, sizes[name][1], 4, 128, generator=generator).bfloat16() for name in ("image", "text")]
    options = {"grid": grid, "radius": 8, "guidance_grid": guidance_grid, "weights": weights}
    truth = run(leaves, "sdpa", torch.float32, CUDA, **options)
    plain = run(leaves, "sdpa", torch.bfloat16, CUDA, **options)
    given = run(leaves, "triton", torch.bfloat16, CUDA, **options)
    for exact, low, result in zip(truth, plain, given):
        rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (result - exact).abs().max() <= 2 * (low - exact).abs().max() + rounding


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    image = torch.randn(3, 512 * 512, 24, 128, device=CUDA, dtype=torch.bfloat16)
    options = {"grid": (512, 512), "radius": 8, "backend": "triton"}
    together, _ = local_attention(image, image, image, **options)
    alone, _ = local_attention(image[2:], image[2:], image[2:], **options)
    assert torch.equal(together[2:], alone)
