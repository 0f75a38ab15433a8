"""The operators `hires::…`: schema, fake tensors, gradients, whole compiled blocks, FLOPs."""

import math

import hires_kernels
import pytest
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from hires_kernels import KernelError, flops, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from hires.attention import use_attention
from hires.attention.bands import BandLayer, bands
from hires.attention.layers import AttentionHandle, Layer
from hires.attention.npa import NpaLayer, UNetNpaProcessor
from hires.errors import HiresError

F64 = torch.float64


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(generator, *shape, dtype=F64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def rope(generator, tokens, dim):
    angles = draw(generator, tokens, dim // 2).repeat_interleave(2, 1)
    return [angles.cos(), angles.sin()]


def npa_arguments(text=3, shift=False, text_rows="patch", backend="auto", grad=True):
    generator = torch.Generator().manual_seed(1)
    packed = draw(generator, 2, 6 * 8, 3, 2, 4).requires_grad_(grad)
    texts = [draw(generator, 2, text, 2, 4).requires_grad_(grad) for _ in range(3)] if text else []
    shifts = torch.tensor([[0, 1], [2, 1]]) if shift else None
    tables = rope(generator, 48, 4)
    return (*packed.unbind(2), texts, tables, shifts, [6, 8], [4, 4], text_rows, 0.5, backend, grad, [])


def local_arguments(text=3, guidance=True, backend="auto", grad=True):
    generator = torch.Generator().manual_seed(2)
    packed = draw(generator, 2, 6 * 8, 3, 2, 4).requires_grad_(grad)
    texts = [draw(generator, 2, text, 2, 4).requires_grad_(grad) for _ in range(3)] if text else []
    guides = [draw(generator, 2, 12, 2, 4).requires_grad_(grad) for _ in range(2)] if guidance else []
    guidance_grid = [3, 4] if guidance else []
    names = [6, 8], "radius", 2, guidance_grid, "row", "raster", 0.5, backend, grad
    return (*packed.unbind(2), texts, guides, *names)


def prologue_arguments(text=True, places=True, own_weights=True, grad=True):
    generator = torch.Generator().manual_seed(3)
    packed = draw(generator, 2, 15, 3, 2, 4).requires_grad_(grad)
    query, key, _ = packed.unbind(2)
    weights = [draw(generator, 4).requires_grad_(grad) for _ in range(4)]
    return (
        query[:, 3:],
        key[:, 3:],
        [query[:, :3], key[:, :3]] if text else [],
        weights[:2],
        weights[2:] if own_weights else [],
        rope(generator, 12, 4),
        torch.tensor([0, 5]) if places else None,
        1e-6,
        0.7,
        "auto",
        grad,
    )


CALLS = {
    "npa": (library.neighborhood_patch_attention, npa_arguments, {}),
    "npa, shift": (library.neighborhood_patch_attention, npa_arguments, {"shift": True}),
    "npa, no text": (library.neighborhood_patch_attention, npa_arguments, {"text": 0}),
    "npa, global": (library.neighborhood_patch_attention, npa_arguments, {"text_rows": "global"}),
    "npa, reference": (library.neighborhood_patch_attention, npa_arguments, {"backend": "reference"}),
    "local": (library.local_attention, local_arguments, {}),
    "local, image only": (library.local_attention, local_arguments, {"text": 0, "guidance": False}),
    "local, reference": (library.local_attention, local_arguments, {"backend": "reference"}),
    "prologue": (library.qk_norm_rope, prologue_arguments, {}),
    "prologue, plain text": (library.qk_norm_rope, prologue_arguments, {"places": False, "own_weights": False}),
    "prologue, no text": (
        library.qk_norm_rope,
        prologue_arguments,
        {"text": False, "places": False, "own_weights": False},
    ),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", CALLS)
def test_operators_pass_pytorchs_own_check(case, grad):
    """Schema, fake outputs (shapes, strides, dtypes), autograd registration, tracing with dynamic shapes."""
    operator, arguments, options = CALLS[case]
    torch.library.opcheck(operator._opoverload, arguments(**options, grad=grad))


@pytest.mark.parametrize("case", CALLS)
def test_gradients_are_those_of_the_plain_path(case):
    operator, arguments, options = CALLS[case]
    inputs = arguments(**options)
    flat = [x for argument in inputs for x in (argument if isinstance(argument, list) else [argument])]
    leaves = [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]
    name = operator._opoverload._schema.name.split("::")[1]

    def loss(outputs):
        generator = torch.Generator().manual_seed(7)
        return sum((x * draw(generator, *x.shape)).sum() for x in outputs if x is not None and x.numel())

    names = [argument.name for argument in operator._opoverload._schema.arguments]
    options = dict(zip(names, inputs))
    backend = options.pop("backend")
    options.pop("needs_grad")
    options = {k: tuple(v) or None if isinstance(v, list) else v for k, v in options.items()}
    expected = torch.autograd.grad(loss(getattr(hires_kernels.reference, name)(**options)), leaves)
    given = torch.autograd.grad(loss(operator(*inputs)), leaves)
    assert backend in ("auto", "reference")
    assert len(leaves) >= 3
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_a_backend_with_a_backward_is_given_its_residuals(monkeypatch):
    """A backend of the test, whose gradients come from its own outputs and log-sum-exp."""
    import types

    seen = []

    def forward(query, key, value, **options):
        image, text = hires_kernels.sdpa.local_attention(query, key, value, **options)
        batch, tokens, heads, _ = query.shape
        logsumexp = torch.full((batch, heads, tokens + options["text"][0].shape[1]), 3.0)
        return image, text, logsumexp

    def backward(grad_image, grad_text, image, text_output, logsumexp, query, key, value, *, text, guidance, **options):
        seen.append((grad_image.shape, grad_text.shape, image.shape, text_output.shape, logsumexp.unique().tolist()))
        return [torch.full_like(x, i) for i, x in enumerate((query, key, value, *text, *guidance))]

    own = types.ModuleType("own")
    own.local_attention = lambda *a, **k: forward(*a, **k)[:2]
    own.local_attention_with_logsumexp, own.local_attention_backward = forward, backward
    entry = hires_kernels.backends.Backend(own, "with a backward", lambda problem: None)
    monkeypatch.setattr(hires_kernels.backends, "BACKENDS", {"own": entry, **hires_kernels.BACKENDS})
    arguments = local_arguments(backend="own")
    torch.library.opcheck(library.local_attention._opoverload, arguments, test_utils=("test_faketensor",))
    image, text, _ = library.local_attention(*arguments)
    leaves = [*arguments[3], *arguments[4]]
    grads = torch.autograd.grad(image.sum() + text.sum(), leaves)
    assert [x.unique().tolist() for x in grads] == [[3.0], [4.0], [5.0], [6.0], [7.0]]
    assert seen == [(image.shape, text.shape, image.shape, text.shape, [3.0])]


def test_autocast_runs_attention_in_its_dtype():
    query, key, value, text, *_ = npa_arguments()
    half = [x.detach().float().requires_grad_() for x in (query, key, value, *text)]
    mixed = [half[0], half[1], half[2].detach().bfloat16().requires_grad_(), *half[3:]]
    with torch.autocast("cpu", torch.bfloat16):
        image, rows = hires_kernels.neighborhood_patch_attention(
            *mixed[:3], grid=(6, 8), window=4, text=tuple(mixed[3:])
        )
    assert image.dtype == rows.dtype == torch.bfloat16
    grads = torch.autograd.grad(image.float().sum() + rows.float().sum(), mixed)
    assert [x.dtype for x in grads] == [x.dtype for x in mixed]


# Compiled models


def small_flux():
    torch.manual_seed(0)
    return (
        FluxTransformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        .eval()
        .requires_grad_(False)
    )


def flux_inputs(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    height, width = size[0] // 2, size[1] // 2
    row, col = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {
        "hidden_states": draw(generator, 1, height * width, 8, dtype=torch.float32),
        "encoder_hidden_states": draw(generator, 1, 5, 16, dtype=torch.float32),
        "pooled_projections": draw(generator, 1, 16, dtype=torch.float32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.stack([torch.zeros_like(row), row, col], -1).view(-1, 3).float(),
        "txt_ids": torch.zeros(5, 3),
    }


def blocks(model):
    return [m for m in model.modules() if isinstance(m, (FluxTransformerBlock, FluxSingleTransformerBlock))]


def test_compiled_flux_blocks_have_no_break_and_recompile_for_a_new_geometry_only():
    """The double and the single block compile once each for every geometry, however often a context is entered."""
    model, graphs = small_flux(), CompileCounterWithBackend("aot_eager")
    for block in blocks(model):
        block.compile(fullgraph=True, dynamic=False, backend=graphs)

    def run(size, kind, base_size):
        inputs = flux_inputs(size)
        with use_attention(model, kind, size=size, base_size=base_size):
            with torch.compiler.set_stance("force_eager"):
                expected = model(**inputs, return_dict=False)[0]
            before = graphs.frame_count
            given = model(**inputs, return_dict=False)[0]
        assert torch.equal(given, expected)
        return graphs.frame_count - before

    assert run((16, 24), "dense", (8, 12)) == 2
    assert run((16, 24), "npa", (8, 12)) == 2
    assert run((16, 24), "npa", (8, 12)) == 0
    assert run((16, 24), "dense", (8, 12)) == 0
    assert run((24, 24), "npa", (8, 12)) == 2
    assert run((24, 24), "npa", (8, 8)) == 2
    assert run((16, 24), "npa", (8, 12)) == 0
    assert run((24, 24), "npa", (8, 12)) == 0


def test_a_compiled_block_is_one_graph_with_the_operators_as_nodes():
    model, nodes = small_flux(), []

    def backend(graph, inputs):
        nodes.append([node.target for node in graph.graph.nodes if "hires" in str(node.target)])
        return graph

    for block in blocks(model):
        block.compile(fullgraph=True, backend=backend)
    with use_attention(model, "npa", size=(16, 16), base_size=(8, 8)):
        model(**flux_inputs((16, 16)))
    wanted = {torch.ops.hires.qk_norm_rope.default, torch.ops.hires.neighborhood_patch_attention.default}
    assert [set(found) for found in nodes] == [wanted, wanted]


def test_a_compiled_block_of_a_band_is_one_graph():
    """Here the only band. Its operator also has the exchange in it."""
    model, nodes = small_flux(), []

    def backend(graph, inputs):
        nodes.append({node.target for node in graph.graph.nodes if "hires" in str(node.target)})
        return graph

    with use_attention(model, "npa", size=(16, 16), base_size=(8, 8)):
        expected = model(**flux_inputs((16, 16)))[0]
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            rope = model.pos_embed(flux_inputs((16, 16))["img_ids"])
            for block in blocks(model):
                block.attn.processor.operation = BandLayer(block.attn.processor.operation, rope, bands(8, 4, 1))
                block.compile(fullgraph=True, backend=backend)
            given = model(**flux_inputs((16, 16)))[0]
        finally:
            dist.destroy_process_group()
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
    assert nodes == [{torch.ops.hires.qk_norm_rope.default, torch.ops.hires.band_attention.default}] * 2


def test_shifts_of_every_step_run_in_one_graph():
    model, graphs = small_flux(), CompileCounterWithBackend("aot_eager")
    single = blocks(model)[-1]
    single.compile(fullgraph=True, backend=graphs)
    shifts = torch.randint(0, 3, (6, 3, 1, 2), generator=torch.Generator().manual_seed(5))
    inputs, counts = flux_inputs((16, 16)), []
    with use_attention(model, "npa", size=(16, 16), base_size=(8, 8), shifts=shifts) as handle:
        for step in range(6):
            handle.step = step
            given = model(**inputs, return_dict=False)[0]
            with torch.compiler.set_stance("force_eager"):
                assert torch.equal(given, model(**inputs, return_dict=False)[0])
            counts.append(graphs.frame_count)
    assert counts == [1] * 6


def test_training_through_a_compiled_block():
    model = small_flux()
    single = blocks(model)[-1].requires_grad_(True)
    inputs, grads = flux_inputs((16, 16)), []
    for compiled in (False, True):
        if compiled:
            single.compile(fullgraph=True, backend="aot_eager")
        with use_attention(model, "npa", size=(16, 16), base_size=(8, 8)):
            loss = model(**inputs, return_dict=False)[0].square().mean()
            grads.append(torch.autograd.grad(loss, list(single.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert all(x.abs().max() > 0 for x in grads[1])


def test_compiled_unet_block():
    torch.manual_seed(3)
    block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=16).eval().requires_grad_(False)
    layer = Layer("attn1", (8, 12), (4, 6))
    block.attn1.set_processor(
        UNetNpaProcessor(block.attn1.processor, NpaLayer(layer, AttentionHandle([layer]), None, "patch", "auto"))
    )
    hidden, context = torch.randn(2, 96, 32), torch.randn(2, 7, 16)
    expected = block(hidden, encoder_hidden_states=context)
    block.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(block(hidden, encoder_hidden_states=context), expected)


def test_a_wrong_input_to_a_compiled_model_is_still_one_line():
    model = small_flux()
    for block in blocks(model):
        block.compile(backend="eager")
    with use_attention(model, "npa", size=(16, 16), base_size=(8, 8)), pytest.raises(HiresError, match="its grid 8x8"):
        model(**flux_inputs((24, 16)))


def test_shift_is_checked_when_it_runs():
    arguments = list(npa_arguments(grad=False))
    arguments[5] = torch.tensor([[0, 3], [0, 0]])
    with pytest.raises(KernelError, match=r"shift \[\[0, 3\], \[0, 0\]\]: allowed: 0 … \[2, 2\]"):
        library.neighborhood_patch_attention(*arguments)


# FLOPs


def npa_by_hand(grid, window, text, shifted):
    """Pairs of query and key, patch by patch: (image rows, text rows)."""
    image = texts = 0
    counts = []
    for side, extra in zip(grid, window):
        patch = extra // 2
        counts.append(math.ceil((side + (patch if shifted else 0)) / patch))
    for _ in range(grid[0] * grid[1]):
        image += window[0] * window[1] + text
    for _ in range(counts[0] * counts[1]):
        texts += text * (window[0] * window[1] + text)
    return image, texts


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window", "text"), [((8, 12), (4, 4), 5), ((11, 13), (5, 7), 3), ((9, 6), (4, 2), 0)])
def test_npa_flops_by_hand(grid, window, text, shifted):
    given = flops.neighborhood_patch_attention(grid, window, batch=2, heads=3, head_dim=32, text=text, shifted=shifted)
    assert given == tuple(4 * 2 * 3 * 32 * pairs for pairs in npa_by_hand(grid, window, text, shifted))


def test_npa_flops_of_a_window_that_covers_the_grid_are_those_of_dense_attention():
    given = flops.neighborhood_patch_attention((6, 9), (6, 9), batch=1, heads=2, head_dim=32, text=5)
    assert sum(given) == flops.dense_attention(54 + 5, batch=1, heads=2, head_dim=32)


def test_local_flops_by_hand():
    grid, low, radius = (7, 10), (3, 5), 2
    pairs = 0
    for r in range(7):
        for c in range(10):
            pairs += sum(abs(i - r) <= radius and abs(j - c) <= radius for i in range(7) for j in range(10))
            side = max(1, 4 * 3 // 7), max(1, 4 * 5 // 10)
            own = r * 3 // 7 // side[0], c * 5 // 10 // side[1]
            pairs += sum(i // side[0] == own[0] and abs(j // side[1] - own[1]) <= 1 for i in range(3) for j in range(5))
            pairs += 6
    given = flops.local_attention(grid, "radius", radius, batch=2, heads=3, head_dim=32, text=6, guidance_grid=low)
    assert given == (4 * 2 * 3 * 32 * pairs, 4 * 2 * 3 * 32 * 6 * 76)


def test_flops_of_the_papers_sizes():
    """FLUX and SDXL layers in TFLOP, worked out from the definitions."""
    flux = {"batch": 1, "heads": 24, "head_dim": 128, "text": 512}
    image, text = flops.neighborhood_patch_attention((256, 256), (64, 64), **flux)
    assert (round(image / 1e12, 2), round(text / 1e12, 2)) == (3.71, 1.86)
    _, text = flops.neighborhood_patch_attention((256, 256), (64, 64), text_rows="global", **flux)
    assert round(text / 1e12, 2) == 0.42
    for grid, window, heads in (((256, 256), 64, 10), ((128, 128), 32, 20)):
        image, _ = flops.neighborhood_patch_attention(grid, (window, window), batch=2, heads=heads, head_dim=64)
        assert image == 4 * 2 * heads * 64 * grid[0] * grid[1] * window**2
    for side, total in ((256, 1.09), (512, 4.37)):
        given = flops.local_attention((side, side), "radius", 8, guidance_grid=(side // 4, side // 4), **flux)
        assert round(sum(given) / 1e12, 2) == total


def test_the_flop_counter_counts_what_the_method_needs():
    hires_kernels.register_flop_formulas()
    hires_kernels.register_flop_formulas()  # a second time changes nothing
    for shift in (None, torch.tensor([[1, 1]])):
        x = torch.randn(1, 96, 2, 32)
        text = tuple(torch.randn(3, 1, 5, 2, 32))
        with FlopCounterMode(display=False) as counter:
            hires_kernels.neighborhood_patch_attention(x, x, x, grid=(8, 12), window=4, text=text, shift=shift)
        assert counter.get_total_flops() == 4 * 2 * 32 * sum(npa_by_hand((8, 12), (4, 4), 5, shift is not None))
    guidance = torch.randn(1, 6, 2, 32), torch.randn(1, 6, 2, 32)
    with FlopCounterMode(display=False) as counter:
        hires_kernels.local_attention(
            x, x, x, grid=(8, 12), radius=2, text=text, guidance=guidance, guidance_grid=(2, 3)
        )
    needed = flops.local_attention((8, 12), "radius", 2, batch=1, heads=2, head_dim=32, text=5, guidance_grid=(2, 3))
    assert counter.get_total_flops() == sum(needed)


# Fused backends, in Triton's interpreter


def wider(arguments, grad):
    """The same call on float32 tensors of 32 channels, which the kernels take."""

    def cast(x):
        if isinstance(x, list):
            return [cast(y) for y in x]
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().float().repeat_interleave(8, -1).requires_grad_(x.requires_grad and grad)

    return [cast(x) for x in arguments]


@pytest.mark.parametrize(
    ("operator", "arguments", "grad"),
    [
        (library.neighborhood_patch_attention, npa_arguments(backend="triton", grad=False), False),
        (library.local_attention, local_arguments(backend="triton"), True),
        (library.local_attention, local_arguments(backend="triton", text=0, guidance=False), True),
    ],
    ids=["npa", "local", "local, image only"],
)
def test_fused_operators_pass_pytorchs_own_check(operator, arguments, grad):
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(operator._opoverload, tuple(wider(arguments, grad)), test_utils=checks)
