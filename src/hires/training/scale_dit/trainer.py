"""The training of an adapter: steps, looks on the way, checkpoints that a run goes on from exactly."""

import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hires.additions.adapters import SCALE_DIT_ADAPTER
from hires.additions.lora import save_lora
from hires.backbones import load
from hires.errors import HiresError
from hires.files.storage import replacing, write_json
from hires.generation import generate
from hires.training.captioned import open_source, seed_of
from hires.training.evaluate import contact_sheet
from hires.training.loop import EAGER_STEPS, EMA, captured, side_stream
from hires.training.scale_dit.data import Encoder, Passes, latent_sizes
from hires.training.scale_dit.loss import Batch, add_adapter, checkpointed, velocity_loss
from hires.training.scale_dit.recipe import Optimizer, Recipe

CHECKPOINT = "checkpoint.pt"
TRAINING, VALIDATION = 0, 1  # streams of random numbers
MAY_CHANGE = {  # between a run and its resumption
    "steps", "log_every", "checkpoint_every", "validation", "cuda_graph", "data.workers",
}  # fmt: skip


def build_optimizer(options: Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """AdamW, or Prodigy with the published settings (bias correction, safeguarded warm-up)."""
    shared: dict[str, Any] = {"betas": options.betas, "weight_decay": options.weight_decay}
    if options.name == "adamw":
        return torch.optim.AdamW(parameters, lr=base_rate(options), fused=parameters[0].is_cuda, **shared)
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise HiresError(
            "optimizer.name = 'prodigy' needs its package: pip install -e .[train], or take adamw"
        ) from None
    return Prodigy(parameters, lr=base_rate(options), use_bias_correction=True, safeguard_warmup=True, **shared)


def base_rate(options: Optimizer) -> float:
    return options.lr if options.lr is not None else 1e-4 if options.name == "adamw" else 1.0


def rate(options: Optimizer, step: int, progress: float) -> float:
    """Learning rate: rises over the warm-up, holds, falls linearly to 0 from progress `decay_from` on."""
    factors = [1.0, (step + 1) / max(options.warmup, 1)]
    if options.decay_from < 1:
        factors.append((1 - progress) / (1 - options.decay_from))
    return base_rate(options) * min(factors)


class Pass:
    """Forward and backward of a batch, added to the gradients and to `total`; on a GPU one CUDA graph if wished.

    The optimiser stays outside, so that any will do.
    """

    def __init__(self, loss: Callable[[Batch], Tensor], share: float, device: torch.device, capture: bool) -> None:
        self.loss, self.share, self.capture, self.count = loss, share, capture and device.type == "cuda", 0
        self.total = torch.zeros((), device=device)
        self.inputs: Batch | None = None

    def __call__(self, batch: Batch) -> None:
        if self.inputs is None or not self.capture:
            self.inputs = batch
        else:
            torch._foreach_copy_(list(self.inputs), list(batch))
        if self.capture and self.count == EAGER_STEPS:
            self._run = captured(self._run)  # type: ignore[method-assign]
        self._run()
        self.count += 1

    def _run(self) -> None:
        assert self.inputs is not None
        loss = self.loss(self.inputs)
        (loss * self.share).backward()
        self.total.add_(loss.detach())


class Trainer:
    """One run: the model with its adapter, the data, and what a checkpoint keeps."""

    def __init__(self, recipe: Recipe, out: Path, device: torch.device) -> None:
        self.processes = PartialState(cpu=device.type == "cpu")
        self.device = device = device if self.processes.num_processes == 1 else self.processes.device
        self.recipe, self.out = recipe, out
        self.backbone = backbone = load(recipe.model, device, weights=recipe.weights)
        self.model: Any = backbone.model
        if not isinstance(self.model, FluxTransformer2DModel):
            raise HiresError(f"model {recipe.model!r} is a {type(self.model).__name__}: scale-dit trains FLUX models")
        self.sampling = recipe.sampling.over(backbone.defaults)
        size, low = latent_sizes(backbone, recipe.size, self.sampling.lr_ratio)
        self.parameters = add_adapter(backbone, recipe.lora, recipe.seed)
        if recipe.gradient_checkpointing:
            self.model.enable_gradient_checkpointing(checkpointed)
        self.optimizer = build_optimizer(recipe.optimizer, self.parameters)
        self.ema = EMA([nn.ParameterList(self.parameters)], recipe.ema) if recipe.ema else None

        data, shape = recipe.data, (backbone.latent_channels, *size)
        shares = {"whole": data.whole, "close_up": data.close_up, "careless": data.careless}
        sources = [
            open_source(data.source, recipe.size, seed_of(recipe.seed, s, 0), shares) for s in (TRAINING, VALIDATION)
        ]
        self.encoder = Encoder(backbone, recipe, self.sampling, low, device)
        self.pool = self.encoder.pool(sources[0], data.pool, recipe.batch, data.workers) if data.pool else None
        self.passes = Passes(recipe, None if data.pool else sources[0], shape, low, TRAINING)
        self.run_pass = Pass(self.loss, 1 / recipe.accumulation, device, recipe.cuda_graph)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.looks = (
            self._looks(Passes(recipe, sources[1], shape, low, VALIDATION)) if self.processes.is_main_process else []
        )

        self.step, self.since_log, self.seconds = 0, 0, 0.0
        self.log: list[dict[str, float]] = []
        self.validation: list[dict[str, float]] = []

    def loss(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return velocity_loss(self.model, batch, self.sampling)

    # --- a step ---------------------------------------------------------------------------------------------------

    def train(self, seconds: float, callback: Callable[[int], None] | None) -> None:
        """Steps from where the run stands to the end of the recipe or of the time, checkpoints and looks between."""
        recipe, processes = self.recipe, self.processes
        if processes.num_processes > 1 and seconds < math.inf:
            raise HiresError("--seconds with several processes: they would not end at the same step; give --steps")
        count, per_step = processes.num_processes, recipe.accumulation * processes.num_processes
        places = range(self.step * per_step + processes.process_index, recipe.steps * per_step, count)
        loader = iter(DataLoader(self.passes, batch_size=None, sampler=places, num_workers=recipe.data.workers))
        start, before = time.monotonic(), self.seconds
        with side_stream(self.device):
            if self.step == 0:
                self.look()
            progress = self.step / recipe.steps
            while progress < 1:
                for _ in range(recipe.accumulation):
                    pictures, draws = next(loader)
                    self.run_pass(self.encoder.batch(pictures, draws, self.pool))
                self._update(progress)
                self.step += 1
                self.since_log += 1
                self.seconds = before + time.monotonic() - start
                progress = max(self.step / recipe.steps, (self.seconds - before) / seconds)
                last = progress >= 1
                if last or self.step % recipe.log_every == 0:
                    self._write_row()
                if last or (recipe.validation.every and self.step % recipe.validation.every == 0):
                    self.look()
                if last or self.step % recipe.checkpoint_every == 0:
                    self.save_checkpoint()
                if callback is not None:
                    callback(self.step)

    def _update(self, progress: float) -> None:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if self.processes.num_processes > 1:
            flat = reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
            torch._foreach_copy_(grads, [x.view_as(g) for x, g in zip(flat.split([g.numel() for g in grads]), grads)])
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.recipe.optimizer, self.step, progress)
        self.optimizer.step()
        torch._foreach_zero_(grads)
        if self.ema is not None:
            self.ema.update()

    def _write_row(self) -> None:
        mean = (self.run_pass.total / (self.since_log * self.recipe.accumulation)).item()
        if not math.isfinite(mean):
            raise HiresError(f"scale-dit: the loss became {mean} at step {self.step}; lower optimizer.lr or clip")
        row = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "loss": mean,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.log.append(row)
        self.run_pass.total.zero_()
        self.since_log = 0
        self._say(f"step {self.step} {self.seconds:.0f} s loss {mean:.4f}")

    def _say(self, text: str) -> None:
        if self.processes.is_main_process:
            print(f"scale-dit {text}", flush=True)

    # --- looks ----------------------------------------------------------------------------------------------------

    def _looks(self, passes: Passes) -> list[Batch]:
        """Samples that stay the same, in passes of the recipe's batch size."""
        wanted = self.recipe.validation.samples if self.recipe.validation.every else 0
        count = -(-wanted // self.recipe.batch)
        drawn = [passes[index] for index in range(count)]
        return [self.encoder.batch(pictures, draws, None) for pictures, draws in drawn]

    @torch.no_grad()
    def look(self) -> None:
        """Log the mean loss of the validation samples, and paint the validation prompts."""
        options = self.recipe.validation
        if not (options.every and self.processes.is_main_process):
            return
        with self.averaged():
            if self.looks:
                mean = torch.stack([self.loss(batch) for batch in self.looks]).mean().item()
                self.validation.append({"step": self.step, "loss": mean})
                self._say(f"step {self.step} validation loss {mean:.5f}")
            if options.prompts:
                self._paint(options.prompts, options.seed)

    def _paint(self, prompts: list[str], seed: int) -> None:
        side, seeds = self.recipe.size, [seed + i for i in range(len(prompts))]
        images = generate(
            self.backbone, prompts, SCALE_DIT_ADAPTER, height=side, width=side, seed=seeds,
            **self.recipe.sampling.model_dump(exclude_unset=True),
        )  # fmt: skip
        pixels = torch.stack([_pixels(image) for image in images])
        with replacing(self.out / "validation" / f"{self.step:06d}.png") as temporary:
            contact_sheet(pixels, min(len(prompts), 4)).save(temporary, format="png")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average of the weights in their place, if there is one."""
        if self.ema is None:
            yield
            return
        kept = [p.detach().clone() for p in self.parameters]
        self.ema.copy_to_source()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)

    # --- files ----------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        if not self.processes.is_main_process:
            return
        state = {
            "recipe": self.recipe.record(),
            "processes": self.processes.num_processes,
            "step": self.step,
            "since_log": self.since_log,
            "seconds": self.seconds,
            "total": self.run_pass.total,
            "parameters": [p.detach() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema and (self.ema.step, self.ema.average),
            "log": self.log,
            "validation": self.validation,
        }
        with replacing(self.out / CHECKPOINT) as temporary:
            torch.save(state, temporary)

    def load_checkpoint(self, folder: Path) -> None:
        """Go on where the checkpoint in `folder` ended; HiresError if it is cut short or of another recipe."""
        path = folder / CHECKPOINT
        if not path.is_file():
            raise HiresError(f"--resume {folder}: no {CHECKPOINT} there; `hires train scale-dit` writes them")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            made = {**state["recipe"], "processes": state["processes"]}
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
            raise HiresError(f"checkpoint {path} is cut short or none of ours: begin anew without --resume") from None
        given = {**self.recipe.record(), "processes": self.processes.num_processes}
        for place, was, now in _differences(made, given):
            raise HiresError(
                f"checkpoint {path} was made with {place} = {was!r}, not {now!r}: resume with the same recipe"
            )
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, state["parameters"])
            self.run_pass.total.copy_(state["total"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.step = state["ema"][0]
            torch._foreach_copy_(self.ema.average, state["ema"][1])
        self.step, self.since_log, self.seconds = state["step"], state["since_log"], state["seconds"]
        self.log, self.validation = state["log"], state["validation"]

    def save(self) -> None:
        """The LoRA (its average, if there is one) and training.json."""
        if not self.processes.is_main_process:
            return
        with self.averaged():
            save_lora(self.backbone.pipe, self.out, SCALE_DIT_ADAPTER)
        record = {
            "recipe": self.recipe.record(),
            "revision": self.backbone.revision,
            "parameters": sum(p.numel() for p in self.parameters),
            "processes": self.processes.num_processes,
        }
        if self.device.type == "cuda":
            record["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        write_json(self.out / "training.json", {**record, "validation": self.validation, "log": self.log})


def _differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, value in now.items():
        place = f"{prefix}{key}"
        if place in MAY_CHANGE:
            continue
        if isinstance(value, dict) and isinstance(was.get(key), dict):
            yield from _differences(was[key], value, f"{place}.")
        elif was.get(key) != value:
            yield place, was.get(key), value


def _pixels(image: Image.Image) -> Tensor:
    """An RGB image as (3, height, width) in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    resume: Path | None = None,
    seconds: float = math.inf,
    callback: Callable[[int], None] | None = None,
) -> None:
    """Train a Scale-DiT adapter and write it to `out`.

    `out` then holds pytorch_lora_weights.safetensors, for `pipe.load_lora_weights(out, adapter_name="scale-dit")`,
    training.json (recipe and curves), the last checkpoint, and validation images.

    Args:
        resume: folder whose checkpoint to go on from.
        seconds: end after this long; the learning rate then follows time, where time is ahead of the steps.
        callback: called with the number of steps done after each.

    Raises:
        HiresError: a model that is no FLUX, sizes off the token grid, images that are missing, unreadable or too
            small, a checkpoint or LoRA that doesn't fit, a loss that is not finite.
    """
    trainer = Trainer(recipe, out, device)
    if resume is not None:
        trainer.load_checkpoint(resume)
    trainer.train(seconds, callback)
    trainer.save()
