"""`hires speed kernels`: counts, timing, exact rows, the whole command on small shapes."""

import csv
import os
import queue
import subprocess
import sys
import threading
import time
from functools import partial
from statistics import median

import hires_kernels
import pytest
import torch
from hires_kernels import flex, reference
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hires.cli import main
from hires.speed import contenders, inputs, kernels, timing
from hires.speed.shapes import SHAPES, choose

CPU = torch.device("cpu")
TINY = [shape for name, shape in SHAPES.items() if "tiny" in name]
CASES = [(shape, part) for shape in TINY for part in shape.parts]


def command(*arguments):
    return main(["speed", "kernels", *arguments])


def only(shape, part, name):
    """The one program of a contender."""
    ((_, alternatives),) = contenders.programs(shape, part, name, CPU)
    (program,) = alternatives.values()
    return program


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_measures_every_contender_and_checks_it(tmp_path, capsys):
    out = tmp_path / "new" / "kernels.csv"
    arguments = ["--device", "cpu", "--shapes", "tiny", "--repeats", "1", "--accuracy", "--out", str(out)]
    assert command(*arguments, "--backends", "dense,sdpa,triton,flex") == 0
    found = read(out)
    assert list(found[0]) == list(kernels.COLUMNS)
    names = {(row["shape"], row["part"], row["contender"]) for row in found}
    assert {(shape.name, part, "triton") for shape, part in CASES} <= names
    assert {(shape.name, part, "sdpa") for shape, part in CASES} <= names
    assert {(shape.name, "all", "dense") for shape in TINY} <= names
    flexed = [row["configuration"].split(",")[0] for row in found if row["contender"] == "flex"]
    assert flexed == ["permutation included", "excluded"] * 4
    for row in found:
        assert not row["reason"]
        assert float(row["ms_10"]) <= float(row["ms"]) <= float(row["ms_90"])
        assert row["repeats"] == "1"
        assert row["torch"] == torch.__version__
        if row["part"] == "prologue":
            assert float(row["gb_per_s"]) > 0
        else:
            assert float(row["tflop_per_s"]) == pytest.approx(float(row["tflop"]) / float(row["ms"]) * 1e3, rel=1e-4)
        exact = row["contender"] != "dense" and "excluded" not in row["configuration"]
        if row["part"] in ("image", "all", "global") and exact:
            assert float(row["error"]) <= 2 * float(row["error_plain"]) + 1e-7
            assert 0 < float(row["error_plain"]) < 1e-6
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(found)
    assert all(line.startswith(row["shape"]) for line, row in zip(lines[1:], found))


def test_the_compiled_baseline_gives_the_same():
    shape = SHAPES["npa-tiny-0"]
    given = inputs.make(shape, CPU, seed=1)
    outputs = []
    for name in ("sdpa", "sdpa-compiled"):
        outputs.append(only(shape, "all", name)(given))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "part"), [(s, p) for s, p in CASES if p in ("image", "all", "global")])
def test_exact_rows_are_those_of_the_reference(shape, part):
    given = inputs.make(shape, CPU, seed=3)
    program = only(shape, part, "reference")
    double = inputs.Inputs(
        *(None if x is None else tuple(y.double() for y in x) for x in (given.image, given.text, given.guidance)),
        rope=given.rope,
        weight=given.weight,
    )
    expected = kernels._sampled(shape, part, program(double))
    torch.testing.assert_close(inputs.rows(shape, part, given, torch.float64), expected, rtol=0, atol=1e-12)
    assert expected.shape[1] == 48 + (0 if part == "image" else 3)


