"""What a configuration will make and about how long it takes: counted from the configuration, no model is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

from hires import layout
from hires.config import BackboneEntry, Config, ImageSet
from hires.files import ASSETS
from hires.files.untrusted import read_hints
from hires.methods.diffusehigh import guided_steps
from hires.methods.multidiffusion import views
from hires.settings import Sampling
from hires.sizes import Size, stage_sizes
from hires.stages.arithmetic import ARCHITECTURES, step_flop
from hires.variants import Variant

# Seconds on one CPU core, float32, one image: area in pixels -> seconds. A step of tiny-sdxl is two model calls (CFG);
# a view is one of eight in a batch. Measured with one thread, best of four, rounded up by a third for two jobs at once.
STEP = {
    "tiny-flux": {128**2: 0.017, 256**2: 0.045, 512**2: 0.23},
    "tiny-sdxl": {128**2: 0.022, 256**2: 0.062, 512**2: 0.25},
}
VIEW = {"tiny-flux": 0.012, "tiny-sdxl": 0.014}
DECODE = {128**2: 0.034, 256**2: 0.13, 512**2: 0.68}
ENCODE = {128**2: 0.015, 256**2: 0.055, 512**2: 0.33}
START = 5.5  # seconds until a job has imported torch and diffusers and loaded its model
SUSTAINED = 200  # TFLOP/s: dense FLUX.1-dev at 4096² is 3.9 PFLOP a step, in 17.89 s on the GPU of Scale-DiT's table

# Steps and τ of the papers, and of FLUX.2's own, for models that are not in the repository
PAPERS = {
    "flux-dev": Sampling(num_inference_steps=30, tau=600),
    "sdxl": Sampling(num_inference_steps=50, tau=400),
    "flux2-klein": Sampling(num_inference_steps=4, tau=500),
    "flux2-klein-base": Sampling(num_inference_steps=50, tau=400),
}


@dataclass(frozen=True)
class Row:
    """One image set, or one set of base latents (variant "base")."""

    study: str
    setting: str
    backbone: str
    variant: str
    size: str
    images: int
    stages: str  # side lengths on the way, each with its steps: "256x256: 5, 512x512: 5"
    seconds: float | None  # of one CPU core; None where no measured cost is known
    flop: float | None  # of denoising; None where the architecture isn't known


def plan(config: Config) -> list[Row]:
    """A row for every set of base latents and every image set, in the order of their making."""
    rows = []
    for base in layout.base_sets(config):
        entry = config.backbones[base.backbone]
        sampling = _sampling(config, base.study, base.setting, base.backbone)
        steps, images = sampling.num_inference_steps, base.n * len(base.seeds)
        size = f"{base.height}x{base.width}"
        seconds = flop = None
        if steps and entry.model in STEP:
            seconds = images * steps * _cost(STEP[entry.model], base.height * base.width)
        if steps and entry.model in ARCHITECTURES:
            sides = base.height, base.width
            flop = images * steps * step_flop(ARCHITECTURES[entry.model], sides, sides, Variant(), sampling)
        rows.append(Row("", "", base.backbone, "base", size, images, f"{size}: {steps or '?'}", seconds, flop))
    return rows + [_image_row(config, images) for images in config.image_sets()]


def _image_row(config: Config, images: ImageSet) -> Row:
    entry, variant = config.backbones[images.backbone], config.variants()[images.variant]
    sampling = _sampling(config, images.study, images.setting, images.backbone)
    target = images.height, images.width
    if variant.start == "base":
        base, *stages = stage_sizes(*target, entry.base_resolution, entry.size_multiple, variant.stages)
        steps = sampling.stage_steps() if variant.denoise else 0
    else:
        base, stages, steps = None, [target], sampling.num_inference_steps
    view = base or (entry.base_resolution, entry.base_resolution)
    count = images.n * len(images.seeds)
    seconds = flop = None
    if steps is not None and entry.model in STEP:
        seconds = count * _seconds(entry.model, variant, sampling, steps, base, stages, view)
    if steps is not None and entry.model in ARCHITECTURES:
        stage = (step_flop(ARCHITECTURES[entry.model], size, view, variant, sampling) for size in stages)
        flop = count * (steps * sum(stage))
    way = ", ".join(f"{h}x{w}: {'?' if steps is None else steps}" for h, w in stages)
    return Row(
        images.study, images.setting, images.backbone, images.variant, images.size, count, way, seconds, flop
    )  # fmt: skip


def _seconds(
    model: str, variant: Variant, sampling: Sampling, steps: int, base: Size | None, stages: list[Size], view: Size
) -> float:
    """Of one image above its base: each stage's decoding, encoding and steps and the last decoding; sizes in pixels."""
    if not variant.denoise:
        return _cost(DECODE, math.prod(base or stages[-1]))
    seconds, before = 0.0, base
    for size in stages:
        area = math.prod(size)
        step = _cost(STEP[model], area)
        if variant.views != "none":
            latent = [(height // 8, width // 8) for height, width in (size, view)]
            step = len(views(latent[0], latent[1], sampling.view_overlap)) * VIEW[model]
        guided = guided_steps(sampling, steps) if variant.dwt else 0
        seconds += steps * step + guided * (_cost(DECODE, area) + _cost(ENCODE, area))
        if before:
            seconds += _cost(DECODE, math.prod(before)) + _cost(ENCODE, area)
        before = size
    return seconds + _cost(DECODE, math.prod(before or view))


def _sampling(config: Config, study: str, setting: str, backbone: str) -> Sampling:
    return config.sampling(study, setting, backbone).over(_own(config.backbones[backbone]))


def _own(entry: BackboneEntry) -> Sampling:
    """What the model itself says: its folder's hires.json, its builder, or the papers."""
    for folder in (ASSETS / entry.model, Path(entry.model).expanduser()):
        if (folder / "hires.json").is_file():
            return Sampling.of(**read_hints(folder).get("sampling", {}))
    if entry.model in STEP:
        from hires.models import HINTS

        return Sampling.of(**HINTS[entry.model]["sampling"])
    return PAPERS.get(entry.model, Sampling())


def _cost(table: dict[int, float], area: int) -> float:
    """Between two measured areas along a power law; beyond them in proportion to the area."""
    areas = sorted(table)
    inside = min(max(area, areas[0]), areas[-1])
    high = next(a for a in areas if a >= inside)
    low = max((a for a in areas if a < high), default=high)
    share = math.log(inside / low) / math.log(high / low) if high > low else 0.0
    return table[low] ** (1 - share) * table[high] ** share * area / inside


def describe(config: Config) -> str:
    """The plan as text: a table, the steps that τ keeps, totals."""
    rows = plan(config)
    header = ["study", "setting", "backbone", "variant", "size", "images", "steps of each stage"]
    cells = [[r.study, r.setting, r.backbone, r.variant, r.size, str(r.images), r.stages] for r in rows]
    for name, values in (
        ("seconds", [r.seconds for r in rows]),
        ("PFLOP", [None if r.flop is None else r.flop / 1e15 for r in rows]),
    ):
        if any(value is not None for value in values):
            header.append(name)
            cells = [[*cell, _number(value)] for cell, value in zip(cells, values)]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    right = (5, 7, 8)
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in (header, ["-" * w for w in widths], *cells)
    ]
    lines += ["", *_taus(config), "", _total(config, rows)]
    return "\n".join(lines)


def _taus(config: Config) -> list[str]:
    """How much of the schedule a stage keeps: whole steps only, so a short schedule rounds τ."""
    lines = {}
    for images in config.image_sets():
        variant = config.variants()[images.variant]
        sampling = _sampling(config, images.study, images.setting, images.backbone)
        if not (variant.start == "base" and variant.denoise):
            continue
        if (steps := sampling.num_inference_steps) and (kept := sampling.stage_steps()):
            key = f"{images.study}, {images.setting}, {images.backbone}"
            lines[key] = f"{key}: {steps} steps, τ {sampling.tau:g} → {kept} of {steps} ({kept / steps:.3f})"
    return list(lines.values())


def jobs(config: Config) -> int:
    """Processes that take time to start: shards of base latents and of images, features and scores.

    One job makes all variants and settings of a study at one size with one backbone.
    """
    groups = {(s.study, s.backbone, s.size): s.n for s in config.image_sets()}
    shards = [*groups.values(), *(base.n for base in layout.base_sets(config))]
    return sum(len(layout.shards(config, n)) for n in shards) + 2 * len(groups) + len(layout.references(config))


def _total(config: Config, rows: list[Row]) -> str:
    text = f"{sum(row.images for row in rows if row.variant != 'base')} images in {jobs(config)} jobs"
    if any(row.seconds is None and row.flop is None for row in rows):
        return f"{text}; no estimate where the cost of a model is not known"
    estimates = []
    if flop := sum(row.flop or 0 for row in rows):
        days = flop / SUSTAINED / 1e12 / 86400
        estimates.append(
            f"about {_number(flop / 1e15)} PFLOP of denoising, {_number(days)} GPU-days at {SUSTAINED} TFLOP/s; "
            "VAE and metrics come on top"
        )
    if any(row.seconds is not None for row in rows):
        start = jobs(config) * START
        total = start + sum(row.seconds or 0 for row in rows)
        estimates.append(
            f"about {_number(total)} s of one CPU core, {_number(start)} s of it to start the jobs, "
            f"so {max(1, total / 120):.0f} min for two jobs at a time; metrics, notebooks and report come on top"
        )
    return f"{text}: {'; '.join(estimates)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
