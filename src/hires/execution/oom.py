"""Out of memory: told with what would help, or answered step by step where the configuration asks for that."""

import gc
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hires.errors import HiresError

if TYPE_CHECKING:
    from hires.backbones import Backbone
    from hires.config import Compute
    from hires.settings import Sampling

# PyTorch's CPU allocator, the CUDA driver, and libraries that allocate for themselves raise a plain RuntimeError.
SAID = ("allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED", "can't start new thread")
ONEDNN = ("could not create a primitive", "could not execute a primitive")  # all that it says of memory
ADVICE = (
    "what helps: a smaller size, fewer images at once, vae_tiling = true, view_batch = 1, "
    "or to keep parts of the model in main memory (offload)"
)


def exhausted(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or in main memory."""
    if isinstance(error, RuntimeError):
        return str(error) in ONEDNN or any(text in str(error) for text in SAID)
    return isinstance(error, MemoryError)


def described(error: BaseException) -> str:
    """In words: what was asked for, and what a GPU has."""
    asked = re.search(r"ried to allocate ([0-9.]+) (bytes|[KMG]iB)", str(error))
    if not asked:
        return "out of memory"
    amount = f"{int(asked[1]) / 2**20:.0f} MiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
    held = re.search(r"total capacity of ([0-9.]+ [KMG]iB) of which ([0-9.]+ [KMG]iB) is free", str(error))
    return f"out of memory: {amount} asked for" + (f", {held[2]} of the GPU's {held[1]} free" if held else "")


def attempt(work: Callable[[], object]) -> str | None:
    """None, or in words how memory ran out; by then all that `work` held is free again."""
    try:
        work()
        return None
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        reason = described(error)
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
    return reason


@dataclass
class Thrift:
    """What is saved on once memory runs out: half the batch, half the views at a time, a tiled VAE, offloading.

    Attributes:
        what: is made, for messages.
        views: MultiDiffusion views in one model call, 1 where there are none.
        tileable: whether there is a VAE that isn't tiled yet.
        used: what was saved on so far, as `Sampling` and `Compute` name it; an image's record holds it as `savings`.
    """

    what: str
    compute: "Compute"
    backbone: "Backbone"
    views: int = 1
    tileable: bool = False
    used: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self._offloaded() and not self.compute.offload:
            self.used["offload"] = True  # the model did not fit when it was loaded

    def run(self, make: Callable[[slice], object], n: int) -> None:
        """Make a batch of n, in as many parts as memory needs. HiresError when memory can't be had."""
        start = 0
        while start < n:
            part = slice(start, min(n, start + self.used.get("batch_size", n)))
            reason = attempt(partial(make, part))
            if reason is None:
                start = part.stop
            else:
                self._save(part.stop - start, reason)

    def record(self) -> dict[str, Any]:
        """What the record of an image says of it: nothing where memory was enough."""
        return {"savings": dict(self.used)} if self.used else {}

    def sampling(self, given: "Sampling") -> "Sampling":
        """The settings that the next part is made with."""
        return given.model_copy(update={name: v for name, v in self.used.items() if name in type(given).model_fields})

    def _save(self, batch: int, reason: str) -> None:
        """Take the next step that is left, in place."""
        steps: dict[str, Any] = {}
        if batch > 1:
            steps["batch_size"] = batch // 2
        if self.used.get("view_batch", self.views) > 1:
            steps["view_batch"] = self.used.get("view_batch", self.views) // 2
        if self.tileable and "vae_tiling" not in self.used:
            steps["vae_tiling"] = True
        if self.backbone.device.type == "cuda" and not self._offloaded():
            steps["offload"] = True
        if self.compute.out_of_memory == "refuse" or not steps:
            raise HiresError(f"{self.what}, batch {batch}: {reason}; {self._advice(steps)}")
        from hires.execution.offload import offload_parts

        name, value = next(iter(steps.items()))
        if name == "offload":
            offload_parts(self.backbone.pipe, "model", self.backbone.device)
        self.used[name] = value
        print(f"{self.what}, batch {batch}: {reason}; going on with {name} = {value}", file=sys.stderr)

    def _advice(self, steps: dict[str, Any]) -> str:
        if not steps:
            return "nothing is left to save on: choose a smaller size, or a machine with more memory"
        places = {"batch_size": "compute", "offload": "compute", "view_batch": "sampling", "vae_tiling": "sampling"}
        told = ", ".join(f"{places[name]}.{name} = {str(value).lower()}" for name, value in steps.items())
        return f"what helps: {told}; compute.out_of_memory = adapt takes these steps by itself"

    def _offloaded(self) -> bool:
        return bool(getattr(self.backbone.pipe, "_all_hooks", []))
