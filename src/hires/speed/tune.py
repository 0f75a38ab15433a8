"""`hires speed tune`: the candidates for each kernel's launch, measured; the fastest right one goes into the table."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from statistics import median
from typing import Any

import hires_kernels
import torch
from hires_kernels import launches
from torch import Tensor

from hires.errors import HiresError, unknown
from hires.files.storage import write_text
from hires.speed import contenders
from hires.speed.inputs import Inputs, rows, sample, turns
from hires.speed.shapes import SHAPES, Shape
from hires.speed.timing import failure, milliseconds

Row = dict[str, Any]
Program = Callable[[Inputs], list[Tensor]]
ROUNDS = 5  # in which all candidates are measured, in random order: the GPU gets warm on the way
GAIN = 0.01  # a candidate replaces the committed launch where it is faster by more than this


def _grid(**fields: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(fields, values)) for values in product(*fields.values())]


GLUON_128 = {"groups": 2, "k_stages": 2, "v_stages": 2, "staged": False}
STAGED_64 = {"groups": 4, "free_together": True, "staged": True}
GLUON_64 = {"k_stages": 4, "v_stages": 4, "staged": False}
CANDIDATES: dict[str, dict[int, list[dict[str, Any]]]] = {  # kernel, head dim; few of them spill registers on sm_90
    "npa_gluon": {
        64: [GLUON_64 | x for x in (*_grid(groups=(2, 4), free_together=(False, True)), STAGED_64)],
        128: [GLUON_128 | x for x in _grid(free_together=(False, True))],
    },
    "npa_triton": {
        64: [
            *_grid(queries=(128,), keys=(64,), warps=(4,), stages=(2, 3, 4), programs=(2,)),
            *_grid(queries=(128,), keys=(64, 128), warps=(8,), stages=(2, 3, 4), programs=(1, 2)),
        ],
        128: _grid(queries=(128,), keys=(64, 128), warps=(8,), stages=(2, 3), programs=(1,)),
    },
    "local_forward": {
        128: [
            *_grid(queries=(128,), keys=(64,), warps=(8,), stages=(2, 3, 4)),
            *_grid(queries=(64,), keys=(64,), warps=(4,), stages=(2, 3, 4)),
            *_grid(queries=(64,), keys=(32,), warps=(4,), stages=(3, 4)),
        ]
    },
    "local_query_gradient": {
        128: [
            *_grid(queries=(128,), keys=(32, 64), warps=(8,), stages=(1, 2)),
            *_grid(queries=(64,), keys=(32, 64), warps=(4,), stages=(1, 2)),
        ]
    },
    "local_key_gradients": {
        128: [
            *_grid(queries=(32,), keys=(64,), warps=(4, 8), stages=(1, 2)),
            *_grid(queries=(32,), keys=(128,), warps=(8,), stages=(1, 2)),
            *_grid(queries=(64,), keys=(64,), warps=(8,), stages=(1, 2)),
        ]
    },
    "qk_norm_rope": {128: _grid(elements=(1024, 2048, 4096), warps=(2, 4, 8))},
}
MEASURED = {  # kernel, head dim -> shape and part that decide; "gradient": forward and backward of "all"
    ("npa_gluon", 64): ("npa-sdxl1-4096", "image"),
    ("npa_gluon", 128): ("npa-flux-4096", "all"),
    ("npa_triton", 64): ("npa-sdxl1-4096", "image"),
    ("npa_triton", 128): ("npa-flux-4096", "all"),
    ("local_forward", 128): ("local-flux-4096", "all"),
    ("local_query_gradient", 128): ("local-flux-2048", "gradient"),
    ("local_key_gradients", 128): ("local-flux-2048", "gradient"),
    ("qk_norm_rope", 128): ("npa-flux-4096", "prologue"),
}
BACKENDS = {"npa_gluon": "gluon"}  # the others are Triton's


def check(names: Sequence[str], device: str) -> list[str]:
    """The kernels that are meant; HiresError where one is unknown or there is no GPU."""
    for name in names:
        if name not in CANDIDATES:
            raise unknown("kernel", name, CANDIDATES)
    if device != "cuda" or not torch.cuda.is_available():
        raise HiresError(f"--device {device}: hires speed tune measures on a CUDA device: run it on a GPU")
    return list(names or CANDIDATES)


def tune(kernels: Sequence[str], repeats: int, device: torch.device) -> Iterator[Row]:
    """One row for each candidate, the committed launch first; the table isn't changed."""
    for kernel in kernels:
        for head_dim, candidates in CANDIDATES[kernel].items():
            name, part = MEASURED[kernel, head_dim]
            shape = SHAPES[name]
            sets = turns(shape, device)
            committed = dict(launches.launch(kernel, head_dim, device))
            program = _program(kernel, shape, part, device)
            exact = _exact(program, shape, part, sets[0])
            found: list[Row] = []
            for candidate in [committed, *(x for x in candidates if x != committed)]:
                row: Row = {"kernel": kernel, "head_dim": head_dim, "shape": name, "part": part, "launch": candidate}
                with launches.trying(kernel, head_dim, device, candidate):
                    found.append(row | _checked(program, shape, part, sets[0], exact))
            _time(found, program, sets, repeats, device)
            yield from found
            del sets
            torch.cuda.empty_cache()


