"""Time and memory of denoising steps, VAE and text encoders, one after the other on the device."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hires.attention import use_attention
from hires.backbones.base import Backbone
from hires.cascade import cascade
from hires.execution.compilation import fastest_attention
from hires.execution.graphs import REPLAYED_FROM, Graphs, cuda_graphs
from hires.methods.multidiffusion import views
from hires.settings import Sampling
from hires.speed.free import without_attention
from hires.speed.timing import synchronise
from hires.variants import VARIANTS, Variant

Row = dict[str, Any]
PROMPT = "three red rings on a brick wall"
VIEW_BATCHES = range(1, 9)  # views in one call, where they divide the number of views


@dataclass(frozen=True)
class Contender:
    """A way to make a step at the target size. `stages`, `lfm` and `adapter` of the variant don't shape a step."""

    variant: Variant
    settings: dict[str, Any] = field(default_factory=dict)
    attention: bool = True

    def installed(self, backbone: Backbone) -> AbstractContextManager[Any]:
        return nullcontext() if self.attention else without_attention(backbone.model)

    def step(self) -> Variant:
        """The variant from given base latents in one jump, without the VAE and without an adapter."""
        return self.variant.model_copy(update={"stages": "single", "lfm": False, "adapter": None})


CONTENDERS = {
    "base": Contender(Variant()),
    "scalediff": Contender(VARIANTS["scalediff"]),
    "multidiffusion": Contender(VARIANTS["multidiffusion+lfm+sg"]),
    "dense": Contender(VARIANTS["dense+lfm+sg"]),
    "scale-dit": Contender(VARIANTS["scale-dit"]),
    "scalediff-fp8": Contender(VARIANTS["scalediff"], {"linears": "fp8"}),
    "scalediff-fast": Contender(VARIANTS["scalediff"], {"linears": "fp8", "text_rows": "global"}),  # a computed step
    "base-fp8": Contender(Variant(), {"linears": "fp8"}),
    "attention-free": Contender(VARIANTS["dense+lfm+sg"], attention=False),
}


class Enough(Exception):
    """Ends a cascade once its steps have been timed."""


class Watch:
    """A callback of the cascade that times the steps after the first, which compiles and warms up.

    Steps in which a CUDA graph is made ready are left out, too. After `repeats` others, or one longer than `patience`
    seconds, it raises `Enough`. On a GPU one more step is then profiled where steps are short: `kernels` is the seconds
    that its kernels ran, None where that isn't known. `graph`: whether the timed steps were replays.
    """

    def __init__(self, device: torch.device, repeats: int, patience: float):
        self.device, self.repeats, self.patience = device, repeats, patience
        self.times: list[float] = []
        self.warm_up = 0.0
        self.kernels: float | None = None
        self.profile: torch.profiler.profile | None = None
        self.graph = False
        self.prepared, self.replayed = Graphs.prepared, Graphs.replayed
        self.last = time.perf_counter()

    def __call__(self, stage: str, step: int, steps: int, latents: Tensor) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        if step == 1:
            self.warm_up = now - self.last
            reset_peak(self.device)
        elif self.profile:
            self.profile.stop()
            self.kernels = sum(event.self_device_time_total for event in self.profile.key_averages()) / 1e6
            raise Enough
        elif self.prepared == Graphs.prepared:
            self.graph = self.replayed < Graphs.replayed
            self.times.append(now - self.last)
            slow = self.times[-1] > self.patience
            if slow or len(self.times) == self.repeats:
                if slow or self.device.type != "cuda":
                    raise Enough
                self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profile.start()
        self.prepared, self.replayed = Graphs.prepared, Graphs.replayed
        self.last = time.perf_counter()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Most bytes that torch held on a GPU since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def noise(*shape: int, device: torch.device) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def timed_step(backbone: Backbone, contender: Contender, side: int, repeats: int, patience: float) -> Row:
    """Median seconds of a denoising step at side² pixels, Structure Guidance and the scheduler's step included.

    `busy`: the share of that time in which a GPU computes. `graph`: whether the model ran as a CUDA graph.
    """
    base = backbone.base_resolution
    steps = REPLAYED_FROM + repeats + 1
    settings = {"num_inference_steps": 2 * steps, "tau": 500, "reference": "latent", **contender.settings}
    variant, given = contender.step(), None
    if side == base:
        variant, settings["num_inference_steps"] = Variant(), steps
    else:
        given = noise(1, backbone.latent_channels, *backbone.latent_size(base, base), device=backbone.device)
    watch = Watch(backbone.device, repeats, patience)
    try:
        with contender.installed(backbone), fastest_attention(backbone.device):
            sampling = Sampling.of(**settings)
            list(cascade(backbone, [PROMPT], [0], variant, side, side, sampling, given, callback=watch))
    except Enough:
        pass
    step = median(watch.times)
    return {
        "seconds": step,
        "times": watch.times,
        "busy": None if watch.kernels is None else watch.kernels / step,
        "graph": watch.graph,
        "warm_up": watch.warm_up,
        "peak_bytes": peak(backbone.device),
    }


