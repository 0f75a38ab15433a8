"""Fused Neighborhood Patch Attention against the definition in float64: interpreted here, compiled with -m gpu.

Triton has no interpreter for Gluon. `gluon_on_cpu` runs the text of that kernel, not what the compiler makes of it.
"""

from functools import partial

import gluon_on_cpu
import pytest
import torch
from hires_kernels import KernelError, Problem, explain, fused, launches, neighborhood_patch_attention
from hires_kernels.backends import choose
from hires_kernels.fused import npa

F64 = torch.float64
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INTERPRETER = pytest.param("triton", CPU, id="interpreter")
TRITON = pytest.param("triton", CUDA, id="triton", marks=pytest.mark.gpu)
GLUON = pytest.param("gluon", CUDA, id="gluon", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize(("backend", "device"), [INTERPRETER, TRITON, GLUON])


def tensors(generator, count, *shape, dtype=torch.float32):
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for _ in range(count))


def positions(grid, dim):
    """(cos, sin) of a two-axis RoPE in FLUX's layout."""
    row, col = (x.flatten().double() for x in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    speeds = 10.0 ** -torch.arange(dim // 4, dtype=F64)
    angles = torch.cat([row[:, None] * speeds, col[:, None] * speeds], dim=1)
    return angles.cos().float().repeat_interleave(2, 1), angles.sin().float().repeat_interleave(2, 1)


def low_precision(device):
    """Interpreted kernels also run in float32, where they can be exact."""
    return torch.float32 if device == CPU else torch.bfloat16


def check(backend, device, image, grid, window, text=None, **options):
    """The pass rule: error <= 2 x the error of plain PyTorch in the same precision, both against float64.

    Returns a function that runs the kernel again, and what it gave.
    """
    options |= {"grid": grid, "window": window}

    def run(backend, dtype):
        def move(x):
            return x.to(device=device, dtype=dtype)  # keeps the strides

        inputs = None if text is None else tuple(map(move, text))
        return neighborhood_patch_attention(*map(move, image), text=inputs, backend=backend, **options)

    dtype = image[0].dtype
    truth, plain, given = run("reference", F64), run("reference", dtype), run(backend, dtype)
    for exact, low, result in zip(truth, plain, given, strict=True):
        assert (exact is None) == (result is None)
        if exact is None or exact.numel() == 0:
            continue
        assert result.dtype == dtype and result.shape == exact.shape
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (result - exact).abs().max() <= 2 * (low - exact).abs().max() + rounding
    return lambda: run(backend, dtype), given


CASES = {  # grid, window, text tokens, batch, heads
    "s1": ((6, 6), (6, 6), 7, 1, 2),
    "s2": ((8, 8), (4, 4), 1, 2, 1),
    "patch of two tiles": ((16, 20), (16, 10), 0, 1, 1),
    "panorama": ((4, 32), (4, 4), None, 1, 2),
    "ragged": ((7, 13), (5, 9), 7, 1, 1),
    "long text": ((7, 8), (6, 8), 77, 1, 1),
    "smallest window": ((5, 4), (2, 3), 1, 1, 1),
}


@everywhere
@pytest.mark.parametrize(
    ("case", "shifted"), [*((case, False) for case in CASES), *((case, True) for case in ("s2", "ragged", "panorama"))]
)
def test_is_the_definition(case, shifted, backend, device):
    grid, window, text_tokens, batch, heads = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    dtype = low_precision(device)
    image = tensors(generator, 3, batch, grid[0] * grid[1], heads, 64, dtype=dtype)
    text = None if text_tokens is None else tensors(generator, 3, batch, text_tokens, heads, 64, dtype=dtype)
    shift = None
    if shifted:
        shift = torch.stack([torch.randint(0, side // 2 + 1, (batch,), generator=generator) for side in window], dim=1)
    check(backend, device, image, grid, window, text, rope=positions(grid, 64), shift=shift)


OWN_PATCHES = pytest.mark.parametrize(  # no overlap, more than half of it, patches half a token off the middle
    ("window", "patch", "shifted"),
    [((4, 6), (4, 6), False), ((5, 8), (2, 3), True), ((7, 4), (1, 4), False), ((8, 8), (7, 2), True)],
)


def check_own_patches(backend, device, dtype, window, patch, shifted):
    grid, generator = (9, 13), torch.Generator().manual_seed(sum(patch))
    image = tensors(generator, 3, 1, grid[0] * grid[1], 1, 64, dtype=dtype)
    text = tensors(generator, 3, 1, 5, 1, 64, dtype=dtype)
    options = {"rope": positions(grid, 64), "patch": patch}
    if shifted:
        options["shift"] = torch.stack([torch.randint(0, side + 1, (1,), generator=generator) for side in patch], dim=1)
    check(backend, device, image, grid, window, text, **options)


@everywhere
@OWN_PATCHES
def test_patches_of_another_side(window, patch, shifted, backend, device):
    check_own_patches(backend, device, low_precision(device), window, patch, shifted)


@everywhere
@pytest.mark.parametrize("seed", range(3))
def test_random_geometry_and_strides(seed, backend, device):
    generator = torch.Generator().manual_seed(100 + seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    window = draw(5, 9), draw(5, 9)
    grid = draw(window[0], 11), draw(window[1], 12)
    tokens, text_tokens = grid[0] * grid[1], draw(1, 20)
    dtype = low_precision(device)
    packed = tensors(generator, 1, 2, text_tokens + tokens, 3, 1, 64, dtype=dtype)[0]
    if seed % 2:  # (batch, heads, tokens, dim) in memory
        packed = packed.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    text, image = (x.unbind(2) for x in packed.split([text_tokens, tokens], dim=1))  # one sequence, as in FLUX
    options = {"rope": None if seed == 2 else positions(grid, 64), "scale": 0.3}
    options["text_rows"] = "global" if seed in (1, 2) else "patch"
    check(backend, device, image, grid, window, text, **options)


@pytest.mark.parametrize(
    ("backend", "device", "dim"),
    [
        pytest.param(*place.values, dim, id=f"{place.id}-{dim}", marks=place.marks)
        for place in (INTERPRETER, TRITON, GLUON)
        for dim in (32, 64, 128)
        if (place, dim) != (GLUON, 32)
    ],
)
def test_half_precision_and_head_dims(backend, device, dim):
    generator = torch.Generator().manual_seed(dim)
    grid, window = (8, 8), (8, 6)
    for dtype in (torch.float16,) if device == CPU else (torch.float16, torch.bfloat16):
        image = tensors(generator, 3, 1, 64, 2, dim, dtype=dtype)
        text = tensors(generator, 3, 1, 17, 2, dim, dtype=dtype)
        check(backend, device, image, grid, window, text, rope=positions(grid, dim))


GLUON_CASES = {  # grid, window, text tokens, batch, heads, head dim, shift, text rows
    "tiles of the window": ((24, 24), (16, 16), None, 1, 2, 64, None, "patch"),
    "long text": ((32, 32), (32, 32), 130, 1, 1, 64, None, "patch"),
    "ragged": ((24, 20), (12, 16), 77, 2, 1, 128, None, "patch"),
    "shifted": ((20, 20), (16, 10), 5, 2, 1, 64, [[1, 2], [8, 5]], "patch"),
    "global text rows": ((24, 24), (12, 12), 130, 1, 1, 64, None, "global"),
    "tiles of padding": ((28, 28), (24, 24), 130, 1, 1, 128, None, "patch"),
    "steps fewer than stages": ((4, 4), (4, 4), None, 1, 1, 128, None, "patch"),
}


TWO = {"groups": 2, "k_stages": 3, "v_stages": 2, "free_together": False, "staged": False}
FOUR = {"groups": 4, "k_stages": 4, "v_stages": 4, "free_together": True, "staged": False}
STAGED = {"staged": True}


@pytest.mark.parametrize(
    ("case", "launch", "first"),
    [
        *((case, {}, False) for case in GLUON_CASES),
        *((case, TWO, False) for case in GLUON_CASES),
        *((case, TWO | {"k_stages": 2, "free_together": True}, False) for case in ("long text", "ragged")),
        *((case, FOUR, False) for case in ("ragged", "tiles of padding", "steps fewer than stages")),
        *((case, FOUR | {"v_stages": 2, "free_together": False}, False) for case in ("long text", "ragged")),
        *((case, FOUR | STAGED, False) for case in ("tiles of the window", "ragged")),
        *((case, TWO, True) for case in ("ragged", "shifted", "tiles of padding")),
        *((case, FOUR | STAGED, True) for case in ("long text", "shifted", "steps fewer than stages")),
    ],
)
def test_the_text_of_the_gluon_kernel(case, launch, first, monkeypatch):
    grid, window, text_tokens, batch, heads, dim, shift, text_rows = GLUON_CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    image = tensors(generator, 1, batch, grid[0] * grid[1], 3, heads, dim, dtype=torch.float16)[0].unbind(2)
    text = None if text_tokens is None else tensors(generator, 3, batch, text_tokens, heads, dim, dtype=torch.float16)
    shift = None if shift is None else torch.tensor(shift)
    module = gluon_on_cpu.interpret("hires_kernels.hopper.npa", monkeypatch, seed=len(case))
    monkeypatch.setattr(module, "RISE", 0.5)  # which a few steps pass
    keys = window[0] * window[1] + (text_tokens or 0)
    monkeypatch.setattr(module, "LIMIT", 0.1 * keys)  # and partial sums of some rows
    monkeypatch.setattr(module, "FIRST_MAXIMA", (torch.float16,) if first else ())  # the CPU has no bfloat16 products
    monkeypatch.setattr(
        fused, "neighborhood_patch_attention", partial(npa.neighborhood_patch_attention, run=module.attend)
    )
    with launches.trying("npa_gluon", dim, CPU, launches.launch("npa_gluon", dim, CPU) | launch):
        check("triton", CPU, image, grid, window, text, rope=positions(grid, dim), shift=shift, text_rows=text_rows)


@OWN_PATCHES
@pytest.mark.parametrize("launch", [TWO, FOUR])
def test_the_gluon_kernel_takes_patches_of_another_side(window, patch, shifted, launch, monkeypatch):
    module = gluon_on_cpu.interpret("hires_kernels.hopper.npa", monkeypatch, seed=1)
    run = partial(npa.neighborhood_patch_attention, run=module.attend)
    monkeypatch.setattr(fused, "neighborhood_patch_attention", run)
    with launches.trying("npa_gluon", 64, CPU, launches.launch("npa_gluon", 64, CPU) | launch):
        check_own_patches("triton", CPU, torch.float16, window, patch, shifted)


class Observed:
    """The kernel, and after each launch: how many items are to be done again, and the output."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.kernel[grid](*arguments, **constants)
            items = 0 if arguments[9] is None else int(arguments[9][0])
            self.seen.append((items, arguments[3].clone()))

        return launch


def risen(rise, dtype, launch, monkeypatch):
    """The kernel's launches where half of the queries, the second result, see four keys of the last tile `rise` above
    those of the first, in powers of two. Their outcome is right."""
    grid = window = (16, 32)  # four patches of 8 x 16
    generator = torch.Generator().manual_seed(rise)
    query, key, value = (torch.randn(1, 512, 1, 64, generator=generator) for _ in range(3))
    sees = torch.arange(512) // 32 % 8 >= 4
    query[..., 0], key[..., 0] = sees.view(1, -1, 1).float(), 0
    query[..., 1:] *= 0.1
    key[:, -4:, :, 0] = torch.arange(rise - 3, rise + 1).view(1, -1, 1).float()
    image = [x.to(dtype) for x in (query, key, value)]
    module = gluon_on_cpu.interpret("hires_kernels.hopper.npa", monkeypatch, seed=rise)
    monkeypatch.setattr(module, "_attend", Observed(module._attend))
    given, scale = torch.full_like(image[0], float("nan")), 1 / npa.LOG2_E
    with launches.trying("npa_gluon", 64, CPU, launches.launch("npa_gluon", 64, CPU) | launch):
        module.attend(image, None, npa.Patches(grid, window, (2, 2), None), scale, given)
    exact, plain = (
        neighborhood_patch_attention(*(x.to(y) for x in image), grid=grid, window=window, scale=scale)[0]
        for y in (F64, dtype)
    )
    assert (given - exact).abs().max() <= (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    return module._attend.seen, sees


@pytest.mark.parametrize("launch", [TWO, FOUR])
@pytest.mark.parametrize(("rise", "again"), [(-9, False), (88, False), (104, True), (250, True)])  # 250: infinite sums
def test_rows_that_pass_the_first_maximum_by_far_are_done_again(rise, again, launch, monkeypatch):
    ((items, first), (_, second)), sees = risen(rise, torch.bfloat16, launch, monkeypatch)
    assert items == (4 if again else 0)
    assert torch.equal(first.isnan().any((0, 2, 3)), sees & again)  # what the second launch alone has written
    assert torch.equal(second[:, ~(sees & again)], first[:, ~(sees & again)])


@pytest.mark.parametrize("launch", [TWO, FOUR])
@pytest.mark.parametrize("rise", [-9, 12, 17, 40])
def test_maxima_of_float16_run(rise, launch, monkeypatch):
    launched, _ = risen(rise, torch.float16, launch, monkeypatch)
    assert len(launched) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("rise", [0, 8, 64])
@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16)])
def test_scores_that_rise_along_a_window(dim, dtype, rise):
    generator = torch.Generator().manual_seed(3)
    grid, window = (96, 72), (38, 52)
    image = tensors(generator, 3, 1, grid[0] * grid[1], 2, dim, dtype=dtype)
    if rise:
        image[1].mul_(torch.linspace(0, rise, grid[0] * grid[1]).view(1, -1, 1, 1))
    text = tensors(generator, 3, 1, 256, 2, dim, dtype=dtype)
    again, first = check("gluon", CUDA, image, grid, window, text, rope=positions(grid, dim))
    for _ in range(20):
        assert all(map(torch.equal, first, again()))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("text_rows", ["patch", "global"])
@pytest.mark.parametrize(
    ("grid", "window", "text_tokens", "dim", "dtype"),
    [
        ((128, 128), (64, 64), 512, 128, torch.bfloat16),
        ((96, 72), (38, 52), 256, 128, torch.bfloat16),
        ((128, 128), (64, 64), None, 64, torch.float16),
        ((64, 64), (32, 32), None, 64, torch.float16),
    ],
)
def test_sizes_of_real_models(grid, window, text_tokens, dim, dtype, text_rows, backend):
    generator = torch.Generator().manual_seed(1)
    image = tensors(generator, 3, 1, grid[0] * grid[1], 2, dim, dtype=dtype)
    text = None if text_tokens is None else tensors(generator, 3, 1, text_tokens, 2, dim, dtype=dtype)
    rope = None if text is None else positions(grid, dim)
    again, first = check(backend, CUDA, image, grid, window, text, rope=rope, text_rows=text_rows)
    for _ in range(20):  # an error that moves between runs is a race
        assert all(x is y or torch.equal(x, y) for x, y in zip(first, again()))


@everywhere
@pytest.mark.parametrize("text_rows", ["patch", "global"])
def test_every_output_is_written_and_inputs_are_left_alone(text_rows, backend, device, monkeypatch):
    """Fresh memory holds NaN: a token that is never written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    generator = torch.Generator().manual_seed(13)
    dtype = low_precision(device)
    inputs = [*tensors(generator, 3, 2, 56, 1, 64, dtype=dtype), *tensors(generator, 3, 2, 5, 1, 64, dtype=dtype)]
    inputs = [x.to(device) for x in inputs]
    before = [x.clone() for x in inputs]
    options = {"grid": (8, 7), "window": 6, "shift": torch.tensor([[3, 0], [1, 2]]), "text_rows": text_rows}
    torch.use_deterministic_algorithms(True)
    try:
        outputs = neighborhood_patch_attention(
            *inputs[:3], text=tuple(inputs[3:]), rope=positions((8, 7), 64), backend=backend, **options
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in outputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


@pytest.mark.parametrize("layout", ["sequence", "heads first", "projection"])
def test_descriptors_and_pointers_read_the_same_tokens(layout, monkeypatch):
    generator = torch.Generator().manual_seed(7)
    grid = (8, 8)
    if layout == "heads first":
        image = tuple(x.transpose(1, 2) for x in tensors(generator, 3, 2, 2, 64, 32))
    elif layout == "projection":
        image = tensors(generator, 1, 2, 64, 3, 2, 32)[0].unbind(2)
    else:
        image = tensors(generator, 3, 2, 64, 2, 32)
    assert npa.described(image[1], grid, (2, 8)) is not None
    with_descriptors = neighborhood_patch_attention(*image, grid=grid, window=4, backend="triton")[0]
    monkeypatch.setattr(npa, "described", lambda *_: None)
    with_pointers = neighborhood_patch_attention(*image, grid=grid, window=4, backend="triton")[0]
    assert torch.equal(with_descriptors, with_pointers)


def test_no_descriptor_where_strides_do_not_allow_one():
    grid = (4, 4)
    assert npa.described(torch.zeros(2, 19, 1, 32)[:, :16], grid, (4, 4)) is None  # samples between rows of the grid
    assert npa.described(torch.zeros(1, 16, 1, 33)[..., :32], grid, (4, 4)) is None  # 132 bytes a token
    assert npa.described(torch.zeros(513)[1:].view(1, 16, 1, 32), grid, (4, 4)) is None  # begins at 4 bytes
    assert npa.described(torch.zeros(1, 19, 1, 32)[:, 3:], grid, (4, 4)) is not None


@pytest.mark.parametrize(
    ("window", "keys", "shape"),
    [
        ((64, 64), 128, (2, 64)),
        ((32, 32), 128, (4, 32)),
        ((76, 52), 128, (16, 8)),
        ((16, 16), 128, (8, 16)),
        ((5, 200), 128, (1, 128)),
    ],
)
def test_tiles_waste_little(window, keys, shape):
    assert npa.tile_shape(window, keys) == shape


def test_samples_do_not_see_each_other():
    generator = torch.Generator().manual_seed(17)
    image, text = tensors(generator, 3, 2, 56, 1, 32), tensors(generator, 3, 2, 4, 1, 32)
    shift = torch.tensor([[0, 2], [3, 1]])
    options = {"grid": (7, 8), "window": (6, 7), "rope": positions((7, 8), 32), "backend": "triton"}
    together = neighborhood_patch_attention(*image, text=text, shift=shift, **options)
    for b in range(2):
        alone = neighborhood_patch_attention(
            *(x[b, None] for x in image), text=tuple(x[b, None] for x in text), shift=shift[b, None], **options
        )
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together))


def problem(**changes):
    return Problem(
        **{"operation": "neighborhood_patch_attention", "device": CPU, "dtype": torch.float16, "head_dim": 64} | changes
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": F64}, "needs float16 or bfloat16, got float64"),
        ({"head_dim": 8}, "needs head_dim 32, 64, 128, got 8"),
        ({"needs_grad": True}, "has no backward"),
        ({"dtype": torch.bfloat16}, "interpreter has no bfloat16"),
    ],
)
def test_refusals_say_what_is_supported(changes, reason):
    given = explain(problem(**changes))["triton"]
    assert given is None if reason is None else reason in given


def test_gluon_is_for_hopper(monkeypatch):
    assert "no interpreter" in explain(problem())["gluon"]
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert explain(problem(device=CUDA))["gluon"] == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "B200")
    assert explain(problem(device=CUDA))["gluon"] == "it needs compute capability 9.0 (Hopper), got B200"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert explain(problem(device=CUDA))["gluon"] is None
    assert "head_dim 64, 128, got 32" in explain(problem(device=CUDA, head_dim=32))["gluon"]
    assert choose("auto", problem(device=CUDA)).__name__ == "hires_kernels.hopper"
    assert choose("auto", problem(device=CUDA, head_dim=32)).__name__ == "hires_kernels.fused"


def test_the_processor_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "needs a CUDA device, got cpu" in explain(problem())["triton"]


def test_automatic_leaves_interpreted_kernels_alone():
    assert choose("auto", problem()) is not choose("triton", problem())


def test_a_scale_that_is_not_positive_is_refused():
    x = torch.zeros(1, 16, 1, 32)
    with pytest.raises(KernelError, match=r"scale -1\.0: fused kernels need a positive one"):
        neighborhood_patch_attention(x, x, x, grid=(4, 4), window=2, scale=-1.0, backend="triton")


@pytest.mark.parametrize("below", [8, 11, 12.2, 14, 16])
@pytest.mark.parametrize("launch", [TWO, FOUR])
def test_many_small_weights_beside_a_large_one_are_kept(below, launch, monkeypatch):
    """The first maximum is the largest score, all others are `below` it, in powers of e: float16 has room for them."""
    grid = window = (32, 32)
    query, key, value = (torch.zeros(1, 1024, 1, 64) for _ in range(3))
    query[..., 0] = 1.0
    key[..., 0] = -float(below)
    key[:, 0, :, 0] = 0.0
    value[..., 0], value[:, 0, :, 0] = 1.0, -1.0
    image = [x.half() for x in (query, key, value)]
    module = gluon_on_cpu.interpret("hires_kernels.hopper.npa", monkeypatch, seed=0)
    given = torch.empty_like(image[0])
    with launches.trying("npa_gluon", 64, CPU, launches.launch("npa_gluon", 64, CPU) | launch):
        module.attend(image, None, npa.Patches(grid, window, (2, 2), None), 1.0, given)
    exact = neighborhood_patch_attention(*(x.double() for x in image), grid=grid, window=window, scale=1.0)[0]
    assert (given - exact).abs().max() <= 2**-10
