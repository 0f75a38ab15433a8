"""The training loop that all models share: AdamW, clipping, EMA, a schedule over steps or seconds, a log."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from hires.errors import HiresError

EAGER_STEPS = 3  # before capture: they compile, and allocate the optimiser's state


class EMA:
    """Exponential moving average of the parameters of some modules, warmed up over the first steps."""

    def __init__(self, modules: Iterable[nn.Module], decay: float) -> None:
        self.decay, self.step = decay, 0
        self.source: list[Tensor] = [p for m in modules for p in m.parameters()]
        self.average = [p.detach().clone() for p in self.source]

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        weight = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.source], weight)

    @torch.no_grad()
    def copy_to_source(self) -> None:
        """Put the averages in place of the trained parameters."""
        torch._foreach_copy_(self.source, self.average)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as one CUDA graph: models this small spend most of an eager step launching kernels."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph.replay


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own on a GPU: steps can't be captured on the default one."""
    if device.type != "cuda":
        yield
        return
    stream, default = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(default)
    with torch.cuda.stream(stream):
        yield
    default.wait_stream(stream)


def fit(
    loss: Callable[[], Tensor],
    modules: list[nn.Module],
    *,
    steps: int,
    seconds: float = math.inf,
    lr: float,
    decay_from: float = 0.6,
    warmup: int = 100,
    weight_decay: float = 0.02,
    betas: tuple[float, float] = (0.9, 0.98),
    clip: float = 1.0,
    ema: float = 0.9993,
    log_every: int = 100,
    name: str = "",
) -> list[dict[str, float]]:
    """Minimise `loss()` over the parameters of `modules`, then leave their EMA in them.

    The learning rate warms up, holds, and falls linearly to 0 from progress `decay_from` on; progress is the larger
    of step / `steps` and elapsed / `seconds`, and the run ends at 1. On a GPU the step is captured into a CUDA graph:
    `loss` must draw from torch's own generator and never wait for the GPU. Raises HiresError when the mean loss of
    the last `log_every` steps is not finite.
    """
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    rate, total = torch.tensor(lr, device=device), torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=betas, weight_decay=weight_decay, fused=on_gpu, capturable=on_gpu
    )
    average = EMA(modules, ema)

    def train_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        total.add_(value.detach())

    run, step, progress = train_step, 0, 0.0
    log: list[dict[str, float]] = []
    with side_stream(device):
        while progress < 1:
            rate.fill_(lr * min(1.0, (step + 1) / warmup, (1 - progress) / (1 - decay_from)))
            if on_gpu and step == EAGER_STEPS:
                run = captured(train_step)
            run()
            average.update()
            step += 1
            if step <= EAGER_STEPS + 1:
                total.item()  # wait: the first step compiles, a later one is captured
                start = time.monotonic()
            elapsed = time.monotonic() - start
            progress = max(step / steps, elapsed / seconds)
            if step % log_every == 0 or progress >= 1:
                mean = (total / ((step - 1) % log_every + 1)).item()
                total.zero_()
                if not math.isfinite(mean):
                    raise HiresError(f"{name}: the loss became {mean} at step {step}; lower the learning rate")
                log.append({"step": step, "seconds": round(elapsed, 1), "loss": mean, "lr": rate.item()})
                if step % (10 * log_every) == 0 or progress >= 1:
                    print(f"{name} step {step} {elapsed:.0f} s loss {mean:.4f}", flush=True)
    average.copy_to_source()
    return log


def frozen(module: nn.Module) -> nn.Module:
    """A copy that no optimiser touches."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def write_log(folder: Path, recipe: dict, log: list[dict[str, float]]) -> None:
    """Keep the recipe and the loss curve beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps({"recipe": recipe, "log": log}, indent=1) + "\n")
