"""From a prompt, or an image, to a large image: base stage, then (upsample → noise to τ → guided denoising) × stages.

ScaleDiff's cascade (arXiv 2510.25818) with every part a choice of the variant; the baselines and ablations of the
paper are other choices in the same table (`hires.variants`).
"""

import contextlib
import functools
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from hires.additions.adapters import SCALE_DIT, adapter_switched
from hires.additions.extras import NO_EXTRAS, Control, Extras
from hires.attention import Guidance, attention_layers, draw_shifts, use_attention
from hires.attention.bands import divided
from hires.attention.layers import scaled
from hires.backbones.base import Backbone, Conditioning
from hires.backbones.schedule import Schedule
from hires.errors import HiresError
from hires.execution.fp8 import fp8_linears
from hires.execution.graphs import cuda_graphs
from hires.execution.step_cache import step_cache
from hires.methods import GUIDES, Guide, Guided, sharpen
from hires.methods.frequency import low_pass, resize
from hires.methods.lfm import latent_frequency_mixing
from hires.methods.multidiffusion import multidiffusion
from hires.settings import Resolved, Sampling
from hires.sizes import Size, check_multiple, stage_sizes
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
        seconds: wall time of the stage for the whole batch, from upsampling to clean latents.
        peak_bytes: most memory held during the stage, the model included: by torch on the GPU; on a CPU the resident
            memory of the whole process, libraries too (outside Linux since its start).
    """

    name: str
    height: int
    width: int
    latents: Tensor | None
    pixels: Tensor | None
    steps: int
    seconds: float
    peak_bytes: int


class Meter:
    """Seconds and peak memory of a block (see `Stage` for their meaning)."""

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
        return self.variant.adapter or SCALE_DIT

    def encode(self, pixels: Tensor) -> Tensor:
        """Clean latents (n, C, h, w) of images (n, 3, H, W) in [−1, 1]."""
        return self.backbone.encode(pixels, self.generators, self.sampling.posterior, self.sampling.vae_tiling)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [−1, 1] of clean latents (n, C, h, w)."""
        return self.backbone.decode(latents, self.sampling.vae_tiling)

    def enlarge(self, pixels: Tensor, size: Size) -> Tensor:
        """Images (n, 3, *size), sharpened where the variant says so."""
        return sharpen(resize(pixels, size, self.sampling.upsampling), self.variant.sharpening)


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


def _predictor(run: Run, start: _Start) -> Callable[[Tensor, int], Tensor]:
    """(latents, step) -> model output: one call on the whole canvas, or the mean over MultiDiffusion's views."""
    backbone, sampling, view = run.backbone, run.sampling, run.base_size
    canvas = (start.latents.shape[2], start.latents.shape[3])
    told = view if sampling.time_ids == "base" else canvas
    told_size = (told[0] * backbone.scale, told[1] * backbone.scale)

    def on_canvas(latents: Tensor, step: int) -> Tensor:
        return backbone.predict(latents, start.schedule, step, run.conditioning, sampling, told_size, start.control)

    def on_views(latents: Tensor, step: int) -> Tensor:
        def predict(crops: Tensor, images: Tensor, places: list[tuple[int, int, int]]) -> Tensor:
            rows = {name: value[images] for name, value in run.conditioning.items()}
            seen = None if start.control is None else start.control.views(places, view, canvas)
            return backbone.predict(crops, start.schedule, step, rows, sampling, told_size, seen)

        return multidiffusion(predict, latents, view, sampling.view_overlap, sampling.view_batch)

    return on_canvas if run.variant.views == "none" else on_views


def attention_options(variant: Variant, sampling: Sampling) -> dict[str, Any]:
    """What `use_attention` is told for the variant's attention, but for random shifts and Scale-DiT's guidance."""
    if variant.attention == "npa":
        return {
            "text_rows": sampling.text_rows,
            "backend": sampling.attention_backend,
            "window_scale": sampling.window_scale,
            "window_overlap": sampling.window_overlap,
        }
    if variant.attention == "scale_dit":
        return {**sampling.local_attention(), "guidance_neighbours": sampling.lr_neighbours}
    return {}


