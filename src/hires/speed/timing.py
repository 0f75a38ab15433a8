"""Time of a call on a device: warmed up, inputs that the cache doesn't hold, each call timed by itself.

On a GPU it is the GPU's own time: calls are queued while it is made to wait, so that later it waits for no launch.
"""

import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import torch

from hires.execution.oom import described, exhausted

WARM_UP = 2
CACHE = 2**28  # bytes that push everything out of a cache: five times the L2 of an H200
SECONDS = 3.0  # spent on one measurement at most, but for FEWEST calls
FEWEST = 5
REST = 2.0  # seconds in which a GPU cools and its power limit forgets the load before
HEAD_STARTS = 0.02, 0.1, 0.5  # seconds for the host to queue calls in; a longer one where the GPU still caught up
CLOCK = 2e9  # cycles of a GPU a second, about


def rotations(bytes_each: int, device: torch.device) -> int:
    """How many sets of inputs to take in turn, so that a set is out of a GPU's cache when it comes again."""
    if device.type == "cpu":
        return 1
    return max(2, min(16, -(-CACHE // bytes_each) + 1))


def milliseconds(
    call: Callable[[int], Any],
    device: torch.device,
    repeats: int,
    sets: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[float]:
    """Times of call(0), call(1), …, sorted, at most `repeats` of them; fewer where they would take too long.

    call(i) works on set i % sets of the inputs; each set is seen before the clock starts. `meanwhile` is called every
    10 ms while a GPU works through calls that are all queued.
    """
    for index in range(max(WARM_UP, sets)):
        call(index)
    synchronise(device)
    start = time.perf_counter()
    call(0)
    synchronise(device)
    repeats = max(min(FEWEST, repeats), min(repeats, int(SECONDS / (time.perf_counter() - start))))
    return sorted(_each(call, device, repeats, meanwhile))


def rested(call: Callable[[int], Any], device: torch.device) -> float:
    """Mean time of the fastest `FEWEST` calls in a row, of twice as many after a rest."""
    synchronise(device)
    time.sleep(REST)
    times = _each(call, device, 2 * FEWEST, lambda: None)
    return min(fmean(times[first : first + FEWEST]) for first in range(FEWEST + 1))


def _each(call: Callable[[int], Any], device: torch.device, repeats: int, meanwhile: Callable[[], None]) -> list[float]:
    times: list[float] = []
    if device.type == "cuda":
        for head_start in HEAD_STARTS:
            times, late = _queued(call, repeats, meanwhile, head_start)
            if late <= repeats // 10:
                break
        return times
    for index in range(repeats):
        start = time.perf_counter()
        call(index)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _queued(
    call: Callable[[int], Any], repeats: int, meanwhile: Callable[[], None], head_start: float
) -> tuple[list[float], int]:
    """Times of calls behind a pause of `head_start` seconds; how many the GPU came to before they were queued."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    late = 0
    torch.cuda._sleep(int(head_start * CLOCK))
    for index, (first, last) in enumerate(events):
        first.record()
        call(index)
        last.record()
        late += first.query()
    begin = events[0][0]
    while not last.query():
        if begin.query():
            meanwhile()
        time.sleep(0.01)
    return [first.elapsed_time(last) for first, last in events], late


class Sensors:
    """Clock (MHz) and power (W) of a GPU at every `read`; none on a CPU, or where NVIDIA's library doesn't tell."""

    def __init__(self, device: torch.device) -> None:
        self.clocks: list[float] = []
        self.powers: list[float] = []
        self._library: Any = None
        if device.type == "cuda" and find_spec("pynvml"):
            library: Any = import_module("pynvml")
            properties: Any = torch.cuda.get_device_properties(device)  # its type lacks the field
            try:
                library.nvmlInit()
                self._gpu = library.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
                self._library = library
            except library.NVMLError:
                pass

    def read(self) -> None:
        library = self._library
        if library is None:
            return
        self.clocks.append(library.nvmlDeviceGetClockInfo(self._gpu, library.NVML_CLOCK_SM))
        field = library.NVML_FI_DEV_POWER_INSTANT  # nvmlDeviceGetPowerUsage gives the mean of a second
        [found] = library.nvmlDeviceGetFieldValues(self._gpu, [field])
        if found.nvmlReturn == library.NVML_SUCCESS:
            self.powers.append(found.value.uiVal / 1e3)


def failure(error: Exception) -> str:
    """Kind and first line of an exception, or how much memory was lacking: the reason why there is no time."""
    if exhausted(error):
        return described(error)
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip()}"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
