"""`hires speed kernels`: one table of all contenders on all shapes."""

import csv
import gc
import io
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from hires import provenance
from hires.errors import unknown
from hires.speed import contenders
from hires.speed.inputs import Inputs, rows, sample, turns
from hires.speed.shapes import Shape, choose, device_for
from hires.speed.timing import Sensors, failure, milliseconds, rested

COLUMNS = (
    "shape",
    "part",
    "contender",
    "configuration",
    "ms",  # median
    "ms_10",  # 10th and 90th percentile
    "ms_90",
    "repeats",
    "ms_rested",  # --rest: mean of the fastest 5 calls in a row after 2 seconds without work
    "sm_mhz",  # mean clock of the multiprocessors and power while the calls ran
    "power_w",
    "tflop",  # needed by the method: dense attention for "dense", the shape's own for the others
    "tflop_per_s",
    "gb_per_s",  # of the pre-pass: what it reads and writes
    "peak_mib",  # allocated beyond the inputs
    "error",  # accuracy: root mean square of the difference to float64, in units of the exact rows' own
    "error_plain",  # the same of plain PyTorch in the inputs' precision
    "reason",  # why there is no time
    "gpu",
    "torch",
    "triton",
    "commit",
    "dirty",
)
Row = dict[str, Any]


def check(device: str, shapes: Sequence[str], names: Sequence[str]) -> tuple[torch.device, list[Shape], list[str]]:
    """The device, shapes and contenders that are meant. HiresError where one is unknown or there is no GPU."""
    chosen = choose(shapes)
    allowed = contenders.names()
    for name in names:
        if name not in allowed:
            raise unknown("backend", name, allowed)
    return device_for(chosen, device), chosen, list(names or allowed)


def measure(
    device: torch.device,
    shapes: Sequence[Shape],
    names: Sequence[str],
    repeats: int,
    accuracy: bool,
    rest: bool = False,
) -> Iterator[Row]:
    """One row for each shape, part, contender and configuration, as soon as it is known."""
    torch._logging.set_logs(dynamo=logging.ERROR)
    machine = _machine()
    for shape in shapes:
        sets = turns(shape, device)
        first = sets[0]
        for part in shape.parts:
            exact = plain = None
            for name in names:
                for how, alternatives in contenders.programs(shape, part, name, device):
                    row: Row = {"shape": shape.name, "part": part, "contender": name}
                    found = {
                        configuration: _timed(shape, part, name, program, sets, device, repeats)
                        for configuration, program in alternatives.items()
                    }
                    best = min(found, key=lambda configuration: found[configuration].get("ms", math.inf))
                    row |= {"configuration": ", ".join(filter(None, (how, best)))} | found[best]
                    if rest and "ms" in row:
                        with torch.no_grad(), contenders.attention(shape, name, device):
                            row["ms_rested"] = rested(partial(_turn, alternatives[best], sets), device)
                    if accuracy and "ms" in row and _comparable(part, name, how):
                        if exact is None:
                            exact = rows(shape, part, first, torch.float64)
                            plain = _error(rows(shape, part, first, first.image[0].dtype), exact)
                        with torch.no_grad(), contenders.attention(shape, name, device):
                            given = _sampled(shape, part, alternatives[best](first))
                        row |= {"error": _error(given, exact), "error_plain": plain}
                    yield row | machine
        del first, sets
        torch.compiler.reset()
        _clear(device)


def _comparable(part: str, name: str, how: str) -> bool:
    """Whether the rows are those of the method on the inputs as they are."""
    return part in ("image", "all", "global") and name != "dense" and how != "excluded"


def _timed(
    shape: Shape,
    part: str,
    name: str,
    program: contenders.Program,
    sets: list[Inputs],
    device: torch.device,
    repeats: int,
) -> Row:
    """Times and rates, or the reason why there are none: a refusal or too little memory stops nothing."""
    _clear(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    sensors = Sensors(device)
    try:
        with torch.no_grad(), contenders.attention(shape, name, device):
            times = milliseconds(partial(_turn, program, sets), device, repeats, len(sets), sensors.read)
    except Exception as error:
        return {"reason": failure(error)}
    middle = median(times)
    row: Row = {
        "ms": middle,
        "ms_10": times[len(times) // 10],
        "ms_90": times[-1 - len(times) // 10],
        "repeats": len(times),
    }
    if sensors.clocks:
        row["sm_mhz"] = fmean(sensors.clocks)
    if sensors.powers:
        row["power_w"] = fmean(sensors.powers)
    if device.type == "cuda":
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if part == "prologue":
        return row | {"gb_per_s": _prologue_bytes(sets[0]) / middle / 1e6}
    tflop = shape.flop(part, dense=name == "dense") / 1e12
    return row | {"tflop": tflop, "tflop_per_s": tflop / middle * 1e3}


def _turn(program: contenders.Program, sets: list[Inputs], index: int) -> Any:
    return program(sets[index % len(sets)])


def _sampled(shape: Shape, part: str, output: tuple[Tensor, Tensor | None]) -> Tensor:
    image_places, text_places = (x.to(output[0].device) for x in sample(shape, part))
    image, text = output
    found = [image[:, image_places]]
    if text is not None:
        found.append(text[:, text_places])
    return torch.cat(found, dim=1)


def _error(given: Tensor, exact: Tensor) -> float:
    return float(((given.double() - exact).square().mean() / exact.square().mean()).sqrt())


def _prologue_bytes(inputs: Inputs) -> int:
    moved = [*inputs.image[:2], *(inputs.text or ())[:2]]
    return 2 * sum(x.nbytes for x in moved) + sum(x.nbytes for x in inputs.rope)


def _clear(device: torch.device) -> None:
    """Give memory back, and start counting its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _machine() -> Row:
    facts = provenance.machine()
    packages = facts["packages"]
    return {
        "gpu": facts["gpu"] or facts["cpu"],
        "torch": torch.__version__,
        "triton": packages.get("triton"),
        "commit": facts["commit"],
        "dirty": facts["dirty"],
    }


def table(found: Sequence[Row]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in found)
    return text.getvalue()


HEADER = (
    f"{'shape':<17} {'part':<8} {'contender':<13} {'ms':>9} {'TFLOP':>8} {'TFLOP/s':>7} {'GB/s':>5} {'rested':>7}"
    f" {'MHz':>5} {'W':>4} {'error':>7}  configuration, or why there is no time"
)


def line(row: Row) -> str:
    """A row for the terminal."""

    def cell(name: str, width: int, form: str) -> str:
        return f"{row[name]:>{width}{form}}" if name in row else " " * width

    start = f"{row['shape']:<17} {row['part']:<8} {row['contender']:<13}"
    rates = cell("tflop", 8, ".3g"), cell("tflop_per_s", 7, ".1f"), cell("gb_per_s", 5, ".0f")
    state = cell("ms_rested", 7, ".3f"), cell("sm_mhz", 5, ".0f"), cell("power_w", 4, ".0f")
    end = row.get("reason") or row["configuration"]
    return " ".join((start, cell("ms", 9, ".3f"), *rates, *state, cell("error", 7, ".1e"), "", end)).rstrip()
