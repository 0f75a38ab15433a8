"""CUDA graphs of short steps: the logic on the CPU with traces in their place, the graphs themselves on a GPU."""

import gc
import warnings
from functools import cache

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from hires import load
from hires.cascade import cascade
from hires.execution import graphs
from hires.execution.compilation import COMPILED, compile_blocks
from hires.execution.graphs import CudaRecorder, Graphs, cuda_graphs, replayed, suitable
from hires.execution.step_cache import step_cache
from hires.settings import Sampling
from hires.variants import VARIANTS


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Traces:
    """Records as a GPU does: operations on tensors that stay in place; what Python decided is decided for good."""

    def __init__(self, *able):
        self.able, self.rehearsed, self.recorded, self.released = able or (True,), 0, 0, 0

    def rehearse(self, call):
        self.rehearsed += 1
        return call(), self.able[min(self.rehearsed, len(self.able)) - 1]

    def record(self, call, buffers):
        self.recorded += 1
        trace = make_fx(call)(*buffers)
        output = tree_map_only(torch.Tensor, torch.clone, trace(*buffers))

        def launch():
            for kept, new in zip(output, trace(*buffers), strict=True):
                kept.copy_(new)

        return output, launch

    def release(self):
        self.released += 1


class Affine(nn.Module):
    def forward(self, x, *, more, factor=1.0, offset=None):
        total = factor * x + more["shifts"][0]
        return (total if offset is None else total + offset,)


def made(backbone, variant, steps=4, callback=None, **settings):
    """Latents of every stage at 256², of `steps` steps, from given base latents where the variant takes any."""
    sampling = Sampling.of(num_inference_steps=2 * steps, tau=500, **settings)
    given = None
    if VARIANTS[variant].start == "base":
        given = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    stages = cascade(backbone, ["a red disc"], [0], VARIANTS[variant], 256, 256, sampling, given, callback)
    return [stage.latents for stage in stages]


def counted(call):
    """What a call returns, and the replays in it."""
    before = Graphs.replayed
    return call(), Graphs.replayed - before


@pytest.fixture
def traced(monkeypatch):
    """The cascade's stages run as traces, which the list collects."""
    found = []

    def instead(model, device, pixels):
        found.append(Traces())
        return replayed(model, found[-1])

    monkeypatch.setattr("hires.cascade.cuda_graphs", instead)
    return found


@pytest.mark.parametrize(("model", "variant"), [("tiny-flux", "hybrid"), ("tiny-sdxl", "scalediff")])
def test_nothing_but_the_arguments_changes_between_steps(model, variant, monkeypatch, request):
    """The trace of one step is right for all others; Scale-DiT's pass over the low-resolution image is no step."""
    backbone = load(model, "cpu")
    expected = made(backbone, variant)
    traces = request.getfixturevalue("traced")
    found, replays = counted(lambda: made(backbone, variant))
    assert all(map(torch.equal, found, expected))
    assert [one.recorded for one in traces] == [one.released for one in traces] == [1] and replays == 2
    assert "forward" not in vars(backbone.model)


def test_shifts_that_are_drawn_anew_are_not_recorded(traced):
    made(load("tiny-sdxl", "cpu"), "npa", steps=1, random_shift=True)
    assert not traced


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_a_recording_is_for_one_signature(device):
    model, recorder = Affine(), Traces() if device == "cpu" else CudaRecorder(torch.device("cuda"))

    def ask(x, more=1.0, **options):
        shift, offset = torch.full((3,), more, device=device), options.get("offset", 0)
        (found,) = model(x, more={"shifts": [shift]}, **options)
        torch.testing.assert_close(found, options.get("factor", 1.0) * x + more + offset, rtol=0, atol=0)
        return found

    def drawn(*shape):
        return torch.rand(shape, device=device)

    with replayed(model, recorder) as calls:
        first = [ask(drawn(2, 3), more=float(i)) for i in range(6)]
        assert len({x.data_ptr() for x in first}) == 6  # nobody gets the recording's own
        for _ in range(4):
            ask(drawn(4, 3))
            ask(drawn(3, 4).t())
            ask(drawn(2, 3), factor=2.0)
            ask(drawn(2, 3), offset=drawn(3))
            ask(drawn(2, 3), offset=drawn(1).expand(3))
        assert len(calls.kinds) == 6 and all(kind.launch for kind in calls.kinds)
    assert not calls.kinds and "forward" not in vars(model)


@pytest.mark.parametrize(
    ("able", "rehearsed", "recorded", "replays"),
    [((True,), 1, 1, 3), ((False, True), 2, 1, 2), ((False,), 2, 0, 0)],
)
def test_a_first_call_that_waits_is_rehearsed_once_more(able, rehearsed, recorded, replays):
    model, traces = Affine(), Traces(*able)
    with replayed(model, traces):
        found, seen = counted(lambda: [model(i * torch.ones(3), more={"shifts": [1]})[0] for i in range(5)])
    assert (traces.rehearsed, traces.recorded, traces.released, seen) == (rehearsed, recorded, 1, replays)
    assert torch.equal(torch.stack(found)[:, 0], torch.arange(5) + 1.0)


class Repeats(Traces):
    """Records by asking again: a trace doesn't go through what is compiled."""

    def record(self, call, buffers):
        self.recorded += 1
        output = call(*buffers)
        return output, lambda: output.copy_(call(*buffers))


@torch.no_grad()
def test_a_first_call_that_compiles_is_rehearsed_once_more():
    """Later stages of the process need one rehearsal alone, unless they compile for another shape."""
    model = nn.Linear(2, 3)
    model.forward = torch.compile(model.forward, dynamic=False, backend="eager")
    for rows, rehearsed in ((4, 2), (4, 1), (5, 2), (4, 1), (5, 1)):
        with replayed(model, recorder := Repeats()):
            for _ in range(4):
                x = torch.rand(rows, 2)
                torch.testing.assert_close(model(x), x @ model.weight.T + model.bias)
        assert (recorder.rehearsed, recorder.recorded) == (rehearsed, 1)