def test_the_parts_are_what_they_say():
    shape = SHAPES["npa-tiny-0"]
    given = inputs.make(shape, CPU, seed=4)

    def run(part):
        return only(shape, part, "sdpa")(given)

    text = tuple(x for x in given.text)
    plain = reference.neighborhood_patch_attention(
        *given.image,
        grid=shape.grid,
        window=shape.window,
        text=text,
        rope=given.rope,
        shift=None,
        text_rows="patch",
        scale=32**-0.5,
    )
    for one, other in zip(run("all"), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert run("image")[1] is None
    assert not torch.allclose(run("layer")[0], run("all")[0], atol=1e-2)
    torch.testing.assert_close(run("global")[0], run("all")[0])
    assert not torch.allclose(run("global")[1], run("all")[1], atol=1e-2)


@pytest.mark.parametrize(("shape", "part"), [(s, p) for s, p in CASES if p != "prologue"])
def test_flop_of_a_row_is_the_flop_counters(shape, part):
    hires_kernels.register_flop_formulas()
    given = inputs.make(shape, CPU, seed=5)
    with FlopCounterMode(display=False) as counter:
        only(shape, part, "triton")(given)
    assert shape.flop(part) == counter.get_total_flops()
    if part in ("image", "all"):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one that is counted
            only(shape, part, "dense")(given)
        assert shape.flop(part, dense=True) == counter.get_total_flops()


def test_flop_of_the_papers_layers():
    """TFLOP: NPA's image rows without and with text keys and rows; Scale-DiT's pairs, one by one; dense."""
    flux, local = SHAPES["npa-flux-4096"], SHAPES["local-flux-4096"]
    given = [flux.flop(part) / 1e12 for part in ("image", "all", "layer", "global")]
    assert [round(x, 2) for x in given] == [3.30, 5.57, 5.57, 4.13]
    assert round(flux.flop("all", dense=True) / 1e12, 1) == 53.6
    assert round(local.flop("all") / 1e12, 2) == 1.09
    assert [round(SHAPES[f"npa-sdxl{level}-4096"].flop("image") / 1e12, 3) for level in (1, 2)] == [1.374, 0.172]


def test_shapes_are_those_of_the_models():
    for name, grid, window, heads in (
        ("npa-flux-2048", 128, 64, 24),
        ("npa-flux-8192", 512, 64, 24),
        ("npa-sdxl1-4096", 256, 64, 10),
        ("npa-sdxl2-4096", 128, 32, 20),
    ):
        shape = SHAPES[name]
        assert (shape.grid, shape.window, shape.heads) == ((grid, grid), (window, window), heads)
        assert shape.head_dim * shape.heads == {24: 3072, 10: 640, 20: 1280}[heads]
    assert SHAPES["local-flux-8192"].guidance_grid == (128, 128)


def test_shapes_are_chosen_by_word_or_pattern():
    assert [shape.name for shape in choose(["sdxl1", "npa-flux-2*"])] == [
        "npa-flux-2048",
        "npa-sdxl1-2048",
        "npa-sdxl1-4096",
        "npa-sdxl1-8192",
    ]
    assert {shape.name for shape in choose([])} == {name for name in SHAPES if "tiny" not in name}


def test_positions_are_those_of_flux():
    from dataclasses import replace

    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    shape = replace(SHAPES["npa-flux-2048"], grid=(4, 6))
    row, col = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, col], -1).view(-1, 3).float()
    for given, expected in zip(inputs.positions(shape), FluxPosEmbed(10_000, [16, 56, 56])(ids), strict=True):
        torch.testing.assert_close(given, expected)


def test_time_is_that_of_one_call():
    seen = []

    def call(index):
        seen.append(index)
        time.sleep(0.01)

    times = timing.milliseconds(call, CPU, repeats=4, sets=6)
    assert len(times) == 4
    assert times == sorted(times)
    assert min(times) > 9  # a busy machine may take longer
    assert seen[:6] == list(range(6))  # every set before the clock starts
    assert seen[-4:] == list(range(4))


def test_slow_calls_are_repeated_less_often(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.06)
    assert len(timing.milliseconds(lambda index: time.sleep(0.008), CPU, repeats=50, sets=2)) in range(5, 8)
    assert len(timing.milliseconds(lambda index: time.sleep(0.02), CPU, repeats=50, sets=2)) == 5


def test_the_fastest_calls_in_a_row_after_a_rest(monkeypatch):
    monkeypatch.setattr(timing, "REST", 0.05)
    start, seen = time.perf_counter(), []

    def call(index):
        seen.append(time.perf_counter() - start)
        time.sleep(0.002 if 3 <= index < 8 else 0.02)

    assert 2 < timing.rested(call, CPU) < 20
    assert len(seen) == 10 and seen[0] >= 0.05


class Stream:
    """What `timing` uses of a GPU: a thread that works through a queue, and events in it."""

    def __init__(self, monkeypatch):
        self.work = queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self.work))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work.put(partial(time.sleep, cycles / 2e9)))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.work.join())

    def run(self):
        while True:
            self.work.get()()
            self.work.task_done()


class Event:
    def __init__(self, work):
        self.work, self.time = work, None

    def record(self):
        self.work.put(lambda: setattr(self, "time", time.perf_counter()))

    def query(self):
        return self.time is not None

    def elapsed_time(self, last):
        return (last.time - self.time) * 1e3


def test_a_slow_host_does_not_count(monkeypatch):
    """40 ms of launches for 4 ms of work: the first head start is too short."""
    work = Stream(monkeypatch).work

    def call(index):
        time.sleep(0.002)
        work.put(partial(time.sleep, 2e-4))

    times, late = timing._queued(call, 20, lambda: None, 0)
    assert late > 10 and median(times) > 1.5
    assert 0.2 < median(timing.milliseconds(call, torch.device("cuda"), 20, 1)) < 1.5


