"""Scale-DiT's adapter: a LoRA for the low-resolution image alone (arXiv 2510.16325, sections 3.2 and 3.3).

Flow matching on native crops, each guided by its own reduced version, with the visibility of inference: one pass over
the low-resolution image with the LoRA on, whose keys and values the high-resolution pass sees with the LoRA off. The
gradient reaches the LoRA through these keys and values only.

Every draw of sample number n comes from a generator seeded by (seed, n): where a run stands is its step.
"""

import copy
import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from hires.additions.adapters import SCALE_DIT_ADAPTER as ADAPTER
from hires.additions.adapters import adapter_states, adapter_switched, restore_adapters
from hires.additions.lora import load_lora, save_lora
from hires.attention import low_resolution_pass, use_attention
from hires.attention.flux import image_ids
from hires.backbones import load
from hires.backbones.base import Backbone
from hires.backbones.flux import pack, unpack
from hires.errors import HiresError, unknown
from hires.files.storage import replacing, write_json
from hires.generation import generate
from hires.methods.frequency import resize
from hires.settings import Resolved, Sampling
from hires.sizes import Size
from hires.training.captioned import Pictures, Source, open_source, seed_of
from hires.training.evaluate import contact_sheet
from hires.training.loop import EAGER_STEPS, EMA, captured, side_stream
from hires.training.scale_dit_config import Lora, Optimizer, Recipe, Timestep

CHECKPOINT = "checkpoint.pt"
TRAINING, VALIDATION = 0, 1  # streams of random numbers
MAY_CHANGE = {"steps", "log_every", "checkpoint_every", "validation", "cuda_graph"}  # between a run and its resumption


class Batch(NamedTuple):
    """What one pass sees: clean latents and noise (n, C, h, w), clean low-resolution latents (n, C, h', w'), times
    (n,) in (0, 1), text embeddings (n, tokens, width) and pooled (n, width)."""

    latents: Tensor
    low: Tensor
    noise: Tensor
    t: Tensor
    prompt_embeds: Tensor
    pooled: Tensor


