"""`hires speed`: measure parts one at a time, each in a file that says what was measured on what."""

import gc
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hires import provenance
from hires.backbones import load
from hires.backbones.base import Backbone
from hires.cascade import cascade, decode
from hires.execution import parallel
from hires.execution.compilation import compile_blocks, fastest_attention
from hires.files.storage import digest, read_json, write_json
from hires.settings import Sampling
from hires.speed import flop, steps
from hires.speed.settings import Model, Part, Speed, cascade_steps
from hires.speed.steps import CONTENDERS, PROMPT, Contender, Row
from hires.speed.timing import failure
from hires.stages import VERSIONS
from hires.stages.arithmetic import ARCHITECTURES, step_flop
from hires.variants import VARIANTS, Variant

RATES = {"flux-dev": 600e12, "sdxl": 400e12}  # FLOP/s of one H200, for what a part takes
LOADING, COMPILING, PIXELS = 5, 15, 0.1e-6  # seconds: a model, a contender's graphs, a pixel through the VAE


def file(folder: Path, part: Part) -> Path:
    return folder / "parts" / f"{part.name}.json"


def settings_key(part: Part, speed: Speed, model: Model) -> str:
    """Digest of what a part depends on."""
    shared = speed.model_dump(include={"repeats", "patience", "compile"})
    return digest([VERSIONS["speed"], part.kind, part.size, shared, model.model_dump(exclude={"sizes"})])


def finished(folder: Path, part: Part, key: str) -> bool:
    """Whether the part's file is there, whole and of the same settings."""
    path = file(folder, part)
    if not path.is_file():
        return False
    found = read_json(path)
    return found["complete"] and found["key"] == key


def budget(part: Part, speed: Speed, model: Model) -> float | None:
    """About how many seconds a part takes on one H200; None for models that were never counted."""
    if part.model not in RATES:
        return None
    rate = RATES[part.model]
    base = model.sizes[0]

    def step(name: str, side: int) -> float:
        contender = CONTENDERS[name]
        sampling = Sampling.of(**contender.settings)
        variant = contender.variant if side > base else Variant()
        total = step_flop(ARCHITECTURES[part.model], (side, side), (base, base), variant, sampling) / rate
        return total if contender.attention else total / 2

    def steps_of(name: str, side: int) -> float:
        each = step(name, side)
        return each * (2 if each > speed.patience else speed.repeats + 1) + COMPILING

    picture = PIXELS * part.size**2
    if part.kind == "text":
        return LOADING
    if part.kind == "steps":
        return LOADING + sum(steps_of(name, part.size) for name in model.contenders_at(part.size)) + 4 * picture
    if part.kind == "options":
        return LOADING + 4 * steps_of("scalediff", part.size) + 10 * picture
    if part.kind == "largest":
        return LOADING + sum(2 * step("scalediff", side) + 2 * PIXELS * side**2 for side in model.largest)
    sides = doublings(base, part.size)
    if part.kind == "gpus":
        both = sum(4.5 * step("scalediff", side) + 6 * PIXELS * side**2 for side in sides)
        return LOADING + 2 * COMPILING * (1 + len(sides)) + both
    image = sum(20 * step("scalediff", side) + 2 * PIXELS * side**2 for side in sides) + 40 * step("base", base)
    return LOADING + COMPILING * (1 + len(sides)) + 1.3 * image


def doublings(base: int, side: int) -> list[int]:
    """Sides of the stages above the base."""
    return [base * 2**k for k in range(1, int(math.log2(side / base)) + 1)]


