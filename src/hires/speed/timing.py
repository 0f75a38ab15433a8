"""Time of a call on a device: warmed up, inputs that the cache doesn't hold, each call timed by itself."""

import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 2
CACHE = 2**28  # bytes that push everything out of a cache: five times the L2 of an H200
SECONDS = 3.0  # spent on one measurement at most, but for FEWEST calls
FEWEST = 5


def rotations(bytes_each: int, device: torch.device) -> int:
    """How many sets of inputs to take in turn, so that a set is out of a GPU's cache when it comes again."""
    if device.type == "cpu":
        return 1
    return max(2, min(16, -(-CACHE // bytes_each) + 1))


def milliseconds(call: Callable[[int], Any], device: torch.device, repeats: int, sets: int) -> list[float]:
    """Times of call(0), call(1), …, sorted, at most `repeats` of them; fewer where they would take too long.

    call(i) works on set i % sets of the inputs; each set is seen before the clock starts.
    """
    for index in range(max(WARM_UP, sets)):
        call(index)
    synchronise(device)
    start = time.perf_counter()
    call(0)
    synchronise(device)
    repeats = max(min(FEWEST, repeats), min(repeats, int(SECONDS / (time.perf_counter() - start))))
    if device.type == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for index, (first, last) in enumerate(events):
            first.record()
            call(index)
            last.record()
        synchronise(device)
        return sorted(first.elapsed_time(last) for first, last in events)
    times = []
    for index in range(repeats):
        start = time.perf_counter()
        call(index)
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)


def failure(error: Exception) -> str:
    """Kind and first line of an exception: the reason why there is no time."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip()}"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
