"""Every backend of hires_kernels against a brute force that lists the keys of each query, in float64."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hires_kernels import KernelError, Problem, apply_rope, explain, local_attention, neighborhood_patch_attention
from hires_kernels.orders import ORDERS, inverse, permutation

HEADS, DIM = 2, 8
F64 = torch.float64
BACKENDS = [  # those that run anywhere and in any precision; a fused backend has tests of its own
    name for name, reason in explain(Problem("qk_norm_rope", torch.device("cpu"), F64, DIM)).items() if reason is None
]


def tensors(generator, count, tokens, batch=2, dtype=F64, dim=DIM):
    return tuple(torch.randn(batch, tokens, HEADS, dim, generator=generator, dtype=F64).to(dtype) for _ in range(count))


def positions(grid, dim=DIM):
    """Angles (tokens, dim / 2) of a two-axis RoPE, and its (cos, sin) in FLUX's layout."""
    row, col = (x.flatten().double() for x in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    speeds = 10.0 ** -torch.arange(dim // 4, dtype=F64)
    angles = torch.cat([row[:, None] * speeds, col[:, None] * speeds], dim=1)
    return angles, (angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1))


def turn(x, angles):
    """RoPE as a product of complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def softmax_rows(query, keys, values, scale=None):
    """query (n, heads, dim), keys and values (m, heads, dim)."""
    scores = (query.transpose(0, 1) @ keys.permute(1, 2, 0)) * (scale or 1 / math.sqrt(query.shape[-1]))
    weights = scores.exp()
    return (weights / weights.sum(-1, keepdim=True) @ values.transpose(0, 1)).transpose(0, 1)


def brute_npa(query, key, value, grid, window, text=None, angles=None, shift=None, text_rows="patch", scale=None):
    height, width = grid
    image = torch.zeros_like(query)
    text_out = None if text is None else torch.zeros_like(text[0])
    for b in range(len(query)):
        offset = [0, 0] if shift is None else shift[b].tolist()
        extra = 0 if shift is None else 1

        def keys_of(patch, b=b, offset=offset):
            starts = []
            for axis in (0, 1):
                start = patch[axis] * (window[axis] // 2) - offset[axis] - window[axis] // 4
                starts.append(min(max(start, 0), grid[axis] - window[axis]))
            tokens = [
                r * width + c
                for r in range(starts[0], starts[0] + window[0])
                for c in range(starts[1], starts[1] + window[1])
            ]
            keys, values = key[b, tokens], value[b, tokens]
            corner = starts[0] * width + starts[1]
            if text is not None:
                text_key = text[1][b] if angles is None else turn(text[1][b], angles[corner])
                keys, values = torch.cat([keys, text_key]), torch.cat([values, text[2][b]])
            return keys, values, corner

        for r, c in itertools.product(range(height), range(width)):
            keys, values, _ = keys_of(((r + offset[0]) // (window[0] // 2), (c + offset[1]) // (window[1] // 2)))
            image[b, r * width + c] = softmax_rows(query[b, [r * width + c]], keys, values, scale)[0]
        if text is None:
            continue
        if text_rows == "global":
            first = [turn(x[b], angles[0]) if angles is not None else x[b] for x in text[:2]]
            everything = torch.cat([key[b], first[1]]), torch.cat([value[b], text[2][b]])
            text_out[b] = softmax_rows(first[0], *everything, scale)
            continue
        counts = [math.ceil(grid[axis] / (window[axis] // 2)) + extra for axis in (0, 1)]
        for patch in itertools.product(*map(range, counts)):
            keys, values, corner = keys_of(patch)
            text_query = text[0][b] if angles is None else turn(text[0][b], angles[corner])
            text_out[b] += softmax_rows(text_query, keys, values, scale) / math.prod(counts)
    return image, text_out


def brute_local(
    query, key, value, grid, radius=None, window=None, text=None, guidance=None, guidance_grid=None, all8=0
):
    height, width = grid
    image = torch.zeros_like(query)
    for r, c in itertools.product(range(height), range(width)):
        if radius is not None:
            seen = [
                (i, j)
                for i, j in itertools.product(range(height), range(width))
                if max(abs(i - r), abs(j - c)) <= radius
            ]
        else:
            own = (r // window, c // window)
            seen = [
                (i, j) for i, j in itertools.product(range(height), range(width)) if (i // window, j // window) == own
            ]
        tokens = [i * width + j for i, j in seen]
        keys, values = [key[:, tokens]], [value[:, tokens]]
        if guidance is not None:
            reach = window or 2 * radius
            sides = [max(1, int(reach / (g / lr))) for g, lr in zip(grid, guidance_grid)]
            place = [int(x * lr / g) // side for x, g, lr, side in zip((r, c), grid, guidance_grid, sides)]
            tokens = [
                i * guidance_grid[1] + j
                for i, j in itertools.product(range(guidance_grid[0]), range(guidance_grid[1]))
                if abs(i // sides[0] - place[0]) <= all8 and abs(j // sides[1] - place[1]) <= 1
            ]
            keys.append(guidance[0][:, tokens])
            values.append(guidance[1][:, tokens])
        if text is not None:
            keys.append(text[1])
            values.append(text[2])
        for b in range(len(query)):
            row = softmax_rows(query[b, [r * width + c]], torch.cat(keys, 1)[b], torch.cat(values, 1)[b])
            image[b, r * width + c] = row[0]
    if text is None:
        return image, None
    keys, values = torch.cat([key, text[1]], 1), torch.cat([value, text[2]], 1)
    return image, torch.stack([softmax_rows(text[0][b], keys[b], values[b]) for b in range(len(query))])


def same(given, expected, tolerance=1e-12):
    for one, other in zip(given, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


NPA_CASES = {  # grid, window, text tokens
    "s1": ((6, 6), (6, 6), 7),
    "s2": ((8, 8), (4, 4), 7),
    "s3, non-square": ((12, 18), (4, 6), 1),
    "s4": ((16, 16), (4, 4), 0),
    "s8": ((32, 32), (4, 4), 1),
    "odd windows": ((11, 13), (5, 7), 7),
    "ragged, long text": ((9, 14), (6, 4), 77),
    "panorama": ((6, 23), (6, 6), 7),
    "smallest window": ((5, 7), (2, 3), None),
    "no text": ((10, 9), (4, 8), None),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", NPA_CASES)
@pytest.mark.parametrize("shifted", [False, True])
def test_npa_is_the_brute_force(case, backend, shifted, request):
    grid, window, text_tokens = NPA_CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    query, key, value = tensors(generator, 3, grid[0] * grid[1])
    text = None if text_tokens is None else tensors(generator, 3, text_tokens)
    angles, rope = positions(grid)
    shift = None
    if shifted:
        shift = torch.stack([torch.randint(0, side // 2 + 1, (2,), generator=generator) for side in window], dim=1)
    expected = brute_npa(query, key, value, grid, window, text, angles, shift)
    given = neighborhood_patch_attention(
        query, key, value, grid=grid, window=window, text=text, rope=rope, shift=shift, backend=backend
    )
    same(given, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_npa_random_geometry(backend, seed):
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    window = draw(2, 7), draw(2, 7)
    grid = draw(window[0], 15), draw(window[1], 15)
    packed = torch.randn(2, grid[0] * grid[1], 3, HEADS, DIM, generator=generator, dtype=F64)
    query, key, value = packed.unbind(2)  # views of a fused projection
    text = tensors(generator, 3, draw(1, 9))
    text = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in text)
    angles, rope = positions(grid)
    use_rope, text_rows = seed % 2 == 0, "global" if seed % 3 == 0 else "patch"
    expected = brute_npa(
        query, key, value, grid, window, text, angles if use_rope else None, None, text_rows, scale=0.5
    )
    options = {"grid": grid, "window": window, "text": text, "text_rows": text_rows, "scale": 0.5}
    given = neighborhood_patch_attention(query, key, value, rope=rope if use_rope else None, backend=backend, **options)
    same(given, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [(0, 0), (2, 3)])
def test_patches_of_padding_count_in_the_text_mean(backend, offset):
    generator = torch.Generator().manual_seed(5)
    grid, window = (8, 12), (4, 6)
    query, key, value, *text = tensors(generator, 3, 96) + tensors(generator, 3, 4)
    angles, rope = positions(grid)
    shift = torch.tensor([offset, offset])
    options = {"grid": grid, "window": window, "text": tuple(text), "rope": rope, "backend": backend}
    given = neighborhood_patch_attention(query, key, value, shift=shift, **options)
    same(given, brute_npa(query, key, value, grid, window, text, angles, shift))
    still = neighborhood_patch_attention(query, key, value, **options)
    assert not torch.allclose(still[1], given[1], atol=1e-4)
    torch.testing.assert_close(still[0], given[0], rtol=0, atol=1e-12)  # offset 0 or one whole patch: same tiling


LOCAL_CASES = {  # grid, form, text tokens, guidance grid, neighbours
    "radius": ((9, 12), {"radius": 2}, 7, None, "row"),
    "radius, guidance": ((16, 16), {"radius": 2}, 3, (4, 4), "row"),
    "radius, all neighbours": ((12, 20), {"radius": 4}, 0, (6, 10), "all"),
    "odd ratio": ((11, 13), {"radius": 3}, 1, (4, 5), "all"),
    "window": ((8, 12), {"window": 4}, 77, (2, 3), "row"),
    "ragged window": ((10, 7), {"window": 4}, None, (5, 3), "all"),
    "window 1": ((4, 5), {"window": 1}, None, None, "row"),
    "radius 1": ((5, 9), {"radius": 1}, None, (2, 4), "row"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", LOCAL_CASES)
def test_local_is_the_brute_force(case, order, backend):
    grid, form, text_tokens, guidance_grid, neighbours = LOCAL_CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    query, key, value = tensors(generator, 3, grid[0] * grid[1])
    text = None if text_tokens is None else tensors(generator, 3, text_tokens)
    guidance = guidance_grid and tensors(generator, 2, guidance_grid[0] * guidance_grid[1])
    expected = brute_local(
        query,
        key,
        value,
        grid,
        **form,
        text=text,
        guidance=guidance,
        guidance_grid=guidance_grid,
        all8=neighbours == "all",
    )
    options = {"guidance": guidance, "guidance_grid": guidance_grid, "guidance_neighbours": neighbours}
    given = local_attention(query, key, value, grid=grid, **form, text=text, order=order, backend=backend, **options)
    same(given, expected)


def test_masks_in_parts_change_nothing(monkeypatch):
    from hires_kernels import sdpa

    generator = torch.Generator().manual_seed(3)
    query, key, value = tensors(generator, 3, 12 * 17)
    text, guidance = tensors(generator, 3, 5), tensors(generator, 2, 3 * 4)
    options = {"grid": (12, 17), "radius": 2, "text": text, "guidance": guidance, "guidance_grid": (3, 4)}
    whole = local_attention(query, key, value, **options, backend="sdpa")
    monkeypatch.setattr(sdpa, "MASK_ELEMENTS", 2000)
    monkeypatch.setattr(sdpa, "_kept_local_plan", sdpa._local_plan)
    same(local_attention(query, key, value, **options, backend="sdpa"), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_that_covers_the_grid_is_dense_attention(backend):
    generator = torch.Generator().manual_seed(9)
    grid = (6, 9)
    query, key, value = tensors(generator, 3, 54, dtype=torch.float32)
    text = tensors(generator, 3, 5, dtype=torch.float32)
    joint = [torch.cat([a, b], 1).transpose(1, 2) for a, b in zip(text, (query, key, value))]
    dense = torch.nn.functional.scaled_dot_product_attention(*joint).transpose(1, 2)
    expected = dense[:, 5:], dense[:, :5]
    exact = backend != "reference"
    npa = neighborhood_patch_attention(query, key, value, grid=grid, window=grid, text=text, backend=backend)
    same(npa, expected, tolerance=0 if exact else 1e-6)
    for form in ({"radius": 8}, {"window": 9}):
        local = local_attention(query, key, value, grid=grid, text=text, backend=backend, **form)
        same(local, expected, tolerance=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (8, 8), (5, 9), (16, 3)])
@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_permutations_with_inverses(order, grid):
    places = permutation(order, grid, (2, 3))
    tokens = torch.arange(grid[0] * grid[1])
    assert torch.equal(places.sort().values, tokens)
    assert torch.equal(places[inverse(places)], tokens)
    assert torch.equal(inverse(places)[places], tokens)


def test_hilbert_steps_to_a_neighbour_and_keeps_windows_together():
    places = permutation("hilbert", (16, 16))
    row, col = places // 16, places % 16
    steps = row.diff().abs() + col.diff().abs()
    assert steps.eq(1).all()
    for side in (2, 4, 8):
        windows = (row // side * 16 + col // side).view(-1, side * side)
        assert windows.eq(windows[:, :1]).all()
    first = permutation("window", (6, 6), (2, 3))[:6]
    assert first.tolist() == [0, 1, 2, 6, 7, 8]


@pytest.mark.parametrize("operation", ["npa", "local"])
def test_gradients_agree_between_backends(operation):
    generator = torch.Generator().manual_seed(2)
    grid = (6, 8)
    leaves = [*tensors(generator, 3, 48), *tensors(generator, 3, 3), *tensors(generator, 2, 12)]
    weights = tensors(generator, 1, 48)[0], tensors(generator, 1, 3)[0]
    shift = torch.tensor([[0, 1], [2, 1]])
    results = []
    for backend in BACKENDS:
        inputs = [x.clone().requires_grad_() for x in leaves]
        if operation == "npa":
            options = {"window": 4, "rope": positions(grid)[1], "shift": shift}
            used = 6
        else:
            options = {"radius": 2, "guidance": tuple(inputs[6:]), "guidance_grid": (3, 4)}
            used = 8
        call = neighborhood_patch_attention if operation == "npa" else local_attention
        image, text = call(*inputs[:3], grid=grid, text=tuple(inputs[3:6]), backend=backend, **options)
        loss = (image * weights[0]).sum() + (text * weights[1]).sum()
        results.append(torch.autograd.grad(loss, inputs[:used]))
    for given in results[1:]:
        same(given, results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", ["npa", "local"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_low_precision_errs_no_more_than_plain_pytorch(operation, dtype, backend):
    """kernel error <= 2 x error of plain low-precision PyTorch, both against float64, plus one rounding."""
    generator = torch.Generator().manual_seed(11)
    grid = (12, 16)
    half = [x.to(dtype) for x in (*tensors(generator, 3, 192, dim=32), *tensors(generator, 3, 7, dim=32))]

    def run(dtype, backend):
        inputs = [x.to(dtype) for x in half]
        common = {"grid": grid, "text": tuple(inputs[3:]), "backend": backend}
        if operation == "npa":
            return neighborhood_patch_attention(*inputs[:3], window=6, rope=positions(grid, 32)[1], **common)
        return local_attention(*inputs[:3], radius=3, **common)

    truth, plain, given = run(F64, "reference"), run(dtype, "reference"), run(dtype, backend)
    for exact, low, result in zip(truth, plain, given):
        assert result.dtype == dtype
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (result - exact).abs().max() <= 2 * (low - exact).abs().max() + rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_is_written_and_inputs_are_left_alone(backend, monkeypatch):
    """Fresh memory holds NaN: a token that is never written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    generator = torch.Generator().manual_seed(13)
    inputs = [*tensors(generator, 3, 11 * 7), *tensors(generator, 3, 3)]
    before = [x.clone() for x in inputs]
    torch.use_deterministic_algorithms(True)
    try:
        npa = neighborhood_patch_attention(
            *inputs[:3],
            grid=(11, 7),
            window=5,
            text=tuple(inputs[3:]),
            shift=torch.tensor([[2, 0], [1, 2]]),
            backend=backend,
        )
        local = local_attention(*inputs[:3], grid=(11, 7), radius=2, text=tuple(inputs[3:]), backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (*npa, *local))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_do_not_see_each_other(backend):
    generator = torch.Generator().manual_seed(17)
    query, key, value, *text = tensors(generator, 3, 80, batch=3) + tensors(generator, 3, 4, batch=3)
    shift = torch.tensor([[0, 2], [1, 1], [2, 0]])
    options = {"grid": (8, 10), "window": (4, 5), "backend": backend}
    together = neighborhood_patch_attention(query, key, value, text=tuple(text), shift=shift, **options)
    for b in range(3):
        one = slice(b, b + 1)
        alone = neighborhood_patch_attention(
            query[one], key[one], value[one], text=tuple(x[one] for x in text), shift=shift[one], **options
        )
        same(alone, (together[0][one], together[1][one]))


def test_rope_is_diffusers():
    from diffusers.models.embeddings import apply_rotary_emb

    generator = torch.Generator().manual_seed(19)
    cos, sin = (x.float() for x in positions((4, 5))[1])
    for dtype in (torch.float32, torch.bfloat16):
        x = tensors(generator, 1, 20, dtype=dtype)[0]
        assert torch.equal(apply_rope(x, (cos, sin)), apply_rotary_emb(x, (cos, sin), sequence_dim=1))


def call_npa(**changes):
    x = torch.zeros(1, 16, HEADS, DIM)
    options = {"grid": (4, 4), "window": 2} | changes
    tensor = options.pop("tensor", x)
    return neighborhood_patch_attention(x, tensor, x, **options)


def call_odd():
    x = torch.zeros(1, 16, HEADS, 7)
    return neighborhood_patch_attention(x, x, x, grid=(4, 4), window=2, rope=(torch.zeros(16, 7),) * 2)


def call_local(**changes):
    x = torch.zeros(1, 16, HEADS, DIM)
    return local_attention(x, x, x, **({"grid": (4, 4)} | changes))


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (call_npa, {"window": 5}, "window 5x5 is larger than the grid 4x4"),
        (call_npa, {"window": (4, 1)}, "window 4x1: a side must be at least 2"),
        (call_npa, {"grid": (4, 5)}, r"16 image tokens: a grid of 4x5 has 20; tensors are \(batch, tokens, heads"),
        (call_npa, {"tensor": torch.zeros(1, 15, HEADS, DIM)}, "must share one"),
        (call_npa, {"backend": "sdap"}, "unknown backend 'sdap': allowed: auto, "),
        (call_npa, {"text_rows": "mean"}, "unknown text_rows 'mean'"),
        (call_npa, {"text": (torch.zeros(1, 3, HEADS, DIM),) * 2}, r"must be \(query, key, value\)"),
        (call_npa, {"rope": (torch.zeros(4, DIM),) * 2}, r"rope of .* two of shape \(16, 8\)"),
        (call_npa, {"rope": (torch.zeros(16, DIM),)}, r"two of shape \(16, 8\)"),
        (call_odd, {}, "head_dim 7: rope turns pairs of channels: must be even"),
        (call_npa, {"tensor": torch.zeros(1, 16, HEADS, DIM, device="meta")}, "tensors on cpu, meta: must be on one"),
        (call_npa, {"shift": torch.tensor([[0, 2]])}, r"allowed: 0 … \[1, 1\]"),
        (call_npa, {"shift": torch.tensor([0, 1])}, r"integer tensor \(1, 2\)"),
        (call_local, {}, "give one of the two"),
        (call_local, {"radius": 1, "window": 2}, "give one of the two"),
        (call_local, {"radius": 0}, "radius 0: must be at least 1"),
        (call_local, {"radius": 1, "order": "peano"}, "unknown order 'peano': allowed: hilbert, window, raster"),
        (call_local, {"radius": 1, "guidance_grid": (2, 2)}, "go together"),
        (
            call_local,
            {"radius": 1, "guidance": (torch.zeros(1, 3, HEADS, DIM),) * 2, "guidance_grid": (2, 2)},
            r"guidance of .* two of shape \(1, 4, 2, 8\)",
        ),
    ],
)
def test_bad_input_is_one_clear_line(call, changes, message):
    with pytest.raises(KernelError, match=message) as error:
        call(**changes)
    assert "\n" not in str(error.value)