def measure(part: Part, speed: Speed, model: Model, device: torch.device, folder: Path) -> None:
    """Measure a part and write its file, row by row: a run that is cut leaves what it has, marked as incomplete."""
    start = time.perf_counter()
    found: dict[str, Any] = {
        "part": part.name,
        "model": part.model,
        "kind": part.kind,
        "size": part.size,
        "base": model.sizes[0],
        "dtype": model.dtype,
        "key": settings_key(part, speed, model),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": provenance.machine(),
        "compiled": speed.compile and device.type == "cuda",
        "rows": [],
        "complete": False,
    }
    writes = parallel.first()
    for row in _rows(part, speed, model, device):
        found["rows"].append(row)
        found["total_seconds"] = time.perf_counter() - start
        if writes:
            write_json(file(folder, part), found)
            print(f"{found['total_seconds']:7.0f} s  {part.name}: {line(row)}", flush=True)
    if writes:
        write_json(file(folder, part), found | {"complete": True})


def line(row: Row) -> str:
    """A row for the terminal."""
    if "reason" in row:
        return f"{row['contender']} {row['what']}: {row['reason']}"
    told = f"{row['contender']} {row['what']}: {row['seconds']:.4g} s".strip()
    if row.get("peak_bytes"):
        told += f", {row['peak_bytes'] / 2**30:.1f} GiB"
    return told + (f", {row['flop'] / 1e12:.4g} TFLOP" if "flop" in row else "")


def _rows(part: Part, speed: Speed, model: Model, device: torch.device) -> Iterator[Row]:
    kinds: dict[str, Callable[..., Iterator[Row]]] = {
        "steps": _steps,
        "text": _text,
        "image": _image,
        "options": _options,
        "largest": _largest,
        "gpus": _gpus,
    }
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)
    yield from kinds[part.kind](part, speed, model, device)


def _loaded(part: Part, speed: Speed, model: Model, device: torch.device, compiled: bool = True) -> Backbone:
    backbone = load(part.model, device, model.dtype, weights="random")
    if compiled and speed.compile and device.type == "cuda":
        compile_blocks(backbone.model)
    return backbone