def better(found: Sequence[Row]) -> dict[tuple[str, int], dict[str, Any]]:
    """For each kernel and head dim the fastest right launch, where it beats the committed one by more than `GAIN`.

    Whatever its speed where the committed one is wrong. `found`: the rows of `tune`, in which that one comes first.
    """
    chosen = {}
    for key in dict.fromkeys((row["kernel"], row["head_dim"]) for row in found):
        rows = [row for row in found if (row["kernel"], row["head_dim"]) == key]
        right = [row for row in rows if row.get("right")]
        if right:
            best = min(right, key=lambda row: row["ms"])
            if not rows[0].get("right") or best["ms"] < rows[0]["ms"] * (1 - GAIN):
                chosen[key] = best["launch"]
    return chosen


def write(chosen: dict[tuple[str, int], dict[str, Any]], device: torch.device) -> None:
    """Put launches into the committed table."""
    for (kernel, head_dim), launch in chosen.items():
        launches.TABLE[kernel][launches.memory(device)][str(head_dim)] = launch
    write_text(launches.PATH, launches.text())


def _program(kernel: str, shape: Shape, part: str, device: torch.device) -> Program:
    backend = BACKENDS.get(kernel, "triton")
    if part == "gradient":
        return lambda inputs: _gradients(shape, inputs, backend)
    [(_, alternatives)] = contenders.programs(shape, part, backend, device)
    [call] = alternatives.values()
    return lambda inputs: [x for x in call(inputs) if x is not None]


def _gradients(shape: Shape, inputs: Inputs, backend: str) -> list[Tensor]:
    """Of the sum of squares of all outputs, by every input."""
    assert inputs.text is not None and inputs.guidance is not None
    query, key, value, *others = (x.detach().requires_grad_() for x in (*inputs.image, *inputs.text, *inputs.guidance))
    with torch.enable_grad():
        image, text = hires_kernels.local_attention(
            query,
            key,
            value,
            grid=shape.grid,
            radius=shape.radius,
            text=(others[0], others[1], others[2]),
            guidance=(others[3], others[4]),
            guidance_grid=shape.guidance_grid,
            backend=backend,
        )
        assert text is not None
        loss = image.float().square().sum() + text.float().square().sum()
    return list(torch.autograd.grad(loss, [query, key, value, *others]))


def _exact(program: Program, shape: Shape, part: str, inputs: Inputs) -> list[Tensor]:
    """Sampled rows, exact and in plain PyTorch; where there are none, all that the committed launch gives."""
    if part in ("prologue", "gradient"):
        return [x.double() for x in program(inputs)]
    return [rows(shape, part, inputs, dtype) for dtype in (torch.float64, inputs.image[0].dtype)]


def _checked(program: Program, shape: Shape, part: str, inputs: Inputs, exact: list[Tensor]) -> Row:
    """Whether the result is right; or the reason why there is none."""
    try:
        with torch.no_grad():
            return {"right": _right(program(inputs), shape, part, exact)}
    except Exception as error:
        return {"reason": failure(error)}


def _time(found: Sequence[Row], program: Program, sets: list[Inputs], repeats: int, device: torch.device) -> None:
    """Add median and fastest time to the rows of candidates that run, each measured in every round."""
    times: dict[int, list[float]] = {index: [] for index, row in enumerate(found) if "reason" not in row}
    for _ in range(ROUNDS):
        for index in random.sample(list(times), len(times)):
            row = found[index]
            with torch.no_grad(), launches.trying(row["kernel"], row["head_dim"], device, row["launch"]):
                times[index] += milliseconds(
                    lambda turn: program(sets[turn % len(sets)]), device, -(-repeats // ROUNDS), len(sets)
                )
    for index, values in times.items():
        found[index].update(ms=median(values), fastest=min(values))


def _right(given: list[Tensor], shape: Shape, part: str, exact: list[Tensor]) -> bool:
    """The pass rule on sampled rows; where there are none, as near to the committed launch as rounding allows."""
    if part in ("prologue", "gradient"):
        eps = torch.finfo(given[0].dtype).eps
        return all(
            bool((x.double() - y).square().mean().sqrt() <= eps * y.square().mean().sqrt())
            for x, y in zip(given, exact)
        )
    truth, plain = exact
    places = [x.to(given[0].device) for x in sample(shape, part)]
    found = torch.cat([x[:, place] for x, place in zip(given, places)], dim=1)
    rounding = torch.finfo(found.dtype).eps * truth.abs().max()
    return bool((found - truth).abs().max() <= 2 * (plain - truth).abs().max() + rounding)


HEADER = f"{'kernel':<22} {'dim':>4} {'ms':>9} {'fastest':>9}  launch, or why there is no time"


def line(row: Row) -> str:
    """A row for the terminal."""
    ms = f"{row['ms']:9.4f} {row['fastest']:9.4f}" if "ms" in row else " " * 19
    wrong = "" if row.get("right", True) else "WRONG "
    launch = " ".join(f"{name}={value}" for name, value in row["launch"].items())
    return f"{row['kernel']:<22} {row['head_dim']:>4} {ms}  {wrong}{launch} {row.get('reason', '')}".rstrip()