def test_the_check_that_chooses_explains(monkeypatch):
    from hires_kernels import backends

    problem = Problem("local_attention", torch.device("cpu"), torch.float32, 64)
    assert explain(problem)["reference"] is None
    picky = backends.Backend(backends.reference, "half only", lambda p: f"needs bfloat16, got {p.dtype}")
    monkeypatch.setattr(backends, "BACKENDS", {"picky": picky, **backends.BACKENDS})
    assert explain(problem)["picky"] == "needs bfloat16, got torch.float32"
    with pytest.raises(KernelError, match=r"'picky' can't run local_attention: needs bfloat16.*able: .*reference"):
        backends.choose("picky", problem)
    assert backends.choose("auto", problem) is backends.sdpa
    with pytest.raises(KernelError, match="unknown operation 'npa': allowed: neighborhood_patch_attention, "):
        explain(Problem("npa", torch.device("cpu"), torch.float32, 64))


def printed(code):
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout


def test_the_folder_kernels_is_not_the_package_kernels():
    lines = "import diffusers.utils as d, transformers.utils.import_utils as t"
    assert printed(f"{lines}; print(d.is_kernels_available(), t.is_kernels_available())").split() == ["False", "False"]


def test_importing_the_kernels_imports_torch_only():
    heavy = ("diffusers", "transformers", "hires", "triton")
    report = f"print([name for name in {heavy} if name in sys.modules])"
    assert printed(f"import sys, hires_kernels; {report}") == printed(f"import sys, torch; {report}")


def test_lists_of_tokens_are_kept(monkeypatch):
    """Made once for a geometry, in inference mode as well, and gradients go through them all the same."""
    from hires_kernels import sdpa

    generator = torch.Generator().manual_seed(5)
    image = [torch.randn(1, 10 * 14, 2, 8, generator=generator) for _ in range(3)]

    def run(tensors):
        npa, _ = neighborhood_patch_attention(*tensors, grid=(10, 14), window=(4, 6), backend="sdpa")
        local, _ = local_attention(*tensors, grid=(10, 14), radius=3, backend="sdpa")
        return npa, local

    with torch.inference_mode():
        first = run(image)
    monkeypatch.setattr(sdpa, "_npa_axis", None)
    monkeypatch.setattr(sdpa, "_local_axis", None)
    again = run([x.requires_grad_() for x in image])
    assert all(map(torch.equal, first, again))
    sum(x.sum() for x in again).backward()
    assert all(x.grad.abs().sum() > 0 for x in image)
