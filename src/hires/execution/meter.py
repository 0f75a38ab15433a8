"""What a block of code costs: seconds, and the most memory that was held meanwhile."""

import contextlib
import resource
import time
from pathlib import Path

import torch


class Meter:
    """Wall time and peak memory of a `with` block.

    Attributes:
        seconds: from its beginning to its end, with all that the device still has to do.
        peak_bytes: most memory held, the model included: by torch on the GPU; on a CPU the resident memory of the whole
            process, libraries too (outside Linux since its start).
    """

    seconds = 0.0
    peak_bytes = 0

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "Meter":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_resident_peak()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak_bytes = _resident_peak()
        self.seconds = time.perf_counter() - self._start


def _reset_resident_peak() -> None:
    with contextlib.suppress(OSError):  # only Linux has it
        Path("/proc/self/clear_refs").write_text("5")


def _resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