def _tried(what: str, contender: str, call: Callable[[], Row]) -> Row:
    """A row, or the reason why there is none: a contender that runs out of memory or fails stops no other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return {"contender": contender, "what": what, **call()}
    except Exception as error:
        return {"contender": contender, "what": what, "reason": failure(error)}


def _steps(part: Part, speed: Speed, model: Model, device: torch.device) -> Iterator[Row]:
    backbone = _loaded(part, speed, model, device)
    for what in ("encode", "decode"):
        yield _tried(what, "", partial(steps.vae, backbone, what, part.size, speed.repeats, speed.patience))
    for name in model.contenders_at(part.size):
        contender, more = CONTENDERS[name], {}
        if name == "multidiffusion":
            best, found = steps.best_view_batch(backbone, part.size)
            contender = Contender(contender.variant, {"view_batch": best})
            more = {"view_batch": best, "seconds_a_view": {str(n): t for n, t in found.items()}}

        def step(contender: Contender = contender, more: Row = more) -> Row:
            timed = steps.timed_step(backbone, contender, part.size, speed.repeats, speed.patience)
            return {**timed, **flop.step(backbone, contender, part.size), **more}

        yield _tried("step", name, step)
        if name == "scale-dit":
            yield _tried(
                "low-resolution pass",
                name,
                lambda: steps.low_resolution(backbone, part.size, speed.repeats, speed.patience),
            )
    if part.size == backbone.base_resolution:
        yield {"contender": "attention-free", "what": "flop", "seconds": 0.0, **flop.step(
            backbone, CONTENDERS["attention-free"], part.size)}  # fmt: skip


def _text(part: Part, speed: Speed, model: Model, device: torch.device) -> Iterator[Row]:
    backbone = _loaded(part, speed, model, device)
    prompts = partial(backbone.encode_prompt, [PROMPT], backbone.defaults)
    yield _tried("text", "", lambda: steps.seconds(prompts, device, speed.repeats, speed.patience))


def _image(part: Part, speed: Speed, model: Model, device: torch.device) -> Iterator[Row]:
    """One whole ScaleDiff image, stage by stage, after a run of a step each that compiles."""
    backbone = _loaded(part, speed, model, device)

    def run(sampling: Sampling) -> Row:
        stages = []
        steps.reset_peak(device)
        start = time.perf_counter()
        with fastest_attention(device):
            for stage in cascade(
                backbone, [PROMPT], [0], VARIANTS["scalediff"], part.size, part.size, sampling
            ):  # fmt: skip
                stages.append(
                    {"stage": stage.name, "side": stage.height, "steps": stage.steps, "seconds": stage.seconds}
                )
            before = time.perf_counter()
            decode(backbone, stage)
        now = time.perf_counter()
        return {
            "seconds": now - start,
            "stages": stages,
            "decode_seconds": now - before,
            "peak_bytes": steps.peak(device),
        }

    yield _tried("warm-up", "scalediff", lambda: run(Sampling.of(num_inference_steps=2, tau=500)))
    many, few = cascade_steps(part.model)
    yield _tried("image", "scalediff", lambda: run(Sampling.of(num_inference_steps=many, tau=1000 * few / many)))


def _options(part: Part, speed: Speed, model: Model, device: torch.device) -> Iterator[Row]:
    """What each choice is worth at one size: eager and compiled steps, tiles and blocks of the VAE."""
    backbone = _loaded(part, speed, model, device, compiled=False)

    def step() -> Row:
        return steps.timed_step(backbone, CONTENDERS["scalediff"], part.size, speed.repeats, speed.patience)

    def vae(what: str) -> Row:
        return steps.vae(backbone, what, part.size, speed.repeats, speed.patience)

    yield _tried("step", "eager", step)
    if speed.compile and device.type == "cuda":
        compile_blocks(backbone.model)
        yield _tried("step", "compiled", step)
    module = backbone.pipe.vae
    tile = module.tile_sample_min_size
    for name, side, backend in (
        ("tiles of the model's size", tile, "auto"),
        ("tiles of the model's size, diffusers' own blocks", tile, "reference"),
        ("tiles of twice that", 2 * tile, "auto"),
        ("one tile", None, "auto"),
    ):
        backbone.vae_backend = backend
        if side is not None:
            module.tile_sample_min_size, module.tile_latent_min_size = side, side // backbone.scale
        for what in ("encode", "decode"):
            yield _tried(what, name, partial(_tiled, vae, backbone, what, side))


def _tiled(vae: Callable[[str], Row], backbone: Backbone, what: str, side: int | None) -> Row:
    before = backbone.defaults
    backbone.defaults = Sampling.of(vae_tiling=side is not None).over(before)
    try:
        return vae(what)
    finally:
        backbone.defaults = before


def _largest(part: Part, speed: Speed, model: Model, device: torch.device) -> Iterator[Row]:
    """One ScaleDiff step and the VAE at growing sizes, until memory is short."""
    backbone = _loaded(part, speed, model, device)
    for side in model.largest:
        step = partial(steps.timed_step, backbone, CONTENDERS["scalediff"], side, 1, speed.patience)
        row = _tried("step", "scalediff", step)
        yield {**row, "side": side}
        if "reason" in row:
            return
        for what in ("encode", "decode"):
            row = _tried(what, "", partial(steps.vae, backbone, what, side, 1, speed.patience))
            yield {**row, "side": side}


def _gpus(part: Part, speed: Speed, model: Model, device: torch.device) -> Iterator[Row]:
    """Every stage of a ScaleDiff image by each of several processes alone, then by all together.

    All take the same steps: none may stop early, as the others would wait for it.
    """
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backbone = _loaded(part, speed, model, device)
    patient = math.inf
    for name, group in (("alone", nullcontext()), ("together", parallel.joined(device.type))):
        with group:
            for side in [backbone.base_resolution, *doublings(backbone.base_resolution, part.size)]:
                contender = CONTENDERS["base" if side == backbone.base_resolution else "scalediff"]
                step = partial(steps.timed_step, backbone, contender, side, min(2, speed.repeats), patient)
                yield {**_tried("step", name, step), "side": side}
                for what in ("encode", "decode"):
                    vae = partial(steps.vae, backbone, what, side, 1, patient)
                    yield {**_tried(what, name, vae), "side": side}