def best_view_batch(backbone: Backbone, side: int) -> tuple[int, dict[int, float]]:
    """MultiDiffusion's faster number of views in a call, the least or the most of VIEW_BATCHES; seconds a view."""
    base = backbone.latent_size(backbone.base_resolution, backbone.base_resolution)
    count = len(views(backbone.latent_size(side, side), base))
    candidates = [n for n in VIEW_BATCHES if count % n == 0]
    sampling = Sampling.of(num_inference_steps=2).over(backbone.defaults)
    conditioning = backbone.encode_prompt([PROMPT], sampling)
    found = {}
    for n in {candidates[0], candidates[-1]}:
        rows = {name: x.expand(n, *x.shape[1:]) for name, x in conditioning.items()}
        crops = noise(n, backbone.latent_channels, *base, device=backbone.device)

        @torch.no_grad()
        def call(rows: Any = rows, crops: Tensor = crops) -> Tensor:
            schedule = backbone.schedule(sampling, base)
            return backbone.predict(crops, schedule, 0, rows, sampling, (backbone.base_resolution,) * 2)

        with (
            use_attention(backbone.model, "dense", base, base),
            fastest_attention(backbone.device),
            cuda_graphs(backbone.model, backbone.device, n * backbone.base_resolution**2),
        ):
            for _ in range(REPLAYED_FROM - 1):
                call()
            found[n] = seconds(call, backbone.device, 3, 20)["seconds"] / n
    return min(found, key=lambda n: found[n]), found


@torch.no_grad()
def seconds(call: Callable[[], Any], device: torch.device, repeats: int, patience: float) -> Row:
    """Median seconds of a call after a first one, its peak memory; once only where it takes longer than `patience`."""
    times: list[float] = []
    start = time.perf_counter()
    call()
    synchronise(device)
    warm_up = time.perf_counter() - start
    reset_peak(device)
    while len(times) < repeats and (not times or times[-1] <= patience):
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return {"seconds": median(times), "times": times, "warm_up": warm_up, "peak_bytes": peak(device)}


def low_resolution(backbone: Backbone, side: int, repeats: int, patience: float) -> Row:
    """Scale-DiT's one pass over the image that guides a stage of side² pixels."""
    sampling = backbone.defaults
    low = backbone.latent_size(int(side / sampling.lr_ratio), int(side / sampling.lr_ratio))
    latents = noise(1, backbone.latent_channels, *low, device=backbone.device)
    conditioning = backbone.encode_prompt([PROMPT], sampling)
    size = backbone.latent_size(side, side)
    return seconds(
        lambda: backbone.low_resolution_guidance(latents, size, conditioning, sampling),
        backbone.device,
        repeats,
        patience,
    )


def vae(backbone: Backbone, what: str, side: int, repeats: int, patience: float) -> Row:
    """ "encode" or "decode" of the VAE at side² pixels, tiled as a cascade has it; with the VAE's dtype."""
    if what == "encode":
        pixels = noise(1, 3, side, side, device=backbone.device).clamp(-1, 1)
        row = seconds(lambda: backbone.encode(pixels), backbone.device, repeats, patience)
    else:
        latents = noise(1, backbone.latent_channels, *backbone.latent_size(side, side), device=backbone.device)
        row = seconds(lambda: backbone.decode(latents), backbone.device, repeats, patience)
    return {**row, "dtype": vae_dtype(backbone)}


def vae_dtype(backbone: Backbone) -> str:
    """float32 where the VAE would overflow in the model's float16."""
    module = backbone.pipe.vae
    dtype = torch.float32 if module.dtype == torch.float16 and module.config.force_upcast else module.dtype
    return str(dtype).removeprefix("torch.")
