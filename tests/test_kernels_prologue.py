"""RMSNorm and RoPE of queries and keys: the plain path against diffusers, the Triton kernel against the plain path."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from hires_kernels import KernelError, qk_norm_rope

from hires.attention import use_attention

F64 = torch.float64
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def projection(generator, batch, tokens, heads, dim, dtype, fused=True):
    """Query and key as views of one projection to 3 · heads · dim channels, or of one each."""
    parts = [torch.randn(batch, tokens, heads * dim, generator=generator, dtype=F64).to(dtype) for _ in range(3)]
    if fused:
        parts = torch.cat(parts, dim=-1).chunk(3, dim=-1)
    return [x.unflatten(-1, (heads, dim)) for x in parts[:2]]


def weights(generator, dim, dtype):
    return tuple((1 + torch.randn(dim, generator=generator, dtype=F64) / 4).to(dtype) for _ in range(2))


def tables(generator, tokens, dim):
    angles = (torch.rand(tokens, dim // 2, generator=generator) * 100).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def make(device, dtype, *, batch=1, tokens=21, text=5, heads=3, dim=32, single=False, fused=True, seed=0):
    """Arguments of a double block (text apart, weights of its own) or a single one (text in front, one tensor)."""
    generator = torch.Generator().manual_seed(seed)
    rope = tables(generator, tokens, dim)
    own = weights(generator, dim, dtype)
    options = {"rope": tuple(x.to(device) for x in rope)}
    if single:
        pair = [x.to(device) for x in projection(generator, batch, text + tokens, heads, dim, dtype, fused)]
        options |= {"text": tuple(x[:, :text] for x in pair)}
        pair = [x[:, text:] for x in pair]
    else:
        pair = [x.to(device) for x in projection(generator, batch, tokens, heads, dim, dtype, fused)]
        if text:
            apart = projection(generator, batch, text, heads, dim, dtype, fused)
            options |= {"text": tuple(x.to(device) for x in apart)}
            options |= {"text_weight": tuple(x.to(device) for x in weights(generator, dim, dtype))}
    return pair, options | {"weight": tuple(x.to(device) for x in own)}


def cast(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(cast(x, dtype) for x in value) if isinstance(value, tuple) else value


def run(pair, options, dtype=None, **more):
    if dtype is not None:
        pair = [x.to(dtype) for x in pair]
        options = {name: cast(value, dtype) for name, value in options.items()}
    return qk_norm_rope(*pair, **options, **more)


def norm_by_hand(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("places", [None, (0, 20, 7)])
def test_plain_path_is_the_formula(places):
    pair, options = make("cpu", F64, batch=2)
    places = None if places is None else torch.tensor(places)
    given = run(pair, options, F64, places=places, scale=0.3, backend="reference")
    cos, sin = (x.double() for x in options["rope"])

    def turn(x, at):
        """A complex product for each channel pair; x (…, heads, dim), at: places of the leading axes."""
        factor = torch.complex(cos[at][..., ::2], sin[at][..., ::2])[..., None, :]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * factor).flatten(-2)

    everywhere = torch.arange(21)
    expected = [turn(norm_by_hand(x, w), everywhere) for x, w in zip(pair, options["weight"])]
    texts = [norm_by_hand(x, w) for x, w in zip(options["text"], options["text_weight"])]
    if places is not None:
        texts = [torch.stack([turn(x, p.expand(5)) for p in places], dim=1) for x in texts]
    expected += texts
    for index in (0, 2):
        expected[index] = expected[index] * 0.3
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_plain_path_is_flux_to_the_bit(dtype):
    """torch.nn.RMSNorm, as in FluxAttention, and diffusers' apply_rotary_emb."""
    pair, options = make("cpu", dtype)
    norms = []
    for weight in (*options["weight"], *options["text_weight"]):
        norms.append(torch.nn.RMSNorm(32, eps=1e-6).to(dtype).requires_grad_(False))
        norms[-1].weight.copy_(weight)
    image = [apply_rotary_emb(norm(x), options["rope"], sequence_dim=1) for x, norm in zip(pair, norms)]
    text = [norm(x) for x, norm in zip(options["text"], norms[2:])]
    for one, other in zip(run(pair, options), (*image, *text), strict=True):
        assert torch.equal(one, other)


CASES = {
    "double": {},
    "double, fused, batch": {"batch": 2, "tokens": 9},
    "double, apart": {"fused": False},
    "single": {"single": True},
    "single, batch, not fused": {"single": True, "batch": 2, "fused": False, "text": 1},
    "no text": {"text": 0},
    "24 heads of 128": {"heads": 24, "dim": 128, "tokens": 6, "text": 3},
    "9 heads of 128": {"heads": 9, "dim": 128, "tokens": 3, "text": 2, "single": True},
    "5 heads of 64": {"heads": 5, "dim": 64, "tokens": 7},
    "40 heads of 32": {"heads": 40, "tokens": 3, "text": 2},
    "77 words": {"text": 77, "tokens": 4, "heads": 1},
}


@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_the_plain_path(case, places, device):
    pair, options = make(device, torch.float32, **CASES[case])
    chosen = torch.tensor([2, 0, 2], device=device) if places else None
    truth = run(pair, options, F64, places=chosen, scale=0.4, backend="reference")
    given = run(pair, options, places=chosen, scale=0.4, backend="triton")
    for one, other in zip(given, truth, strict=True):
        assert (one is None) == (other is None) == (case == "no text" and other is None)
        if one is not None:
            assert one.is_contiguous()
            torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", HALF)
