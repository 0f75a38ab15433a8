"""CUDA graphs of a model's forward: a short step waits for its launches, and a replay is one launch."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from hires.execution.compilation import COMPILED

PIXELS = 2048**2  # of all images in a call; longer ones keep a GPU busy, and a graph keeps its activations
REPLAYED_FROM = 3  # the call of a kind whose work is recorded at the latest, and launched as a graph


class Recorder(Protocol):
    """What a device does for `Graphs`."""

    def rehearse(self, call: Callable[[], Any]) -> tuple[Any, bool]:
        """What `call` returns, and whether it can be recorded."""

    def record(self, call: Callable[..., Any], buffers: list[Any]) -> tuple[Any, Callable[[], object]]:
        """What call(*buffers) returns, and a launch that writes it anew from what the buffers then hold."""

    def release(self) -> None:
        """Give back the memory of recordings that are no more."""


@dataclass
class _Kind:
    """The calls of one signature.

    Attributes:
        buffers: arguments of the recording, into which those of a call are copied.
        rehearsed: whether the next call can be recorded.
        plain: whether none can.
        output, launch: of the recording.
    """

    signature: Any
    calls: int = 0
    buffers: list[Any] = field(default_factory=list)
    rehearsed: bool = False
    plain: bool = False
    output: Any = None
    launch: Callable[[], object] | None = None


class Graphs:
    """A forward that is recorded once for each signature of its arguments, and replayed from then on.

    Signature: shapes, strides, dtypes and devices of tensors, wherever in the arguments, and the values of all else. A
    first call is rehearsed on the stream of the recording, the second is recorded. A first call that compiles or waits
    for the device may have filled caches: the second is rehearsed as well, and the third recorded unless it waited,
    too. What else the forward depends on, attention processors and LoRAs for example, must stay as it is.

    Attributes:
        prepared, replayed: calls before recordings were ready, and replays; of this process, for who measures.
    """

    prepared: ClassVar[int] = 0
    replayed: ClassVar[int] = 0

    def __init__(self, forward: Callable[..., Any], recorder: Recorder) -> None:
        self.forward, self.recorder, self.kinds = forward, recorder, list[_Kind]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))

        def call(*leaves: Any) -> Any:
            args, kwargs = tree_unflatten(leaves, structure)
            return self.forward(*args, **kwargs)

        kind = self._kind((structure, [_described(leaf) for leaf in leaves]))
        kind.calls += 1
        if kind.plain:
            return call(*leaves)
        if kind.launch is not None:
            Graphs.replayed += 1
            return _replay(kind, leaves)
        Graphs.prepared += 1
        if kind.rehearsed:
            kind.output, kind.launch = self.recorder.record(call, kind.buffers)
            return _replay(kind, leaves)
        kind.buffers = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        last, before = kind.calls == REPLAYED_FROM - 1, _compilations()
        output, able = self.recorder.rehearse(lambda: call(*kind.buffers))
        kind.rehearsed = able and (last or _compilations() == before)
        if last and not able:
            kind.plain, kind.buffers = True, []
        return output

    def _kind(self, signature: Any) -> _Kind:
        for kind in self.kinds:
            if kind.signature == signature:
                return kind
        self.kinds.append(_Kind(signature))
        return self.kinds[-1]

    def drop(self) -> None:
        """Forget all recordings, and give back their memory."""
        self.kinds.clear()
        self.recorder.release()


def _replay(kind: _Kind, leaves: list[Any]) -> Any:
    assert kind.launch is not None
    for buffer, leaf in zip(kind.buffers, leaves, strict=True):
        if isinstance(leaf, Tensor):
            buffer.copy_(leaf)
    kind.launch()
    return tree_map_only(Tensor, torch.clone, kind.output)  # the next replay writes over the recording's own


def _compilations() -> int:
    """Graphs that torch.compile has made in this process."""
    import torch._dynamo.utils

    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _described(leaf: Any) -> Any:
    """What a recording is made for."""
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they run one after the other, and what they give is copied.

    `torch.cuda.graph` gives all cached memory back before a recording, which whatever runs next has to ask for anew.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, _side_stream(device)
        self.pool: torch.cuda.MemPool | None = None

    def rehearse(self, call: Callable[[], Any]) -> tuple[Any, bool]:
        """A call that makes the host wait for the GPU can't be recorded; torch's debug mode warns of it."""
        current, mode = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(current)
        with warnings.catch_warnings(record=True, action="always") as found:
            torch.cuda.set_sync_debug_mode("warn")
            found.clear()  # it says that it is a prototype
            try:
                with torch.cuda.stream(self.stream):
                    output = call()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(self.stream)
        waits = [warning for warning in found if "called a synchronizing" in str(warning.message)]
        for other in found:
            if other not in waits:
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        return output, not waits

    def record(self, call: Callable[..., Any], buffers: list[Any]) -> tuple[Any, Callable[[], object]]:
        torch.cuda.synchronize(self.device)
        self._make_room()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            self.pool = self.pool or torch.cuda.MemPool()
            graph.capture_begin(self.pool.id, capture_error_mode="thread_local")  # type: ignore[arg-type]
            try:
                output = call(*buffers)
            finally:
                graph.capture_end()
        return output, graph.replay

    def _make_room(self) -> None:
        """Give cached memory back, a rehearsal's among it, where twice as much isn't free: no recording can take it."""
        device = self.stream.device
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = total * torch.cuda.memory.get_per_process_memory_fraction(device)
        if min(free, allowed - reserved) < 2 * (reserved - torch.cuda.memory_allocated(device)):
            torch.cuda.empty_cache()

    def release(self) -> None:
        if self.pool is not None:
            torch.cuda.synchronize(self.device)
            self.pool = None  # its memory goes with it


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


@contextmanager
def replayed(model: Any, recorder: Recorder) -> Iterator[Graphs]:
    """Within it calls of `model` go through `Graphs`; afterwards its forward is what it was."""
    former = vars(model).get("forward")
    graphs = model.forward = Graphs(model.forward, recorder)
    try:
        yield graphs
    finally:
        if former is None:
            del model.forward
        else:
            model.forward = former
        graphs.drop()


@contextmanager
def cuda_graphs(model: Any, device: torch.device, pixels: int) -> Iterator[None]:
    """Within it a `suitable` model runs as CUDA graphs, on a GPU; what makes the host wait for it stays as it is."""
    if device.type != "cuda" or not suitable(model, pixels):
        yield
        return
    with replayed(model, CudaRecorder(device)):
        yield


def suitable(model: Any, pixels: int) -> bool:
    """Whether graphs pay for a model, and change nothing: after `compile_blocks`, up to `PIXELS`, without hooks.

    `pixels` are those of all images in a call. Hooks of torch, accelerate and diffusers are Python, which a replay
    doesn't run: they offload parts, extrapolate steps, and divide an image among GPUs.
    """
    return model in COMPILED and pixels <= PIXELS and not any(map(_hooked, model.modules()))


def _hooked(module: nn.Module) -> bool:
    theirs = getattr(module, "_diffusers_hook", None)  # stays once the hooks are gone
    return bool(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") or (theirs and theirs.hooks)
    )
