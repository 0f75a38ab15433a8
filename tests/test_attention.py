"""Attention kinds inside whole tiny models of the real classes, in float64, against brute-force processors."""

import itertools
import math
from copy import deepcopy

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from peft import LoraConfig
from tiny_flux2 import build_transformer

from hires.attention import attention_layers, draw_shifts, use_attention
from hires.errors import HiresError

F64 = torch.float64


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return lively(model)


@pytest.fixture(scope="module")
def flux2():
    torch.manual_seed(2)
    return lively(build_transformer(in_channels=8, num_layers=2, joint_attention_dim=16))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(1)
    model = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 1, 2),
        cross_attention_dim=16,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return lively(model)


def lively(model):
    """Larger query and key weights: at their initial size attention is a mean, and windows would hardly show."""
    for name, parameter in model.named_parameters():
        if (
            any(part in name for part in ("to_q.w", "to_k.w", "add_q_proj.w", "add_k_proj.w", "qkv_mlp"))
            and "attn2" not in name
        ):
            parameter.data *= 6
    return model.double().eval().requires_grad_(False)


def flux_inputs(size, batch=2, text=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    height, width = size[0] // 2, size[1] // 2
    row, col = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {
        "hidden_states": draw(batch, height * width, 8),
        "encoder_hidden_states": draw(batch, text, 16),
        "pooled_projections": draw(batch, 16),
        "timestep": torch.rand(batch, generator=generator, dtype=F64),
        "guidance": torch.full((batch,), 3.5, dtype=F64),
        "img_ids": torch.stack([torch.zeros_like(row), row, col], -1).view(-1, 3).double(),
        "txt_ids": torch.zeros(text, 3, dtype=F64),
    }


def flux2_inputs(size, batch=2, text=5, seed=0):
    inputs = flux_inputs(size, batch, text, seed)
    del inputs["pooled_projections"], inputs["guidance"]
    inputs["img_ids"] = torch.nn.functional.pad(inputs["img_ids"], (0, 1))
    inputs["txt_ids"] = torch.nn.functional.pad(torch.arange(text, dtype=F64)[:, None], (3, 0))
    return inputs


def unet_inputs(size, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    conditions = {"text_embeds": draw(batch, 16), "time_ids": draw(batch, 6)}
    return {
        "sample": draw(batch, 4, *size),
        "timestep": torch.tensor(400),
        "encoder_hidden_states": draw(batch, 7, 16),
        "added_cond_kwargs": conditions,
    }


MAKE = {"flux": flux_inputs, "flux2": flux2_inputs, "unet": unet_inputs}


@pytest.fixture(params=["flux", "flux2"])
def joint(request):
    """A model of joint attention, and what makes its inputs."""
    return request.getfixturevalue(request.param), MAKE[request.param]


def run(model, inputs):
    return model(**inputs, return_dict=False)[0]


SHARED = ("img_ids", "txt_ids")  # of no sample in particular


def each(inputs, change):
    """The inputs with `change` applied to whatever has a batch."""
    result = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            result[name] = each(value, change)
        else:
            result[name] = value if name in SHARED or value.ndim == 0 else change(value)
    return result


# The brute force: every patch lists its keys, softmax is written out.


def weigh(query, keys, values):
    scores = torch.einsum("qhd,khd->qhk", query, keys) / math.sqrt(query.shape[-1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("qhk,khd->qhd", weights, values) / weights.sum(-1)[..., None]


def turn(x, table):
    """RoPE as a complex product, table = (cos, sin) of each token or of one."""
    factor = torch.complex(table[0][..., ::2].double(), table[1][..., ::2].double())
    factor = factor if factor.ndim == 1 else factor[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * factor).flatten(-2)


def patchwise(query, key, value, grid, window, text=None, place=None):
    """One sample, image tensors (tokens, heads, dim) with query and key rotated, text ones not.

    place: (row, column) -> RoPE tables of the text tokens that stand there.
    """
    out, text_outs = torch.zeros_like(query), []
    side = [w // 2 for w in window]
    for patch in itertools.product(*(range(math.ceil(g / s)) for g, s in zip(grid, side))):
        tokens = [
            r * grid[1] + c for r in range(grid[0]) for c in range(grid[1]) if (r // side[0], c // side[1]) == patch
        ]
        start = [min(max(p * s - w // 4, 0), g - w) for p, s, w, g in zip(patch, side, window, grid)]
        seen = [
            r * grid[1] + c
            for r in range(start[0], start[0] + window[0])
            for c in range(start[1], start[1] + window[1])
        ]
        keys, values = key[seen], value[seen]
        if text is not None:
            corner = place(*start)
            keys, values = torch.cat([turn(text[1], corner), keys]), torch.cat([text[2], values])
            text_outs.append(weigh(turn(text[0], corner), keys, values))
        out[tokens] = weigh(query[tokens], keys, values)
    return out, sum(text_outs) / len(text_outs) if text_outs else None


class BruteFlux:
    """Double and single blocks of FLUX.1, double blocks of FLUX.2."""

    def __init__(self, model, grid, window):
        self.pos_embed, self.grid, self.window = model.pos_embed, grid, window
        self.axes = len(model.config.axes_dims_rope)

    def text_tables(self, tokens, row, col):
        """FLUX.1's text stands at (0, row, column), FLUX.2's at (0, row, column, index)."""
        return self.pos_embed(torch.tensor([(0, row, col, i)[: self.axes] for i in range(tokens)], dtype=F64))

    def attend(self, heads, text, image_rotary_emb):
        tables = [table[-self.grid[0] * self.grid[1] :] for table in image_rotary_emb]

        def place(row, col):
            return self.text_tables(text[0].shape[1], row, col)

        outputs = [
            patchwise(turn(q, tables), turn(k, tables), v, self.grid, self.window, (tq, tk, tv), place)
            for q, k, v, tq, tk, tv in zip(*heads, *text)
        ]
        return (torch.stack(x).flatten(2) for x in zip(*outputs))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        heads = [f(hidden_states).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v)]
        heads[0], heads[1] = attn.norm_q(heads[0]), attn.norm_k(heads[1])
        if encoder_hidden_states is not None:
            added = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
            text = [f(encoder_hidden_states).unflatten(-1, (attn.heads, -1)) for f in added]
            text[0], text[1] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
        else:
            heads, text = self.apart(heads)
        image, text = self.attend(heads, text, image_rotary_emb)
        if encoder_hidden_states is None:
            return torch.cat([text, image], 1)
        return attn.to_out[0](image), attn.to_add_out(text)

    def apart(self, heads):
        tokens = self.grid[0] * self.grid[1]
        return [x[:, -tokens:] for x in heads], [x[:, :-tokens] for x in heads]


class BruteFlux2Single(BruteFlux):
    """FLUX.2's single blocks, row by row of the weight that the MLP shares."""

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        *heads, gate, mlp = attn.to_qkv_mlp_proj(hidden_states).split(
            [attn.inner_dim] * 3 + [attn.mlp_hidden_dim] * 2, -1
        )
        heads = [x.unflatten(-1, (attn.heads, -1)) for x in heads]
        heads[0], heads[1] = attn.norm_q(heads[0]), attn.norm_k(heads[1])
        image, text = self.attend(*self.apart(heads), image_rotary_emb)
        return attn.to_out(torch.cat([torch.cat([text, image], 1), torch.nn.functional.silu(gate) * mlp], -1))


class BruteUNet:
    """Finds its grid by counting tokens."""

    def __init__(self, size, base_size):
        self.grids = {}
        while min(size) > 1:
            self.grids[size[0] * size[1]] = size, base_size
            size, base_size = (tuple(math.ceil(x / 2) for x in s) for s in (size, base_size))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        grid, window = self.grids[hidden_states.shape[1]]
        heads = [f(hidden_states).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v)]
        image = torch.stack([patchwise(q, k, v, grid, window)[0] for q, k, v in zip(*heads)])
        return attn.to_out[0](image.flatten(2))


class brute:
    """Installs brute-force processors on the self-attention of a model."""

    def __init__(self, model, size, base_size):
        self.model, self.size, self.base_size = model, size, base_size

    def __enter__(self):
        self.former = self.model.attn_processors
        if isinstance(self.model, FluxTransformer2DModel | Flux2Transformer2DModel):
            halves = [tuple(x // 2 for x in s) for s in (self.size, self.base_size)]
            single = BruteFlux2Single if isinstance(self.model, Flux2Transformer2DModel) else BruteFlux
            ours = {n: (single if "single" in n else BruteFlux)(self.model, *halves) for n in self.former}
        else:
            processor = BruteUNet(self.size, self.base_size)
            ours = {n: processor if "attn1" in n else p for n, p in self.former.items()}
        self.model.set_attn_processor(ours)

    def __exit__(self, *_):
        self.model.set_attn_processor(self.former)


def close(given, expected, tolerance=1e-9):
    torch.testing.assert_close(given, expected, rtol=0, atol=tolerance * expected.abs().max().item())


FLUX_SIZES = [((8, 12), 1), ((8, 12), 2), ((12, 8), 3), ((10, 14), 2)]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(("base", "s"), FLUX_SIZES)
def test_flux_npa_is_the_brute_force(joint, base, s, backend):
    (flux, make), size = joint, (base[0] * s, base[1] * s)
    inputs = make(size)
    with brute(flux, size, base):
        expected = run(flux, inputs)
    with use_attention(flux, "npa", size=size, base_size=base, backend=backend):
        given = run(flux, inputs)
    close(given, expected, 1e-9 if s > 1 else 1e-6)  # s = 1 is diffusers' own attention, whose RoPE is float32
    if s > 1:
        assert (given - run(flux, inputs)).abs().max() > 1e-3 * given.abs().max()


def test_flux_grid_that_no_patch_divides(joint):
    (flux, make), size, base = joint, (22, 26), (10, 14)
    inputs = make(size)
    with brute(flux, size, base):
        expected = run(flux, inputs)
    with use_attention(flux, "npa", size=size, base_size=base):
        close(run(flux, inputs), expected)


@pytest.mark.parametrize(
    ("base", "size"),
    [((8, 12), (8, 12)), ((8, 12), (16, 24)), ((12, 8), (36, 24)), ((6, 10), (13, 19)), ((9, 9), (9, 30))],
)
def test_unet_npa_is_the_brute_force(unet, base, size):
    inputs = unet_inputs(size)
    with brute(unet, size, base):
        expected = run(unet, inputs)
    with use_attention(unet, "npa", size=size, base_size=base):
        given = run(unet, inputs)
    close(given, expected)
    if size != base:
        assert (given - run(unet, inputs)).abs().max() > 1e-5 * given.abs().max()


@pytest.mark.parametrize("size", [(8, 8), (13, 10), (9, 14)])
def test_unet_layers_are_those_that_run_in_their_order(unet, size):
    layers = attention_layers(unet, size, size)
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: seen.append((name, args[0].shape[1])))
        for name, module in unet.named_modules()
        if name.endswith("attn1")
    ]
    run(unet, unet_inputs(size))
    for hook in hooks:
        hook.remove()
    assert seen == [(layer.name, layer.grid[0] * layer.grid[1]) for layer in layers]
    assert {layer.grid for layer in layers} == {tuple(math.ceil(x / 2**k) for x in size) for k in (1, 2)}


def test_flux_layers_are_all_blocks(joint):
    flux, _ = joint
    layers = attention_layers(flux, (32, 48), (16, 24))
    names = [f"{stem}transformer_blocks.{i}.attn" for stem in ("", "single_") for i in (0, 1)]
    assert [layer.name for layer in layers] == names
    assert {(layer.grid, layer.window) for layer in layers} == {((16, 24), (8, 12))}


@pytest.mark.parametrize("base", [(8, 12), (16, 16)])
def test_no_upscaling_is_the_dense_model_to_the_bit(flux, flux2, unet, base):
    for model, make in ((flux, flux_inputs), (flux2, flux2_inputs), (unet, unet_inputs)):
        inputs = make((8, 12))
        dense = run(model, inputs)
        with use_attention(model, "npa", size=(8, 12), base_size=base) as handle:
            assert torch.equal(run(model, inputs), dense)
        assert all(layer.dense for layer in handle.layers)


def identities(model):
    return {name: id(processor) for name, processor in model.attn_processors.items()}


def test_processors_come_back_also_after_an_exception(flux, flux2, unet):
    for model in (flux, flux2, unet):
        before = identities(model)
        with pytest.raises(RuntimeError, match="inside"), use_attention(model, "npa", size=(16, 16), base_size=(8, 8)):
            during = identities(model)
            raise RuntimeError("inside")
        assert identities(model) == before
        changed = {name for name in before if during[name] != before[name]}
        assert changed == {name for name in before if model is not unet or "attn1" in name}


def test_contexts_nest(flux):
    inputs, sizes = flux_inputs((16, 16)), {"size": (16, 16), "base_size": (8, 8)}
    dense = run(flux, inputs)
    with use_attention(flux, "npa", **sizes):
        outer = run(flux, inputs)
        middle = identities(flux)
        with use_attention(flux, "dense", **sizes):
            assert torch.equal(run(flux, inputs), dense)
        with use_attention(flux, "npa", size=(16, 16), base_size=(12, 12)):
            inner = run(flux, inputs)
        assert identities(flux) == middle
        assert torch.equal(run(flux, inputs), outer)
    assert torch.equal(run(flux, inputs), dense)
    with use_attention(flux, "npa", size=(16, 16), base_size=(12, 12)):
        assert torch.equal(run(flux, inputs), inner)
    assert not torch.equal(inner, outer)


def test_processors_look_like_diffusers_own(flux):
    with use_attention(flux, "npa", size=(16, 16), base_size=(8, 8)):
        for processor in flux.attn_processors.values():
            assert processor._attention_backend is None
            assert processor._parallel_config is None


@pytest.mark.parametrize("name", ["flux", "flux2", "unet"])
def test_samples_of_a_batch_keep_their_own_shifts(name, request):
    model = request.getfixturevalue(name)
    sizes = {"size": (16, 24), "base_size": (8, 12)}
    inputs = MAKE[name]((16, 24))
    layers = attention_layers(model, **sizes)
    shifts = draw_shifts([torch.Generator().manual_seed(seed) for seed in (5, 6)], 3, layers)
    with use_attention(model, "npa", **sizes, shifts=shifts) as handle:
        handle.step = 2
        together = run(model, inputs)
        doubled = run(model, each(inputs, lambda x: torch.cat([x, x])))  # as CFG does
        handle.step = 1
        assert not torch.allclose(run(model, inputs), together)
    close(doubled, together.repeat(2, *[1] * (together.ndim - 1)))
    for index in (0, 1):
        with use_attention(model, "npa", **sizes, shifts=shifts[:, :, index : index + 1]) as handle:
            handle.step = 2
            alone = run(model, each(inputs, lambda x, index=index: x[index : index + 1]))
            close(alone, together[index : index + 1])


def test_shifts_belong_to_the_image(flux):
    layers = attention_layers(flux, (32, 48), (8, 12))
    table = draw_shifts([torch.Generator().manual_seed(seed) for seed in (1, 2, 3)], 50, layers)
    assert table.shape == (50, 4, 3, 2)
    assert table.dtype == torch.int64
    alone = draw_shifts([torch.Generator().manual_seed(2)], 50, layers)
    assert torch.equal(table[:, :, 1], alone[:, :, 0])
    for axis, window in enumerate((4, 6)):
        assert table[..., axis].unique().tolist() == list(range(window // 2 + 1))
        share = table[..., axis].eq(0).double().mean()
        assert abs(share - 1 / (window // 2 + 1)) < 0.08


def test_text_rows_and_backends_are_passed_on(joint):
    flux, make = joint
    inputs, sizes = make((16, 16)), {"size": (16, 16), "base_size": (8, 8)}
    outputs = {}
    for rows, backend in itertools.product(("patch", "global"), ("auto", "sdpa", "reference")):
        with use_attention(flux, "npa", **sizes, text_rows=rows, backend=backend):
            outputs[rows, backend] = run(flux, inputs)
    for rows in ("patch", "global"):
        close(outputs[rows, "sdpa"], outputs[rows, "reference"])
        assert torch.equal(outputs[rows, "auto"], outputs[rows, "sdpa"])
    assert not torch.allclose(outputs["patch", "sdpa"], outputs["global", "sdpa"], atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "flux2", "unet"])
def test_fused_projections_are_used(name, request):
    model = deepcopy(request.getfixturevalue(name))
    inputs, sizes = MAKE[name]((16, 16)), {"size": (16, 16), "base_size": (8, 8)}
    with use_attention(model, "npa", **sizes):
        apart = run(model, inputs)
    model.fuse_qkv_projections()
    with use_attention(model, "npa", **sizes) as handle:
        close(run(model, inputs), apart)
        fused = [m.to_qkv for m in map(model.get_submodule, [x.name for x in handle.layers]) if m.fused_projections]
        fused[-1].weight.data *= 2
        assert not torch.allclose(run(model, inputs), apart)


def test_lora_works_inside(joint):
    flux, make = joint
    inputs, sizes = make((16, 16)), {"size": (16, 16), "base_size": (8, 8)}
    with use_attention(flux, "npa", **sizes):
        plain = run(flux, inputs)
    adapted = deepcopy(flux)
    adapted.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_out.0", "to_qkv_mlp_proj"], init_lora_weights=False)
    )
    adapted.double()
    with brute(adapted, (16, 16), (8, 8)):
        expected = run(adapted, inputs)
    with use_attention(adapted, "npa", **sizes):
        given = run(adapted, inputs)
    close(given, expected)
    assert (given - plain).abs().max() > 1e-3 * plain.abs().max()


def test_flux_ip_adapter_keeps_weights_and_term(flux):
    torch.manual_seed(4)
    stock_processors = flux.attn_processors
    adapters = {
        name: FluxIPAdapterAttnProcessor(64, 16, num_tokens=(3, 2), scale=[0.7, 0.4]).double()
        if name.startswith("transformer_blocks")
        else FluxAttnProcessor()
        for name in stock_processors
    }
    inputs, sizes = flux_inputs((16, 16)), {"size": (16, 16), "base_size": (8, 8)}
    prompts = [torch.randn(2, 3, 16, dtype=F64), torch.randn(2, 2, 16, dtype=F64)]
    block = flux.transformer_blocks[0].attn
    states = torch.randn(2, 64, 64, dtype=F64), torch.randn(2, 5, 64, dtype=F64)
    rope = flux.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))

    def call():
        return block(*states, image_rotary_emb=rope, ip_hidden_states=prompts)

    with use_attention(flux, "npa", **sizes):
        without = run(flux, inputs)
        bare = call()
    flux.set_attn_processor(dict(adapters))
    try:
        parameters = {id(p) for p in flux.parameters()}
        weights = {name: tensor.clone() for name, tensor in flux.state_dict().items()}
        stock = call()
        with use_attention(flux, "npa", **sizes):
            assert {id(p) for p in flux.parameters()} == parameters
            given = call()
            with_prompt = flux(**inputs, joint_attention_kwargs={"ip_hidden_states": prompts}, return_dict=False)[0]
        assert flux.attn_processors == adapters
        assert weights.keys() == flux.state_dict().keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in flux.state_dict().items())
    finally:
        flux.set_attn_processor(stock_processors)
    assert len(given) == 3
    close(given[2], stock[2])
    assert torch.equal(given[0], bare[0])
    assert torch.equal(given[1], bare[1])
    assert (with_prompt - without).abs().max() > 1e-3 * without.abs().max()


def test_blocks_compile_as_one_graph(joint):
    flux, make = joint
    compiled = deepcopy(flux)
    inputs, sizes = make((16, 16)), {"size": (16, 16), "base_size": (8, 8)}
    for blocks in (compiled.transformer_blocks, compiled.single_transformer_blocks):
        blocks[1].compile(backend="eager", fullgraph=True)
    with torch.no_grad(), use_attention(flux, "npa", **sizes), use_attention(compiled, "npa", **sizes):
        close(run(compiled, inputs), run(flux, inputs))


def test_gradients_reach_the_weights(flux):
    inputs = flux_inputs((16, 16), batch=1)
    weight = flux.single_transformer_blocks[0].attn.to_k.weight.requires_grad_()
    try:
        with use_attention(flux, "npa", size=(16, 16), base_size=(8, 8)):
            (gradient,) = torch.autograd.grad(run(flux, inputs).square().mean(), weight)
            close_by = torch.zeros_like(weight)
            close_by[3, 5] = 1e-5
            values = []
            for sign in (1, -1):
                weight.data += sign * close_by
                values.append(run(flux, inputs).square().mean().item())
                weight.data -= sign * close_by
    finally:
        weight.requires_grad_(False)
    assert math.isclose((values[0] - values[1]) / 2e-5, gradient[3, 5].item(), rel_tol=1e-4, abs_tol=1e-10)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("nap", {}, "unknown attention kind 'nap': did you mean 'npa'"),
        ("npa", {"text_row": "patch"}, "unknown option of 'npa' attention 'text_row': did you mean 'text_rows'"),
        ("dense", {"backend": "sdpa"}, "unknown option of 'dense' attention 'backend'"),
        ("npa", {"text_rows": "glob"}, "unknown text_rows 'glob'"),
        ("npa", {"backend": "sdap"}, "unknown attention backend 'sdap': did you mean 'sdpa'"),
        ("npa", {"base_size": (8, 32)}, "larger than its grid 8x8 along one axis"),
        ("npa", {"base_size": (2, 8)}, "window 1x4 .* at least 2 tokens a side"),
        ("npa", {"size": (15, 16)}, "sides must be even"),
        ("npa", {"size": (0, 16)}, "at least 1"),
        ("npa", {"shifts": torch.zeros(3, 2, 1, 2)}, r"must be \(steps, 4, batch, 2\)"),
    ],
)
def test_bad_input_is_one_clear_line(flux, kind, options, message):
    before = identities(flux)
    options = {"size": (16, 16), "base_size": (8, 8)} | options
    with pytest.raises(HiresError, match=message) as error, use_attention(flux, kind, **options):
        pass
    assert "\n" not in str(error.value)
    assert identities(flux) == before


def test_calls_that_do_not_fit_the_context(flux, unet):
    sizes = {"size": (16, 16), "base_size": (8, 8)}
    for model, inputs in ((flux, flux_inputs((16, 20))), (unet, unet_inputs((16, 20)))):
        with pytest.raises(HiresError, match="image tokens, its grid"), use_attention(model, "npa", **sizes):
            run(model, inputs)
    layers = attention_layers(flux, **sizes)
    shifts = draw_shifts([torch.Generator().manual_seed(seed) for seed in range(3)], 2, layers)
    with use_attention(flux, "npa", **sizes, shifts=shifts) as handle:
        with pytest.raises(HiresError, match="a batch of 2: shifts were drawn for 3 images"):
            run(flux, flux_inputs((16, 16)))
        handle.step = 2
        with pytest.raises(HiresError, match=r"step 2: shifts were drawn for the steps 0 … 1"):
            run(flux, flux_inputs((16, 16)))
    mask = torch.ones(2, 16 * 16, dtype=F64)
    with pytest.raises(HiresError, match="attention mask"), use_attention(unet, "npa", **sizes):
        unet(**unet_inputs((16, 16)), attention_mask=mask)


def test_foreign_models_and_processors_are_refused(flux):
    with pytest.raises(HiresError, match="Linear: allowed: FluxTransformer2DModel"):
        attention_layers(torch.nn.Linear(1, 1), (8, 8), (8, 8))
    with (
        brute(flux, (16, 16), (8, 8)),
        pytest.raises(HiresError, match=r"transformer_blocks.0.attn has a BruteFlux"),
        use_attention(flux, "npa", size=(16, 16), base_size=(8, 8)),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("text_rows", ["patch", "global"])
def test_flux2_on_a_gpu(text_rows):
    """Head dimension 128 in bfloat16: the kernel that is chosen errs no more than twice what plain PyTorch does."""
    torch.manual_seed(3)
    shape = {"attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32), "joint_attention_dim": 16}
    model = lively(build_transformer(in_channels=8, num_layers=2, **shape)).cuda()
    inputs = {name: x.cuda() for name, x in flux2_inputs((64, 64), text=77).items()}
    sizes = {"size": (64, 64), "base_size": (32, 32), "text_rows": text_rows}
    with use_attention(model, "npa", **sizes, backend="reference"):
        exact = run(model, inputs)
    model, inputs = model.bfloat16(), {name: x if "ids" in name else x.bfloat16() for name, x in inputs.items()}
    outputs = {}
    for backend in ("sdpa", "auto"):
        with use_attention(model, "npa", **sizes, backend=backend):
            outputs[backend] = (run(model, inputs).double() - exact).abs()
    assert outputs["auto"].max() <= 2 * outputs["sdpa"].max() and outputs["auto"].mean() <= 2 * outputs["sdpa"].mean()