def _check_stages(
    backbone: Backbone, variant: Variant, sampling: Resolved, sizes: Sequence[Size], base_size: Size
) -> None:
    """Refuse an attention or a filter that doesn't fit one of the stages, before any work; sizes in latent pixels."""
    options = attention_options(variant, sampling)
    if variant.sharpening and sampling.reference == "latent" and not variant.lfm:
        raise HiresError("reference = 'latent' enlarges no image that could be sharpened: leave one of the two out")
    for size in sizes:
        for model in (backbone.model, *backbone.controlnets):
            with use_attention(model, variant.attention, size, base_size, **options):
                if model is backbone.model:
                    with divided(model, variant, sampling, size, base_size, bool(backbone.controlnets)):
                        pass
        for used, factor in ((variant.lfm, sampling.lfm_factor), (variant.sg, sampling.sg_factor)):
            if used:
                low_pass(torch.zeros(1, 1, *size), sampling.low_pass, factor)
        if variant.attention == "scale_dit" and sampling.lr_keys:
            _low_size(size, sampling)


def _denoise(run: Run, name: str, start: _Start) -> Tensor:
    """Run the steps of the stage `name`: clean latents."""
    backbone, variant, sampling, base_size = run.backbone, run.variant, run.sampling, run.base_size
    latents, schedule = start.latents, start.schedule
    size = (latents.shape[2], latents.shape[3])
    first, steps = schedule.first, schedule.num_inference_steps - schedule.first
    predict = _predictor(run, start)
    options = attention_options(variant, sampling)
    if start.low is not None:
        options["guidance"] = start.low
    # A view has the base's size, so the model's own attention is right for it.
    canvas = size if variant.views == "none" else base_size
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(backbone.full_precision())
        contexts.enter_context(adapter_switched(backbone.model, run.adapter, on=False))
        handles = []
        for model in (backbone.model, *(backbone.controlnets if start.control else ())):
            if variant.attention == "npa" and sampling.random_shift:  # a table of steps and layers, before the loop
                layers = scaled(attention_layers(model, size, base_size), sampling.window_scale)
                options["shifts"] = draw_shifts(run.generators, steps, layers, sampling.window_overlap)
            handles.append(
                contexts.enter_context(use_attention(model, variant.attention, canvas, base_size, **options))
            )
        if sampling.linears == "fp8":
            contexts.enter_context(fp8_linears(backbone.model))
        contexts.enter_context(step_cache(backbone.model, sampling.step_cache, steps))
        contexts.enter_context(divided(backbone.model, variant, sampling, canvas, base_size, start.control is not None))
        if "shifts" not in options:  # which are others at every step
            images = len(latents) if variant.views == "none" else sampling.view_batch
            pixels = images * canvas[0] * canvas[1] * backbone.scale**2
            contexts.enter_context(cuda_graphs(backbone.model, backbone.device, pixels))
        for step in range(first, schedule.num_inference_steps):
            for handle in handles:
                handle.step = step - first
            output = predict(latents, step)
            for guide in start.guides:
                output = guide(output, latents, step)
            latents = schedule.step(output, latents, step, run.generators)
            if run.callback is not None:
                run.callback(name, step - first + 1, steps, latents)
    return latents


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


def _low_size(size: Size, sampling: Sampling) -> Size:
    """Latent size of the image that guides a Scale-DiT stage of `size`; HiresError unless it has whole tokens."""
    low = size[0] / sampling.lr_ratio, size[1] / sampling.lr_ratio
    if any(side < 2 or side % 2 for side in low):
        raise HiresError(
            f"lr_ratio = {sampling.lr_ratio:g}: a stage of {size[0]}x{size[1]} latent pixels would be guided by "
            f"{low[0]:g}x{low[1]:g}: sides must be even; choose another size or ratio"
        )
    return int(low[0]), int(low[1])


def _low_resolution(run: Run, latents: Tensor, picture: Callable[[], Tensor], size: Size) -> Guidance | None:
    """One pass over the image that guides a Scale-DiT stage of `size` (pixels), with the adapter on.

    That image is the stage's input, resized where its side isn't that of the stage over lr_ratio.
    """
    backbone, sampling = run.backbone, run.sampling
    if run.variant.attention != "scale_dit" or not sampling.lr_keys:
        return None
    latent_size = backbone.latent_size(*size)
    low = _low_size(latent_size, sampling)
    if tuple(latents.shape[2:]) != low:
        latents = run.encode(resize(picture(), (low[0] * backbone.scale, low[1] * backbone.scale), sampling.upsampling))
    with adapter_switched(backbone.model, run.adapter, on=sampling.lr_adapter):
        return backbone.low_resolution_guidance(latents, latent_size, run.conditioning, sampling)