def test_kernel_errs_no_more_than_plain_pytorch(dtype, dim, single, device):
    pair, options = make(device, dtype, dim=dim, single=single, seed=dim)
    places = torch.tensor([3, 11], device=device)
    truth = run(pair, options, F64, places=places, backend="reference")
    plain = run(pair, options, places=places, backend="reference")
    given = run(pair, options, places=places, backend="triton")
    for exact, low, result in zip(truth, plain, given, strict=True):
        assert result.dtype == dtype
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (result - exact).abs().max() <= 2 * (low - exact).abs().max() + rounding


def test_kernel_rounds_once(device):
    """Where the plain path rounds after the norm and after the rotation, the kernel rounds at the end.

    In float16: Triton's interpreter truncates to bfloat16, where a GPU rounds.
    """
    pair, options = make(device, torch.float16, tokens=200, heads=4)
    truth = run(pair, options, F64, backend="reference")[0]
    errors = [(run(pair, options, backend=name)[0] - truth).square().mean() for name in ("triton", "reference")]
    assert errors[0] < 0.8 * errors[1]


def test_kernel_takes_any_strides(device):
    pair, options = make(device, torch.float32, batch=2, tokens=8)
    expected = run(pair, options, backend="triton")
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in pair]
    by_channel = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in pair]
    flipped_batch = [torch.stack([x[1], x[0]]).flip(0) for x in pair]
    for changed in (by_head, by_channel, flipped_batch):
        for one, other in zip(run(changed, options, backend="triton"), expected, strict=True):
            assert torch.equal(one, other)


def test_every_output_is_written_and_inputs_are_left_alone(device, monkeypatch):
    """Fresh memory holds NaN: an output that is never written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    pair, options = make(device, torch.float32, single=True, batch=2)
    before = [x.clone() for x in (*pair, *options["text"])]
    torch.use_deterministic_algorithms(True)
    try:
        given = run(pair, options, backend="triton", places=torch.tensor([1, 4, 9], device=device))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in given)
    assert all(torch.equal(x, y) for x, y in zip((*pair, *options["text"]), before, strict=True))


def test_gradients_need_the_plain_path(device):
    pair, options = make(device, torch.float32)
    leaves = [x.detach().requires_grad_() for x in pair]
    with pytest.raises(KernelError, match="it has no backward pass"):
        run(leaves, options, backend="triton")
    given = run(leaves, options)  # "auto" knows
    grads = torch.autograd.grad(sum(x.sum() for x in given), leaves)
    assert all(x.abs().max() > 0 for x in grads)


def test_flux_with_the_kernel_is_flux_without(monkeypatch, device):
    """The same small model with the kernel in the place of the plain path, float32."""
    from diffusers import FluxTransformer2DModel
    from hires_kernels import backends, library

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(8, 12, 12),
    )
    model = model.to(device).eval().requires_grad_(False)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            if getattr(block.attn, norm, None) is not None:
                getattr(block.attn, norm).weight.data.uniform_(0.5, 2)
    row, col = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, 24, 8),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros_like(row), row, col], -1).view(-1, 3).float(),
        "txt_ids": torch.zeros(3, 3),
    }
    inputs = {name: x.to(device) for name, x in inputs.items()}
    outputs, calls = [], []

    for forced in ("reference", "triton"):

        def choose(name, problem, forced=forced):
            if problem.operation == "qk_norm_rope":
                calls.append(forced)
                name = forced
            return backends.choose(name, problem)

        monkeypatch.setattr(library, "choose", choose)
        with use_attention(model, "npa", size=(8, 12), base_size=(4, 8), backend="sdpa"):
            outputs.append(model(**inputs, return_dict=False)[0])
    assert calls == ["reference"] * 2 + ["triton"] * 2
    assert not torch.equal(*outputs)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4 * outputs[0].abs().max().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": (torch.ones(16), torch.ones(32))},
            r"weight of shapes \(16,\), \(32,\): must be two of shape \(32,",
        ),
        ({"rope": (torch.ones(20, 32),) * 2}, r"rope of shapes .*two of shape \(21, 32\)"),
        (
            {"text": (torch.ones(1, 5, 3, 32), torch.ones(1, 6, 3, 32))},
            r"\(query, key\), each \(1, text tokens, 3, 32\)",
        ),
        ({"text": (torch.ones(1, 5, 3, 32),)}, r"must be \(query, key\)"),
        ({"text_weight": (torch.ones(3),) * 2}, "text_weight of shapes"),
        ({"places": torch.ones(2)}, r"places torch.float32 of shape \(2,\): must be an integer tensor"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"key": torch.ones(1, 20, 3, 32)}, r"query, key, … of shapes .*must share one"),
        ({"key": torch.ones(1, 21, 3, 32).half()}, "torch.float16, torch.float32: must share one floating-point"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    pair, options = make("cpu", torch.float32)
    arguments = {"query": pair[0], "key": pair[1], **options, **change}
    with pytest.raises(KernelError, match=message) as error:
        qk_norm_rope(**arguments)
    assert "\n" not in str(error.value)
