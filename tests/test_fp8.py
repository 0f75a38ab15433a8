"""8-bit linear layers, extrapolated steps and the preset of both, on the real tiny models."""

import pytest
import torch
from torch import nn

import hires
from hires import load
from hires.cascade import cascade
from hires.cli import main
from hires.errors import HiresError
from hires.execution.compilation import compile_blocks
from hires.execution.fp8 import FP8, Fp8Linear, fp8_linears, only_8_bits, quantise, quantised_layers
from hires.execution.step_cache import computed_steps, step_cache
from hires.settings import PRESETS, Sampling
from hires.variants import VARIANTS


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(one, other):
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def flux():
    return load("tiny-flux", "cpu")


def test_rows_are_scaled_to_the_largest_number_of_e4m3():
    x = drawn(5, 64) * torch.tensor([[1e-6], [1.0], [1e6], [3.0], [0.0]])
    rows, scale = quantise(x)
    assert rows.dtype == FP8 and scale.shape == (5, 1)
    back = rows.float() * scale
    assert (rows.float().abs().amax(1)[:4] == 448).all() and (back[4] == 0).all()
    # 3 bits after the leading one: half a step is 1/16 of a number, or of the smallest normal number
    assert ((back - x).abs() <= x.abs() / 16 + 2**-10 * scale).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_torchs_own_scaled_product(bias):
    linear = nn.Linear(64, 32, bias=bias).requires_grad_(False)
    x = drawn(2, 7, 64)
    found = Fp8Linear(linear)(x)
    rows, scale = quantise(x.flatten(0, 1))
    weight, weight_scale = quantise(linear.weight)
    product = torch._scaled_mm(rows, weight.t(), scale_a=scale, scale_b=weight_scale.t(), out_dtype=torch.bfloat16)
    expected = product.float().view(2, 7, 32) + (linear.bias if bias else 0)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-2)  # bfloat16 of the one
    assert relative(found, linear(x)) < 0.05


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sdxl"])
def test_which_layers_are_replaced_and_that_they_come_back(model):
    backbone = load(model, "cpu")
    linears = {name: m for name, m in backbone.model.named_modules() if type(m) is nn.Linear}
    chosen = {id(layer) for _, _, layer in quantised_layers(backbone.model)}
    names = {name for name, layer in linears.items() if id(layer) in chosen}
    assert names and not any("norm" in name or "embed" in name for name in names)
    assert "proj_out" not in names and not any(".attn2.to_k" in name for name in names)
    for part in ("attn.to_q", "ff.net.2", "proj_mlp") if model == "tiny-flux" else ("attn1.to_q", "ff.net.2"):
        assert any(name.endswith(part) for name in names)
    before = {name: id(m) for name, m in backbone.model.named_modules()}
    with pytest.raises(KeyError), fp8_linears(backbone.model):
        assert sum(isinstance(m, Fp8Linear) for m in backbone.model.modules()) == len(chosen)
        raise KeyError
    assert before == {name: id(m) for name, m in backbone.model.named_modules()}


def test_weights_are_quantised_once_and_anew_when_they_change(flux):
    _, _, layer = quantised_layers(flux.model)[0]
    with fp8_linears(flux.model):
        pass
    first = layer.__dict__["_fp8"][1]
    with fp8_linears(flux.model):
        pass
    assert layer.__dict__["_fp8"][1] is first
    with torch.no_grad():
        layer.weight.mul_(1.0)
    with fp8_linears(flux.model):
        pass
    assert layer.__dict__["_fp8"][1] is not first


def latents(backbone, variant="scalediff", steps=6, **settings):
    base = drawn(1, 16, 16, 16)
    sampling = Sampling.of(num_inference_steps=2 * steps, tau=500, **settings)
    return list(cascade(backbone, ["a red disc"], [0], VARIANTS[variant], 256, 256, sampling, base))[-1].latents


def test_the_error_of_each_option_is_small_and_not_zero(flux):
    exact = latents(flux)
    for settings, most in (({"linears": "fp8"}, 0.2), ({"step_cache": 2}, 0.2), (PRESETS["fast"], 0.6)):
        assert 1e-3 < relative(latents(flux, **settings), exact) < most, settings
    assert torch.equal(latents(flux), exact)  # nothing stays


def size(model):
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sdxl"])
def test_weights_that_are_let_go(model):
    """The same latents in half of the blocks' memory, wherever the model is moved."""
    backbone = load(model, "cpu", "bfloat16")
    layers = [layer.weight for _, _, layer in quantised_layers(backbone.model)]
    exact, before = latents(backbone, steps=2, linears="fp8"), size(backbone.model)
    only_8_bits(backbone.model)
    assert not quantised_layers(backbone.model)
    scales = sum(4 * len(weight) for weight in layers)
    assert before - size(backbone.model) == sum(weight.numel() for weight in layers) - scales
    assert torch.equal(latents(backbone, steps=2, linears="fp8"), exact)
    assert all(x.is_meta for x in backbone.model.to("meta").state_dict().values())


def test_sdxl_in_8_bits():
    backbone = load("tiny-sdxl", "cpu")
    assert 1e-4 < relative(latents(backbone, steps=2, linears="fp8"), latents(backbone, steps=2)) < 0.2