def velocity_loss(model: Any, batch: Batch, sampling: Sampling, adapter: str = ADAPTER) -> Tensor:
    """Mean squared error of the high-resolution velocity ε − z at z_t = (1 − t)·z + t·ε: a scalar, float32.

    Args:
        model: FluxTransformer2DModel that carries the LoRA `adapter`.
        sampling: what tokens see: local_radius or local_window, lr_neighbours, lr_anchors, token_order and
            attention_backend, as at inference.
    """
    size, low_size = _side(batch.latents), _side(batch.low)
    visible = sampling.local_attention()
    with adapter_switched(model, adapter, on=True):
        guidance = low_resolution_pass(
            model, pack(batch.low), batch.pooled, low_size=low_size, size=size, scaled=sampling.lr_anchors, **visible
        )
    noisy = torch.lerp(batch.latents, batch.noise, batch.t[:, None, None, None])
    device = noisy.device
    with (
        adapter_switched(model, adapter, on=False),
        use_attention(
            model, "scale_dit", size, size, guidance=guidance, guidance_neighbours=sampling.lr_neighbours, **visible
        ),
    ):
        output = model(
            hidden_states=pack(noisy),
            encoder_hidden_states=batch.prompt_embeds,
            pooled_projections=batch.pooled,
            timestep=batch.t,
            guidance=torch.ones_like(batch.t) if model.config.guidance_embeds else None,
            img_ids=image_ids((size[0] // 2, size[1] // 2), device),
            txt_ids=torch.zeros(batch.prompt_embeds.shape[1], 3, device=device),
            return_dict=False,
        )[0]
    return F.mse_loss(unpack(output.float(), size), batch.noise - batch.latents)


def _side(latents: Tensor) -> Size:
    return latents.shape[2], latents.shape[3]


# Gradient checkpointing


def checkpointed(block: nn.Module, *args: Any) -> Any:
    """For `model.enable_gradient_checkpointing`: run a block, and run it again alike in the backward pass.

    By then its processor and the state of its LoRA are those of another pass, so they are put back for as long.
    """
    attention: Any = block.attn
    processor = copy.copy(attention.processor)
    processor.collect = None  # the keys and values of the first run are the ones in use
    states = adapter_states(block)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), as_before()

    @contextmanager
    def as_before() -> Iterator[None]:
        before = attention.processor, adapter_states(block)
        attention.set_processor(processor)
        restore_adapters(states)
        try:
            yield
        finally:
            attention.set_processor(before[0])
            restore_adapters(before[1])

    return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


# Adapter


def add_adapter(backbone: Backbone, lora: Lora, seed: int) -> list[Tensor]:
    """Put the LoRA `scale-dit` on a FLUX backbone: its parameters, float32. Everything else is frozen.

    A is Gaussian, B zero, drawn from `seed`; or both come from the file `lora.init`.
    """
    for part in backbone.pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    model = backbone.model
    if lora.init is not None:
        load_lora(backbone.pipe, Path(lora.init).expanduser(), ADAPTER)
    else:
        _check_targets(model, lora.targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(
                r=lora.rank, lora_alpha=cast(int, lora.alpha), init_lora_weights="gaussian", target_modules=lora.targets
            )
            model.add_adapter(config, ADAPTER)
    parameters: list[Tensor] = [p for name, p in model.named_parameters() if f".{ADAPTER}." in name]
    for p in parameters:
        p.data = p.data.float()
        p.requires_grad_(True)
    return parameters


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = {name.split(".", 2)[-1].removeprefix("attn.") for name in names}
            raise unknown("LoRA target", target, ends)


# Data


class Draws(NamedTuple):
    """What chance decides about n samples, each from its own generator.

    drop: bool (n,), the caption is left out. place: int (n,), in the pool. t: (n,). noise and posterior (of the
    VAE): (n, C, h, w). low_posterior: (n, C, h', w').
    """

    drop: Tensor
    place: Tensor
    t: Tensor
    noise: Tensor
    posterior: Tensor
    low_posterior: Tensor


def times(normal: Tensor, timestep: Timestep) -> Tensor:
    """Logit-normal t of standard normals, shifted."""
    t = torch.sigmoid(timestep.mean + timestep.std * normal)
    return timestep.shift * t / (1 + (timestep.shift - 1) * t)


class Passes(Dataset):
    """Pass number i: the pictures of samples i·batch … (none where a pool holds them), and their draws."""

    def __init__(self, recipe: Recipe, source: Source | None, shape: Sequence[int], low: Size, stream: int) -> None:
        self.recipe, self.source, self.stream = recipe, source, stream
        self.shape, self.low_shape = tuple(shape), (shape[0], *low)

    def __getitem__(self, index: int) -> tuple[Pictures | None, Draws]:
        numbers = range(index * self.recipe.batch, (index + 1) * self.recipe.batch)
        rows = zip(*(self._draws(number) for number in numbers))
        pictures = None if self.source is None else self.source.pictures(numbers)
        return pictures, Draws(*(torch.stack(row) for row in rows))

    def _draws(self, number: int) -> Draws:
        generator = torch.Generator().manual_seed(seed_of(self.recipe.seed, self.stream, number))
        return Draws(
            torch.rand((), generator=generator) < self.recipe.caption_drop,
            torch.randint(self.recipe.data.pool or 1, (), generator=generator),
            times(torch.randn((), generator=generator), self.recipe.timestep),
            *(torch.randn(shape, generator=generator) for shape in (self.shape, self.shape, self.low_shape)),
        )


class Encoded(NamedTuple):
    """Posterior of latents and of low-resolution latents, text embeddings and pooled; every tensor has n rows."""

    mean: Tensor
    std: Tensor
    low_mean: Tensor
    low_std: Tensor
    prompt_embeds: Tensor
    pooled: Tensor


class Encoder:
    """Pictures to what a pass needs of them, by the frozen parts of a pipeline."""

    def __init__(self, backbone: Backbone, recipe: Recipe, sampling: Resolved, low: Size, device: torch.device) -> None:
        self.backbone, self.sampling, self.size, self.device = backbone, sampling, recipe.size, device
        self.low_size = low[0] * backbone.scale, low[1] * backbone.scale
        self.empty = backbone.encode_prompt([""], sampling)

    @torch.no_grad()
    def encode(self, pictures: Pictures) -> Encoded:
        pixels = pictures.render(self.size, self.device)
        text = self.backbone.encode_prompt(pictures.captions, self.sampling)
        low = resize(pixels, self.low_size, "bicubic")
        return Encoded(
            *self._posterior(pixels), *self._posterior(low), text["prompt_embeds"], text["pooled_prompt_embeds"]
        )

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.backbone.pipe.vae
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        mean, scale = self.backbone.latent_statistics()
        return (posterior.mean.float() - mean) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def pool(self, source: Source, count: int, batch: int, workers: int) -> Encoded:
        """`count` samples, encoded once; latents are kept in half precision."""
        parts = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
        loader = DataLoader(_Numbered(source), batch_size=None, sampler=parts, num_workers=workers)  # type: ignore[arg-type]
        chunks = []
        for pictures in loader:
            found = self.encode(pictures)
            halves = {name: getattr(found, name).half() for name in ("mean", "std", "low_mean", "low_std")}
            chunks.append(found._replace(**halves))
        return Encoded(*(torch.cat(tensors) for tensors in zip(*chunks)))

    @torch.no_grad()
    def batch(self, pictures: Pictures | None, draws: Draws, pool: Encoded | None) -> Batch:
        """A pass, from its pictures or from the pool."""
        draws = Draws(*(x.to(self.device) for x in draws))
        if pictures is not None:
            found = self.encode(pictures)
        else:
            assert pool is not None
            found = Encoded(*(x[draws.place] for x in pool))
        return Batch(
            found.mean.float() + found.std.float() * draws.posterior,
            found.low_mean.float() + found.low_std.float() * draws.low_posterior,
            draws.noise,
            draws.t,
            torch.where(draws.drop[:, None, None], self.empty["prompt_embeds"], found.prompt_embeds),
            torch.where(draws.drop[:, None], self.empty["pooled_prompt_embeds"], found.pooled),
        )


class _Numbered(Dataset):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, numbers: Sequence[int]) -> Pictures:
        return self.source.pictures(numbers)


def _sizes(backbone: Backbone, size: int, ratio: float) -> tuple[Size, Size]:
    """Latent size of the crops and of their low-resolution version; HiresError unless both have whole tokens."""
    step = 2 * backbone.scale
    low = size / ratio
    if size % step or low % step:
        raise HiresError(
            f"size {size} and lr_ratio {ratio:g} give low-resolution images of {low:g}: both sides must be multiples "
            f"of {step} pixels"
        )
    return (size // backbone.scale,) * 2, (int(low) // backbone.scale,) * 2


# Training


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
        size, low = _sizes(backbone, recipe.size, self.sampling.lr_ratio)
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
            self.backbone, prompts, ADAPTER, height=side, width=side, seed=seeds,
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
            save_lora(self.backbone.pipe, self.out, ADAPTER)
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
        if place in MAY_CHANGE or place == "data.workers":
            continue
        if isinstance(value, dict) and isinstance(was.get(key), dict):
            yield from _differences(was[key], value, f"{place}.")
        elif was.get(key) != value:
            yield place, was.get(key), value


def _pixels(image: Any) -> Tensor:
    import numpy as np

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