def _check(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    variant: Variant,
    sampling: Resolved,
    extras: Extras,
) -> None:
    backbone.check_extras(extras)
    if variant.attention == "scale_dit" and extras.control_images:
        raise HiresError(
            "a ControlNet has no keys of the low-resolution image that scale_dit needs: choose another variant"
        )
    if variant.attention == "scale_dit" and sampling.true_guidance > 1:
        raise HiresError("true_cfg_scale: the low-resolution pass of scale_dit sees one prompt: leave it out")
    if len(prompts) != len(seeds):
        raise HiresError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed per prompt")
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise HiresError(f"seed {seed}: allowed: 0 to 2^63 − 1")
    of_base = ("lfm", "sharpening", *GUIDES)
    if variant.start == "noise" and any(getattr(variant, name) for name in of_base):
        raise HiresError(f"a variant that starts from noise has no base image: {', '.join(of_base)} must be off")
    if variant.views != "none" and variant.attention != "dense":
        raise HiresError(f"views of the base size leave {variant.attention!r} attention nothing to do: allowed: dense")
    if variant.views != "none" and sampling.step_cache is not None:
        raise HiresError("step_cache: the views of a step would be taken for steps: leave it out")
    if variant.attention == "scale_dit" and variant.start == "noise":
        raise HiresError("scale_dit is guided by a base image: start from the base")
    if variant.adapter and variant.attention != "scale_dit":
        raise HiresError(
            f"adapter {variant.adapter!r}: only attention 'scale_dit' uses one; a LoRA of yours that is loaded on the "
            "pipeline stays on without being named"
        )


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
        HiresError: a size that the rule refuses, τ that leaves no step, a variant that contradicts itself, base latents
            or an image for one that starts from noise.
    """
    prompts = list(prompts)
    backbone.check_settings(sampling)
    sampling = sampling.over(backbone.defaults)
    _check(backbone, prompts, seeds, variant, sampling, extras)
    above, first = sampling.above_base(), sampling.above_base(strength)
    if variant.start == "noise":
        if base is not None or image is not None or strength is not None:
            raise HiresError(
                "a variant that starts from noise takes no image, no strength and no base latents: leave them out, or "
                "choose one that starts from the base"
            )
        check_multiple(height, width, backbone.size_multiple)
        name, opening, sizes = "noise", variant, [(height, width)]
        base_size = backbone.latent_size(backbone.base_resolution, backbone.base_resolution)
        denoised = sizes
    else:
        name, opening = "base", Variant(adapter=variant.adapter)
        sizes = stage_sizes(height, width, backbone.base_resolution, backbone.size_multiple, variant.stages)
        base_size = backbone.latent_size(*sizes[0])
        denoised = sizes[1:] if variant.denoise else []
        _check_given(backbone, base, image, strength, len(prompts), sizes[0])
        for settings in (first, above) if denoised else ():
            settings.stage_steps()
    if denoised:  # refuse what a later stage would, before any work
        _check_stages(backbone, variant, sampling, [backbone.latent_size(*size) for size in denoised], base_size)
    if variant.adapter:
        backbone.require_adapter(variant.adapter)

    generators = [Generator() for _ in seeds]
    seed_stage(generators, seeds, 0)
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

    run = replace(run, variant=variant, sampling=first)
    for index, size in enumerate(sizes[1:], 1):
        if not variant.denoise:
            with Meter(backbone.device) as cost:
                pixels = run.enlarge(run.decode(latents) if image is None else image, size)
            yield Stage("upsample", *size, None, pixels, 0, cost.seconds, cost.peak_bytes)
            return
        name, steps = f"stage-{index}", run.sampling.stage_steps()
        with Meter(backbone.device) as cost:
            seed_stage(generators, seeds, index)
            # No name for the start: it would keep gigabytes of keys, at 4096² and above.
            latents = _denoise(run, name, _from_latents(run, latents, image, size))
        yield Stage(name, *size, latents, None, steps, cost.seconds, cost.peak_bytes)
        image, run = None, replace(run, sampling=above)


def _check_given(
    backbone: Backbone, base: Tensor | None, image: Tensor | None, strength: float | None, n: int, size: Size
) -> None:
    if base is not None and image is not None:
        raise HiresError("give base latents or an image, not both")
    if strength is not None and not 0 < strength <= 1:
        raise HiresError(f"strength {strength:g}: allowed: above 0, up to 1")
    if strength is not None and image is None:
        raise HiresError("strength says how much of your image is redrawn: give an image as well")
    for what, given, shape in (
        ("base latents", base, (n, backbone.latent_channels, *backbone.latent_size(*size))),
        ("image", image, (n, 3, *size)),
    ):
        if given is not None and tuple(given.shape) != shape:
            raise HiresError(f"{what} of shape {tuple(given.shape)}: this target needs {shape}")


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


def preview(backbone: Backbone, stage: Stage | Tensor) -> list[Image.Image]:
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
