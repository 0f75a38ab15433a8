"""ScaleDiff's cascade (arXiv 2510.25818): base stage, then (upsample → noise to τ → guided denoising) × stages.

    latents = _denoise(_from_noise(base size))      the model as it is, over the whole schedule
    for each size above:
        Z_ref = _reference(latents)                 Latent Frequency Mixing, `hires.methods.lfm`
        noisy = Z_ref noised to τ                   `_from_latents`
        latents = _denoise(noisy)                   Neighborhood Patch Attention, `hires.attention.npa`,
                                                    and Structure Guidance at every step, `hires.methods.sg`

Each part is a choice of the variant (`hires.variants`): other choices make the paper's ablations and baselines, and
Scale-DiT. What can't be made is refused before any work (`hires.checks`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from hires.additions.adapters import SCALE_DIT_ADAPTER, adapter_switched
from hires.additions.extras import NO_EXTRAS, Control, Extras
from hires.attention import AttentionHandle, Guidance, attention_layers, draw_shifts, use_attention
from hires.attention.bands import divided
from hires.attention.layers import scaled
from hires.backbones.base import Backbone, Conditioning
from hires.backbones.schedule import Schedule
from hires.checks import check_request, check_stages, check_start
from hires.errors import HiresError
from hires.execution.fp8 import fp8_linears
from hires.execution.graphs import cuda_graphs
from hires.execution.meter import Meter
from hires.execution.step_cache import step_cache
from hires.methods import GUIDES, Guide, Guided, sharpen
from hires.methods.frequency import resize
from hires.methods.lfm import latent_frequency_mixing
from hires.methods.multidiffusion import multidiffusion
from hires.settings import Resolved, Sampling
from hires.sizes import Size, check_multiple, low_resolution_size, stage_sizes
from hires.variants import Variant

Callback = Callable[[str, int, int, Tensor], None]  # (stage name, steps done, steps of the stage, noisy latents)


@dataclass
class Stage:
    """What one stage of a batch of n images gave, and its cost.

    Attributes:
        name: "base" (also the user's own image), "stage-1", "stage-2", …, "noise" (from noise at the target size) or
            "upsample" (the control).
        height, width: of the images, in pixels.
        latents: clean, float32 (n, C, h, w); None where the stage has no latents, as the control "upsample".
        pixels: images (n, 3, height, width) in [−1, 1] where the stage made them itself, else None.
        steps: denoising steps that were run here: 0 for latents or an image that were given.
        seconds, peak_bytes: of the whole batch, from upsampling to clean latents (`hires.execution.meter`).
    """

    name: str
    height: int
    width: int
    latents: Tensor | None
    pixels: Tensor | None
    steps: int
    seconds: float
    peak_bytes: int


def seed_stage(generators: Sequence[Generator], seeds: Sequence[int], stage: int) -> None:
    """Seed each image's generator for a stage: with the image's own seed at the base, as diffusers does, and with a
    hash of (seed, stage) later on. So a stage draws the same numbers however its base came to be."""
    for generator, seed in zip(generators, seeds, strict=True):
        mixed = np.random.SeedSequence([seed, stage]).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(mixed) & (2**63 - 1) if stage else seed)


@dataclass(frozen=True)
class Run:
    """What a batch of n images is made with: the same at every stage, but for variant and sampling.

    Attributes:
        variant, sampling: the base is run with a plain variant, and has a guidance scale of its own.
        base_size: in latent pixels: the window of attention, MultiDiffusion's view, and what FLUX's shift follows.
        generators: one per image, on the CPU, for every random number.
        conditioning, extras: what the model is told of the n images, and what its ControlNets are shown.
    """

    backbone: Backbone
    variant: Variant
    sampling: Resolved
    base_size: Size
    generators: Sequence[Generator]
    conditioning: Conditioning
    extras: Extras = NO_EXTRAS
    callback: Callback | None = None

    @property
    def adapter(self) -> str:
        """The LoRA that is on for Scale-DiT's low-resolution image and off for everything else."""
        return self.variant.adapter or SCALE_DIT_ADAPTER

    def encode(self, pixels: Tensor) -> Tensor:
        """Clean latents (n, C, h, w) of images (n, 3, H, W) in [−1, 1]."""
        return self.backbone.encode(pixels, self.generators, self.sampling.posterior, self.sampling.vae_tiling)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [−1, 1] of clean latents (n, C, h, w)."""
        return self.backbone.decode(latents, self.sampling.vae_tiling)

    def enlarge(self, pixels: Tensor, size: Size) -> Tensor:
        """Images (n, 3, *size), sharpened where the variant says so."""
        return sharpen(resize(pixels, size, self.sampling.upsampling), self.variant.sharpening)


@torch.no_grad()
def cascade(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    variant: Variant,
    height: int,
    width: int,
    sampling: Sampling,
    base: Tensor | None = None,
    callback: Callback | None = None,
    image: Tensor | None = None,
    strength: float | None = None,
    extras: Extras = NO_EXTRAS,
) -> Iterator[Stage]:
    """Make n images together and yield every stage as it is done, the base first, the target size last.

    An image depends on the model, its prompt and seed, variant, size and sampling: never on the batch it is in.

    Args:
        prompts, seeds: n each. Every random number of an image comes from one CPU generator seeded by its seed.
        height, width: the target, in pixels (see `hires.sizes`).
        sampling: settings on top of `backbone.defaults`.
        base: clean base latents (n, C, h, w) from `base_latents`; None makes them.
        callback: called after every step with (stage name, steps done, steps of the stage, noisy latents).
        image: (n, 3, h, w) in [−1, 1] at the base size: takes the base image's place (img2img).
        strength: in (0, 1]: takes the place of τ/1000 in the first stage above the base.
        extras: images for the pipeline's ControlNets and IP-Adapters; they act at every stage.

    Raises:
        HiresError: what `hires.checks` refuses, or a size without a base.
    """
    prompts = list(prompts)
    backbone.check_settings(sampling)
    sampling = sampling.over(backbone.defaults)
    check_request(backbone, prompts, seeds, variant, sampling, extras)
    sizes, base_size = _sizes(backbone, variant, height, width)
    check_start(backbone, variant, len(prompts), sizes[0], base, image, strength)
    windowed = sizes if variant.start == "noise" else sizes[1:] if variant.denoise else []
    if windowed:
        check_stages(
            backbone, variant, sampling, [backbone.latent_size(*size) for size in windowed], base_size, strength
        )
    if variant.adapter:
        backbone.require_adapter(variant.adapter)

    generators = [Generator() for _ in seeds]
    seed_stage(generators, seeds, 0)
    name, opening = ("base", Variant(adapter=variant.adapter)) if variant.start == "base" else ("noise", variant)
    steps = 0
    with Meter(backbone.device) as cost:
        conditioning = backbone.conditioning(prompts, sampling, extras)
        run = Run(backbone, opening, sampling, base_size, generators, conditioning, extras, callback)
        if image is not None:
            image = image.to(backbone.device)
            latents = run.encode(image)
        elif base is not None:
            latents = base.to(backbone.device, torch.float32)
        else:
            steps = sampling.num_inference_steps
            latents = _denoise(run, name, _from_noise(run, sizes[0]))
    yield Stage(name, *sizes[0], latents, image, steps, cost.seconds, cost.peak_bytes)

    run = replace(run, variant=variant, sampling=sampling.above_base(strength))
    if not variant.denoise and len(sizes) > 1:
        with Meter(backbone.device) as cost:
            pixels = run.enlarge(run.decode(latents) if image is None else image, sizes[-1])
        yield Stage("upsample", *sizes[-1], None, pixels, 0, cost.seconds, cost.peak_bytes)
        return
    for index, size in enumerate(sizes[1:], 1):
        name, steps = f"stage-{index}", run.sampling.stage_steps()
        with Meter(backbone.device) as cost:
            seed_stage(generators, seeds, index)
            # No name for the start: it would keep gigabytes of keys, at 4096² and above.
            latents = _denoise(run, name, _from_latents(run, latents, image, size))
        yield Stage(name, *size, latents, None, steps, cost.seconds, cost.peak_bytes)
        image, run = None, replace(run, sampling=sampling.above_base())


def _sizes(backbone: Backbone, variant: Variant, height: int, width: int) -> tuple[list[Size], Size]:
    """The stages' sizes in pixels, and the base size in latent pixels: that of windows and views."""
    if variant.start == "noise":
        check_multiple(height, width, backbone.size_multiple)
        return [(height, width)], backbone.latent_size(backbone.base_resolution, backbone.base_resolution)
    sizes = stage_sizes(height, width, backbone.base_resolution, backbone.size_multiple, variant.stages)
    return sizes, backbone.latent_size(*sizes[0])


@torch.no_grad()
def base_latents(
    backbone: Backbone, prompts: Sequence[str], seeds: Sequence[int], height: int, width: int, sampling: Sampling
) -> Tensor:
    """Clean base latents (n, C, h, w), float32, of a target of height × width pixels: shared by all variants.

    They are what the untouched diffusers pipeline gives at the base size from the same seeds; of a model that starts
    from zero signal only within 1e-4 (see `Schedule.step`).
    """
    stages = cascade(backbone, prompts, seeds, Variant(), height, width, sampling)
    latents = next(stages).latents
    assert latents is not None
    return latents


@dataclass(frozen=True)
class _Start:
    """What the steps of one stage begin with, and what they see.

    Attributes:
        latents: noisy (n, C, h, w), as the schedule's first step sees them.
        control: what the ControlNets see, or None; they have the variant's attention as well.
        guides: change the model's output, one after the other.
        low: what Scale-DiT's steps see of the low-resolution image, or None.
    """

    latents: Tensor
    schedule: Schedule
    control: Control | None
    guides: Sequence[Guide] = ()
    low: Guidance | None = None


def _from_noise(run: Run, size: Size) -> _Start:
    """Pure noise at `size` (pixels), and the whole schedule."""
    backbone = run.backbone
    schedule = backbone.schedule(run.sampling.at_base(), run.base_size)
    control = backbone.control(run.extras, size, run.generators, run.sampling)
    noise = backbone.noise(run.generators, backbone.latent_size(*size)) * schedule.init_noise_sigma
    return _Start(noise, schedule, control)


def _from_latents(run: Run, latents: Tensor, image: Tensor | None, size: Size) -> _Start:
    """Clean latents enlarged to `size` (pixels) and noised to τ; with guides, and Scale-DiT's guidance.

    All may ask for the picture of these latents: the user's own `image`, else it is decoded, once.
    """

    @functools.cache
    def picture() -> Tensor:
        return run.decode(latents) if image is None else image

    @functools.cache
    def enlarged() -> Tensor:
        return run.enlarge(picture(), size)

    backbone = run.backbone
    schedule = backbone.schedule(run.sampling, run.base_size, backbone.first_step(run.sampling))
    reference = _reference(run, latents, enlarged, size)
    guided = Guided(run, schedule, reference, enlarged)
    guides = [guide(guided) for name, guide in GUIDES.items() if getattr(run.variant, name)]
    low = _low_resolution(run, latents, picture, size)
    control = backbone.control(run.extras, size, run.generators, run.sampling)
    noisy = schedule.add_noise(reference, backbone.noise(run.generators, backbone.latent_size(*size)))
    return _Start(noisy, schedule, control, guides, low)


def _reference(run: Run, latents: Tensor, enlarged: Callable[[], Tensor], size: Size) -> Tensor:
    """Z_ref at `size` (pixels): z_RU + LP(z_LU) − LP(z_RU) with LFM, else z_RU or z_LU alone.

    z_LU: the upsampled latents. z_RU: the encoding of the picture that is `enlarged`.
    """
    sampling = run.sampling
    latent_upsampled = resize(latents, run.backbone.latent_size(*size), sampling.upsampling)
    if not run.variant.lfm and sampling.reference == "latent":
        return latent_upsampled
    rgb_upsampled = run.encode(enlarged())
    if not run.variant.lfm:
        return rgb_upsampled
    return latent_frequency_mixing(latent_upsampled, rgb_upsampled, sampling.low_pass, sampling.lfm_factor)


def _low_resolution(run: Run, latents: Tensor, picture: Callable[[], Tensor], size: Size) -> Guidance | None:
    """One pass over the image that guides a Scale-DiT stage of `size` (pixels), with the adapter on.

    That image is the stage's input, resized where its side isn't that of the stage over lr_ratio.
    """
    backbone, sampling = run.backbone, run.sampling
    if run.variant.attention != "scale_dit" or not sampling.lr_keys:
        return None
    latent_size = backbone.latent_size(*size)
    low = low_resolution_size(latent_size, sampling.lr_ratio)
    if tuple(latents.shape[2:]) != low:
        latents = run.encode(resize(picture(), (low[0] * backbone.scale, low[1] * backbone.scale), sampling.upsampling))
    with adapter_switched(backbone.model, run.adapter, on=sampling.lr_adapter):
        return backbone.low_resolution_guidance(latents, latent_size, run.conditioning, sampling)


def _denoise(run: Run, name: str, start: _Start) -> Tensor:
    """Run the steps of the stage `name`: clean latents (n, C, h, w)."""
    latents, schedule = start.latents, start.schedule
    steps = schedule.num_inference_steps - schedule.first
    predict = _predictor(run, start)
    with _prepared(run, start) as handles:
        for step in range(schedule.first, schedule.num_inference_steps):
            for handle in handles:
                handle.step = step - schedule.first
            output = predict(latents, step)
            for guide in start.guides:
                output = guide(output, latents, step)
            latents = schedule.step(output, latents, step, run.generators)
            if run.callback is not None:
                run.callback(name, step - schedule.first + 1, steps, latents)
    return latents


@contextlib.contextmanager
def _prepared(run: Run, start: _Start) -> Iterator[list[AttentionHandle]]:
    """The model and its ControlNets as the steps of a stage need them: attention, LoRA, 8 bits, several devices.

    Afterwards they are as before. Yields the handles of their attention, which are told each step.
    """
    backbone, variant, sampling, base_size = run.backbone, run.variant, run.sampling, run.base_size
    size = (start.latents.shape[2], start.latents.shape[3])
    # A view has the base's size, so the model's own attention is right for it.
    canvas = size if variant.views == "none" else base_size
    steps = start.schedule.num_inference_steps - start.schedule.first
    options = sampling.attention_options(variant.attention)
    if start.low is not None:
        options["guidance"] = start.low
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(backbone.full_precision())
        contexts.enter_context(adapter_switched(backbone.model, run.adapter, on=False))
        handles = []
        for model in (backbone.model, *(backbone.controlnets if start.control else ())):
            if variant.attention == "npa" and sampling.random_shift:  # a table of steps and layers, before the loop
                layers = scaled(attention_layers(model, size, base_size), sampling.window_scale)
                options["shifts"] = draw_shifts(run.generators, steps, layers, sampling.window_overlap)
            attention = use_attention(model, variant.attention, canvas, base_size, **options)
            handles.append(contexts.enter_context(attention))
        if sampling.linears == "fp8":
            contexts.enter_context(fp8_linears(backbone.model))
        contexts.enter_context(step_cache(backbone.model, sampling.step_cache, steps))
        contexts.enter_context(divided(backbone.model, variant, sampling, canvas, base_size, start.control is not None))
        if "shifts" not in options:  # which are others at every step
            images = len(start.latents) if variant.views == "none" else sampling.view_batch
            pixels = images * canvas[0] * canvas[1] * backbone.scale**2
            contexts.enter_context(cuda_graphs(backbone.model, backbone.device, pixels))
        yield handles


def _predictor(run: Run, start: _Start) -> Callable[[Tensor, int], Tensor]:
    """(latents, step) -> model output: one call on the whole canvas, or the mean over MultiDiffusion's views."""
    backbone, sampling, view = run.backbone, run.sampling, run.base_size
    canvas = (start.latents.shape[2], start.latents.shape[3])
    height, width = view if sampling.time_ids == "base" else canvas
    target_size = height * backbone.scale, width * backbone.scale

    def on_canvas(latents: Tensor, step: int) -> Tensor:
        return backbone.predict(latents, start.schedule, step, run.conditioning, sampling, target_size, start.control)

    def on_views(latents: Tensor, step: int) -> Tensor:
        def predict(crops: Tensor, images: Tensor, places: list[tuple[int, int, int]]) -> Tensor:
            rows = {name: value[images] for name, value in run.conditioning.items()}
            seen = None if start.control is None else start.control.views(places, view, canvas)
            return backbone.predict(crops, start.schedule, step, rows, sampling, target_size, seen)

        return multidiffusion(predict, latents, view, sampling.view_overlap, sampling.view_batch)

    return on_canvas if run.variant.views == "none" else on_views


def decode(backbone: Backbone, stage: Stage | Tensor, tiling: bool | None = None) -> list[Image.Image]:
    """The images of a stage, or of clean latents (n, C, h, w): 8-bit RGB, each value round(255·x)."""
    if isinstance(stage, Stage):
        pixels = stage.pixels
        if pixels is None:
            assert stage.latents is not None
            pixels = backbone.decode(stage.latents, tiling)
    else:
        pixels = backbone.decode(stage, tiling)
    return to_images(pixels)


def small_images(backbone: Backbone, stage: Stage | Tensor) -> list[Image.Image]:
    """Small images of a stage, or of latents (n, C, h, w), for a look: no side longer than half the base resolution.

    The latents are averaged over blocks and decoded, which costs a small share of a step.
    """
    given = stage if isinstance(stage, Tensor) else stage.latents if stage.pixels is None else stage.pixels
    assert given is not None
    scale = 1 if given.shape[1] == 3 else backbone.scale
    side = backbone.base_resolution // 2 // scale
    factor = max(1.0, max(given.shape[2:]) / side)
    size = max(2, round(given.shape[2] / factor)), max(2, round(given.shape[3] / factor))
    reduced = F.interpolate(given, size, mode="area")
    return to_images(reduced) if given.shape[1] == 3 else decode(backbone, reduced, tiling=False)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(n, 3, H, W) in [−1, 1] -> 8-bit RGB images; what lies outside is cut off. HiresError for NaN."""
    if pixels.isnan().any():
        raise HiresError("the model gives NaN: its weights are damaged, or dtype is too narrow for it: use float32")
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def to_pixels(image: Image.Image, size: Size) -> Tensor:
    """An image -> (1, 3, height, width) in [−1, 1], resized by Lanczos where its size differs."""
    rgb = image.convert("RGB")
    if rgb.size != (size[1], size[0]):
        rgb = rgb.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(rgb, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
