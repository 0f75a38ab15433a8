"""Compiled blocks: no graph breaks, few graphs, the same latents; the loop waits for no device."""

import pytest
import torch

from hires import load
from hires.attention import use_attention
from hires.cascade import cascade
from hires.execution.compilation import compile_blocks
from hires.methods.sg import structure_guidance
from hires.settings import Sampling
from hires.variants import VARIANTS

SAMPLING = Sampling.of(num_inference_steps=2, tau=500)


class Counting:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("model", "variant", "graphs"),
    [
        ("tiny-flux", "scalediff", 3),  # double blocks, the first single block, the other ones
        ("tiny-flux", "hybrid", 3),  # its low-resolution pass runs eagerly
        ("tiny-sdxl", "scalediff", 16),  # attention at two levels, residual blocks of many shapes
    ],
)
def test_blocks_compile_without_breaks_and_give_the_same(model, variant, graphs):
    backbone = load(model, "cpu")
    chosen = VARIANTS[variant].model_copy(update={"adapter": None})
    base = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    def latents():
        stages = cascade(backbone, ["a red disc"], [0], chosen, 256, 256, SAMPLING, base)
        return [stage.latents for stage in stages][-1]

    expected = latents()
    counting = Counting()
    compile_blocks(backbone.model, counting)  # fullgraph: a break raises
    torch.testing.assert_close(latents(), expected, rtol=0, atol=1e-5)
    first = counting.graphs
    latents()
    assert 0 < first == counting.graphs <= graphs  # entering the contexts again compiles nothing


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sdxl"])
@torch.no_grad()
def test_no_step_looks_at_a_value(model):
    """Tensors on "meta" have none: a step that asked the device for a number, and so waited for it, would fail."""
    backbone = load(model, "meta", weights="random")
    sampling = Sampling.of(num_inference_steps=4, tau=500).over(backbone.defaults)
    conditioning = {name: x.to("meta") for name, x in load(model, "cpu").encode_prompt(["a disc"], sampling).items()}
    size, base = (32, 32), (16, 16)
    schedule = load(model, "cpu", weights="random").schedule(sampling, base, first=2)
    schedule.timesteps = schedule.timesteps.to("meta")
    latents = torch.empty(1, 16, *size, device="meta")
    with use_attention(backbone.model, "npa", size, base):
        for step in (2, 3):
            output = backbone.predict(latents, schedule, step, conditioning, sampling, (256, 256))
            x0 = structure_guidance(schedule.to_x0(output, latents, step), latents, 0.5, "bilinear", 0.25)
            latents = schedule.step(schedule.from_x0(x0, latents, step), latents, step, [torch.Generator()])
    assert latents.is_meta and latents.shape == (1, 16, *size)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sdxl"])
@pytest.mark.parametrize("variant", ["scalediff", "multidiffusion+lfm+sg", "dense+lfm+sg"])
def test_the_host_waits_for_no_step(model, variant):
    backbone = load(model, "cuda", "bfloat16")
    base = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    def watch(stage, step, steps, latents):
        torch.cuda.set_sync_debug_mode("error" if step < steps else "default")

    sampling = Sampling.of(num_inference_steps=6, tau=500)
    try:
        list(cascade(backbone, ["a disc"], [0], VARIANTS[variant], 256, 256, sampling, base, callback=watch))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "variant"), [("tiny-flux", "scalediff"), ("tiny-sdxl", "scalediff")])
def test_compiled_latents_on_a_gpu(model, variant):
    backbone = load(model, "cuda", "bfloat16")
    base = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    def latents():
        return list(cascade(backbone, ["a disc"], [0], VARIANTS[variant], 256, 256, SAMPLING, base))[-1].latents

    expected = latents()
    compile_blocks(backbone.model)
    assert (latents() - expected).norm() < 0.03 * expected.norm()