@pytest.mark.parametrize(("steps", "interval"), [(9, 3), (6, 2), (4, 5)])
def test_steps_are_computed_as_counted_and_every_stage_begins_anew(flux, steps, interval):
    block, calls = flux.model.transformer_blocks[0], []
    hook = block.attn.register_forward_hook(lambda *_: calls.append(1))
    try:
        for _ in range(2):
            calls.clear()
            latents(flux, steps=steps, step_cache=interval)
            assert len(calls) == computed_steps(steps, interval)
    finally:
        hook.remove()
    assert computed_steps(18, 3) == 9 and not flux.model.is_cache_enabled


def test_a_linear_output_is_extrapolated_exactly(flux):
    """A model whose output grows by the same amount every step: no error, after three steps to learn it."""
    grown = []
    with torch.no_grad(), step_cache(flux.model, 3, 9):
        bias = flux.model.proj_out.bias
        before = bias.clone()
        for step in range(9):
            bias.copy_(before + step)
            with flux.model.cache_context("cond"):
                grown.append(
                    flux.model(
                        hidden_states=torch.ones(1, 4, flux.model.config.in_channels),
                        encoder_hidden_states=torch.ones(1, 2, flux.model.config.joint_attention_dim),
                        pooled_projections=torch.ones(1, flux.model.config.pooled_projection_dim),
                        timestep=torch.ones(1), guidance=torch.ones(1),
                        img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(2, 3), return_dict=False,
                    )[0]
                )  # fmt: skip
        bias.copy_(before)
    for step, output in enumerate(grown):
        torch.testing.assert_close(output, grown[0] + step, rtol=0, atol=1e-4)


def test_fast_and_compiled_together():
    torch.compiler.reset()
    backbone = load("tiny-flux", "cpu")
    fast = {**PRESETS["fast"], "steps": 5}
    expected = latents(backbone, **fast)
    compile_blocks(backbone.model, "eager")
    torch.testing.assert_close(latents(backbone, **fast), expected, rtol=0, atol=1e-4)
    torch.compiler.reset()


def test_the_preset_by_its_name(flux, tmp_path):
    options = {"height": 256, "width": 256, "num_inference_steps": 4}
    (fast,) = hires.generate(flux, "a red disc", preset="fast", **options)
    (same,) = hires.generate(flux, "a red disc", **PRESETS["fast"], **options)
    assert fast.tobytes() == same.tobytes()
    with pytest.raises(HiresError, match="unknown preset 'fats': did you mean 'fast'"):
        hires.generate(flux, "a", preset="fats", height=256, width=256)
    assert load("tiny-sdxl", "cpu").preset("fast") == {"linears": "fp8"}
    out = tmp_path / "fast.png"
    arguments = ["--prompt", "a red disc", "--size", "256", "--set", "num_inference_steps=4", "--device", "cpu"]
    assert main(["generate", *arguments, "--preset", "fast", "--out", str(out)]) == 0
    from PIL import Image

    told = Image.open(out).text["parameters"]
    assert '"linears": "fp8"' in told and '"step_cache": 3' in told and '"text_rows": "global"' in told


@pytest.mark.parametrize(
    ("model", "variant", "message"),
    [
        ("tiny-flux", "multidiffusion+lfm+sg", "the views of a step would be taken for steps"),
        ("tiny-sdxl", "scalediff", "setting step_cache = 2 means nothing to a sdxl model"),
    ],
)
def test_what_a_step_cache_cannot_do(model, variant, message):
    with pytest.raises(HiresError, match=message):
        latents(load(model, "cpu"), variant, step_cache=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gpus_product_is_the_emulated_one(dtype):
    linear = nn.Linear(3072, 1536).to("cuda", dtype).requires_grad_(False)
    x = drawn(1, 300, 3072).to("cuda", dtype)
    native, emulated = Fp8Linear(linear), Fp8Linear(linear)
    emulated.native = False
    assert native.native
    assert relative(native(x).float(), emulated(x).float()) < 5e-3


@pytest.mark.gpu
def test_fast_and_compiled_on_a_gpu():
    backbone = load("tiny-flux", "cuda", "bfloat16")
    exact, eager = latents(backbone), latents(backbone, **PRESETS["fast"])
    compile_blocks(backbone.model)
    compiled = latents(backbone, **PRESETS["fast"])
    assert relative(compiled, eager) < 0.1 and relative(compiled, exact) < 0.6  # as eager, and as on the CPU


def test_the_accuracy_of_each_option_is_told(tmp_path, capsys):
    (tmp_path / "speed.yaml").write_text(
        "models: {}\nwithout_gpu: {tiny-sdxl: {dtype: float32, sizes: [128, 256], contenders: [dense], check: 256}}\n"
    )
    arguments = ["--device", "cpu", "--images", "2", "--config", str(tmp_path / "speed.yaml"), "--out", str(tmp_path)]
    assert main(["speed", "accuracy", *arguments]) == 0
    (fp8, fast) = (tmp_path / "cpu" / "tables" / "accuracy.csv").read_text().splitlines()[1:]
    assert fp8.startswith("tiny-sdxl,fp8,2,") and fast.startswith("tiny-sdxl,fast,2,")
    psnr, error = fp8.split(",")[3:5]
    assert 20 < float(psnr) < 60 and 0 < float(error.rstrip("%")) < 20


def test_errors_of_one_output_of_an_architecture():
    from hires.speed import accuracy

    rows = list(accuracy.outputs("tiny-flux", "float32", torch.device("cpu"), 256))
    assert [row["option"] for row in rows] == ["fp8", "global text rows", "fast"]
    assert all(0 < row["latents"] < 1 for row in rows)
