"""The training loop that all models share: AdamW, clipping, EMA, a schedule over steps or seconds, a log."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from hires.errors import HiresError


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


def fit(
    loss: Callable[[int], Tensor],
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
    """Minimise `loss(step)` over the parameters of `modules`, then leave their EMA in them.

    The learning rate warms up, holds, and falls linearly to 0 from progress `decay_from` on; progress is the larger
    of step / `steps` and elapsed / `seconds`, and the run ends at 1. Raises HiresError when the mean loss of the last
    `log_every` steps is not finite.
    """
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    fused = parameters[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    average = EMA(modules, ema)
    log: list[dict[str, float]] = []
    total, step, progress = torch.zeros((), device=parameters[0].device), 0, 0.0
    while progress < 1:
        rate = lr * min(1.0, (step + 1) / warmup, (1 - progress) / (1 - decay_from))
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        average.update()
        total += value.detach()
        step += 1
        if step == 1:
            value.item()  # wait: the first step compiles
            start = time.monotonic()
        elapsed = time.monotonic() - start
        progress = max(step / steps, elapsed / seconds)
        if step % log_every == 0 or progress >= 1:
            mean = (total / ((step - 1) % log_every + 1)).item()
            total.zero_()
            if not math.isfinite(mean):
                raise HiresError(f"{name}: the loss became {mean} at step {step}; lower the learning rate")
            log.append({"step": step, "seconds": round(elapsed, 1), "loss": mean, "lr": rate})
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