def test_models_that_are_suitable():
    model = load("tiny-flux", "cpu", weights="random").model
    assert not suitable(model, 256**2)  # not compiled
    compile_blocks(model, "eager")
    assert suitable(model, 2048**2) and not suitable(model, 2048 * 2112)
    with cuda_graphs(model, torch.device("cpu"), 256**2):
        assert "forward" not in vars(model)  # no GPU
    hook = model.transformer_blocks[0].register_forward_hook(lambda *_: None)
    assert not suitable(model, 256**2)
    hook.remove()
    with step_cache(model, 3, 5):
        assert not suitable(model, 256**2)
    assert suitable(model, 256**2)
    add_hook_to_module(model, ModelHook())  # as offloading does
    assert not suitable(model, 256**2)
    remove_hook_from_module(model)
    assert suitable(model, 256**2)


MODELS = [(m, v) for m in ("tiny-flux", "tiny-sdxl") for v in VARIANTS if m == "tiny-flux" or not VARIANTS[v].adapter]


@cache
def on_gpu(model, dtype="bfloat16"):
    """A model that counts as compiled and isn't, which takes no time."""
    backbone = load(model, "cuda", dtype)
    COMPILED.add(backbone.model)
    return backbone


def check_bits(monkeypatch, backbone, variant, **settings):
    found, replays = counted(lambda: made(backbone, variant, steps=6, **settings))
    monkeypatch.setattr(graphs, "PIXELS", 0)
    expected, none = counted(lambda: made(backbone, variant, steps=6, **settings))
    assert none == 0 and (replays > 0) is VARIANTS[variant].denoise
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "variant"), MODELS)
def test_replays_give_the_same_bits(model, variant, monkeypatch):
    check_bits(monkeypatch, on_gpu(model), variant)


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "settings"), [("tiny-flux", {"linears": "fp8"}), ("tiny-sdxl", {})])
def test_replays_of_compiled_blocks_give_the_same_bits(model, settings, monkeypatch):
    backbone = load(model, "cuda", "bfloat16")
    compile_blocks(backbone.model)
    check_bits(monkeypatch, backbone, "scalediff", **settings)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "settings"), [("bfloat16", {"attention_backend": "sdpa"}), ("float32", {})])
def test_replays_of_gathered_windows_give_the_same_bits(dtype, settings, monkeypatch):
    """Their lists of tokens are made once, in a first call, which waits for that."""
    check_bits(monkeypatch, on_gpu("tiny-flux", dtype), "scalediff", **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"random_shift": True}, {"step_cache": 3}])
def test_steps_that_change_are_not_replayed(settings):
    latents, replays = counted(lambda: made(on_gpu("tiny-flux"), "scalediff", steps=6, **settings))
    assert replays == 0 and latents[-1].isfinite().all()
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sdxl"])
def test_a_stage_of_a_warm_process_is_recorded_at_its_second_call(model):
    made(on_gpu(model), "scalediff")
    before = Graphs.prepared
    made(on_gpu(model), "scalediff")
    assert Graphs.prepared == before + 2


@pytest.mark.gpu
def test_a_stage_gives_its_memory_back():
    private = []

    def look(*_):
        private.append(sum(part["segment_pool_id"] != (0, 0) for part in torch.cuda.memory_snapshot()))

    made(on_gpu("tiny-sdxl"), "multidiffusion+lfm+sg", callback=look)
    gc.collect()  # what other tests have left
    before = torch.cuda.memory_allocated()
    made(on_gpu("tiny-sdxl"), "multidiffusion+lfm+sg", callback=look)
    assert private[0] == private[4] == 0 < private[3]
    look()
    assert private[-1] == 0 and torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@torch.no_grad()
def test_a_rehearsal_on_a_gpu():
    """Whether the host waited, what else was warned of, and in which pool a recording lies."""
    recorder, x = CudaRecorder(torch.device("cuda")), torch.ones(2**20, device="cuda")
    assert recorder.rehearse(lambda: x + 1)[1] and not recorder.rehearse(lambda: x.sum().item())[1]
    with pytest.warns(UserWarning, match="mine") as found:
        assert recorder.rehearse(lambda: warnings.warn("mine", stacklevel=1))[1]
        assert not recorder.rehearse(lambda: (x.sum().item(), warnings.warn("mine", stacklevel=1)))[1]
    assert len(found) == 2
    torch.cuda.empty_cache()
    torch.empty(2**28, device="cuda"), x.eq(3).all()  # stay cached
    recorder.record(lambda x: (x + 1,), [x])  # as do a generator's seeds, 2 MiB on the recorder's stream
    recorder.release()
    before = torch.cuda.memory_reserved()
    (output,), launch = recorder.record(lambda x: (x + 1,), [x])
    assert torch.cuda.memory_reserved() > before
    x.fill_(2)
    launch()
    assert output.eq(3).all()
    del output, launch
    recorder.release()
    assert torch.cuda.memory_reserved() == before


@pytest.mark.gpu
@torch.no_grad()
def test_a_recording_takes_what_is_cached_where_a_process_may_have_no_more():
    recorder, x = CudaRecorder(torch.device("cuda")), torch.ones(2**20, device="cuda")
    torch.cuda.empty_cache()
    torch.empty(2**28, device="cuda")  # 1 GiB, cached
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
    try:
        (output,), launch = recorder.record(lambda x: (x.expand(2**8, -1) + 1,), [x])
        launch()
        assert output.eq(2).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del output, launch
    recorder.release()