def test_sensors_are_read_while_calls_run(monkeypatch):
    work, left = Stream(monkeypatch).work, []
    _, late = timing._queued(
        lambda index: work.put(partial(time.sleep, 0.002)), 20, lambda: left.append(work.unfinished_tasks), 0.05
    )
    assert late == 0 and left and max(left) <= 60  # a call and two events each; none while they wait


@pytest.mark.gpu
def test_a_slow_host_does_not_count_on_a_gpu():
    x = torch.zeros(2**20, device="cuda")

    def call(index):
        time.sleep(0.002)
        x.add_(1)

    times, late = timing._queued(call, 20, lambda: None, 0.5)
    assert late == 0 and median(times) < 0.5
    assert timing._queued(call, 20, lambda: None, 0)[1] > 10
    assert median(timing.milliseconds(call, x.device, 20, 1)) < 0.5


def test_a_cpu_has_no_sensors():
    sensors = timing.Sensors(CPU)
    sensors.read()
    assert sensors.clocks == sensors.powers == []


@pytest.mark.gpu
def test_clock_and_power_are_those_of_a_busy_gpu():
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    sensors = timing.Sensors(matrix.device)
    timing.milliseconds(lambda index: matrix @ matrix, matrix.device, 300, 1, sensors.read)
    assert 300 < max(sensors.clocks) < 4000 and 50 < max(sensors.powers) < 2000


def test_inputs_are_rotated_out_of_the_cache():
    for size in (2**20, 2**26, 2**30):
        sets = timing.rotations(size, torch.device("cuda"))
        assert 2 <= sets <= 16
        assert sets == 16 or (sets - 1) * size >= timing.CACHE
    different = {float(inputs.make(TINY[0], CPU, seed).image[0].sum()) for seed in range(3)}
    assert len(different) == 3


def test_the_fastest_configuration_counts(monkeypatch):
    def programs(shape, part, name, device):
        times = {"slow": 0.06, "fast": 0.001, "middle": 0.05}
        yield "how", {name: lambda inputs, seconds=seconds: time.sleep(seconds) for name, seconds in times.items()}

    monkeypatch.setattr(contenders, "programs", programs)
    row = next(kernels.measure(CPU, [SHAPES["npa-tiny-0"]], ["flex"], repeats=3, accuracy=False))
    assert row["configuration"] == "how, fast"
    assert 1 <= row["ms"] < 50


@pytest.mark.parametrize(("shape", "part"), [(s, p) for s, p in CASES if p in ("image", "all")])
def test_flex_without_permutation_has_the_same_tokens_and_masks(shape, part):
    given = inputs.make(shape, CPU, seed=6)
    for configuration in flex.CONFIGURATIONS[::4]:
        (query, key, value), _ = contenders._joined(shape, part, given)
        mask = contenders._mask(shape, part, configuration, CPU)
        assert (query.shape[1], key.shape[1], value.shape[1]) == (mask.seq_lengths[0], *[mask.seq_lengths[1]] * 2)
        image, rows = contenders._flex_alone(shape, part, configuration, {})(given)
        assert image.shape == query.shape and image.isfinite().all()
        if part == "image" or shape.method == "npa":
            assert rows is None
        else:
            torch.testing.assert_close(rows, contenders._flex(shape, part, configuration)(given)[1])


def test_a_failing_contender_is_a_row_with_the_reason(tmp_path, capsys, monkeypatch):
    def programs(shape, part, name, device):
        if part == "image":
            yield "", {"hungry": lambda inputs: torch.empty(2**60)}
            yield "", {"refused": lambda inputs: contenders._backend(shape, part, inputs, "sdap")}
            yield "", {"hungry": lambda inputs: torch.empty(2**60), "able": lambda inputs: inputs.image}

    monkeypatch.setattr(contenders, "programs", programs)
    monkeypatch.setattr(timing, "REST", 0)
    out = tmp_path / "kernels.csv"
    arguments = ["--device", "cpu", "--shapes", "npa-tiny-0", "--backends", "sdpa", "--rest", "--out", str(out)]
    assert command(*arguments) == 0
    hungry, refused, able = read(out)
    assert hungry["reason"] == f"out of memory: {2**42} MiB asked for" and not hungry["ms"]
    assert refused["reason"].startswith("KernelError: unknown backend 'sdap'")
    assert able["ms"] and not able["reason"] and able["configuration"] == "able"
    assert able["ms_rested"] and not hungry["ms_rested"]
    assert "unknown backend" in capsys.readouterr().out


def test_without_a_gpu_it_says_so():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "hires.cli", "speed", "kernels"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr and "--device cpu --shapes tiny" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu measures --shapes tiny only"),
        (["--shapes", "flax"], "no shape fits 'flax'"),
        (["--backends", "sdap"], "unknown backend 'sdap': did you mean 'sdpa'?"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
