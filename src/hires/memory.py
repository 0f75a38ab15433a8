"""`hires memory`: what an image takes on one GPU, stage by stage, from full-size architectures with random weights.

A load is a model in memory in one way: precision, offloading, a limit. It runs in a process of its own, so that nothing
of another one is left, and makes its images one after the other; each is a row, written as soon as it is there.
"""

import gc
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from hires.config import Name, Names, Section, Size, load_section
from hires.errors import HiresError, unknown
from hires.execution.devices import without_fragments
from hires.files.blocks import with_block
from hires.files.storage import digest, read_json, replacing, write_json
from hires.sizes import parse_size, stage_sizes
from hires.variants import VARIANTS

if TYPE_CHECKING:
    from torch import Tensor

    from hires.backbones import Backbone
    from hires.cascade import Stage

ROOT = Path("results/memory")
VERSION = 1  # of what is measured; another one measures every row again
PROMPT = "three red rings on a brick wall"
GB = 1e9


class Load(Section):
    """A model in memory, and the images that it makes."""

    model: str = Field(description="name, diffusers folder, as hires.load has it")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="precision of the model")
    offload: Literal["none", "model", "group"] = Field(
        "none", description="what rests in main memory: nothing; parts of the pipeline that don't run; single layers"
    )
    fp8: bool = Field(False, description="keep the weights of the transformer or U-Net in 8 bits, computing in dtype")
    vae_tiling: bool | None = Field(None, description="VAE in tiles: always or never; null: from 4 times the base area")
    limit_gb: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GB (1e9 bytes) of GPU memory that the process may take"
    )
    images: dict[Size, Names] = Field(min_length=1, description="height x width in pixels → variants")

    @model_validator(mode="after")
    def _known(self) -> "Load":
        for size, variants in self.images.items():
            for variant in variants:
                if variant not in VARIANTS:
                    raise HiresError(f"images.{size}: {unknown('variant', variant, VARIANTS)}")
        return self

    def mode(self) -> str:
        """The way in words: "bfloat16, model offload"."""
        tiled = "tiled VAE" if self.vae_tiling else ""
        words = [self.dtype, "weights in 8 bits" if self.fp8 else "", f"{self.offload} offload", tiled]
        return ", ".join(word for word in words if word and word != "none offload")


class Memory(Section):
    """config/memory.yaml."""

    steps: int = Field(2, ge=2, description="denoising steps of each stage, all but the first timed")
    loads: dict[Name, Load] = Field(min_length=1, description="name → a model in memory")
    without_gpu: dict[Name, Load] = Field(min_length=1, description="name → what stands in where there is no GPU")


@dataclass(frozen=True)
class Row:
    """An image to make."""

    load: str
    height: int
    width: int
    variant: str

    @property
    def name(self) -> str:
        return f"{self.load}-{self.height}x{self.width}-{self.variant}"


def load_memory(path: Path) -> Memory:
    """Read the file; HiresError says in one line what is wrong with it."""
    return load_section(path, Memory)


def rows(loads: dict[str, Load], patterns: Iterable[str] = ()) -> list[Row]:
    """The rows in the order of the file; with patterns (`flux-dev-24*`), those whose name fits one of them."""
    every = [
        Row(name, *parse_size(size), variant)
        for name, load in loads.items()
        for size, variants in load.images.items()
        for variant in variants
    ]
    for pattern in patterns:
        if not any(fnmatch(row.name, pattern) for row in every):
            raise unknown("row", pattern, [row.name for row in every])
    return [row for row in every if not patterns or any(fnmatch(row.name, pattern) for pattern in patterns)]


def key(row: Row, load: Load, steps: int) -> str:
    """Digest of what a row depends on."""
    return digest([VERSION, steps, load.model_dump(mode="json", exclude={"images"}), row.name])


def file(folder: Path, row: Row) -> Path:
    return folder / "rows" / f"{row.name}.json"


def finished(folder: Path, row: Row, load: Load, steps: int) -> bool:
    """Whether the row's file is there and of the same settings."""
    path = file(folder, row)
    return path.is_file() and read_json(path)["key"] == key(row, load, steps)


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(loads: dict[str, Load], wanted: list[Row], steps: int, folder: Path) -> None:
    """Make the rows that are missing, each load in a fresh process; HiresError names the loads that ended early."""
    without_fragments()
    ended = []
    for name, load in loads.items():
        missing = [row for row in wanted if row.load == name and not finished(folder, row, load, steps)]
        if not missing:
            continue
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(load, missing, steps, folder))
        process.start()
        process.join()
        if process.exitcode:
            ended.append(f"{name} (exit code {process.exitcode})")
    if ended:
        raise HiresError(f"{', '.join(ended)} ended early: see above; finished rows are kept, run it again")


def _work(load: Load, missing: list[Row], steps: int, folder: Path) -> None:
    from hires.execution.devices import locked_device

    with locked_device() as device:
        start = time.perf_counter()
        backbone = prepared(load, device, any(VARIANTS[row.variant].adapter for row in missing))
        print(f"{missing[0].load}: {load.mode()}, loaded in {time.perf_counter() - start:.0f} s", flush=True)
        for row in missing:
            found = image(backbone, row, load, steps)
            write_json(file(folder, row), found)
            print(f"{time.perf_counter() - start:5.0f} s  {line(found)}", flush=True)


def prepared(load: Load, device: str, adapter: bool) -> "Backbone":
    """The model of a load with random weights, offloaded and limited as it says.

    Weights are drawn on the GPU, where that takes seconds, and then moved: the limit holds from there on.
    `adapter`: with a random LoRA of Scale-DiT's shape.
    """
    import torch

    from hires.backbones import load as load_model
    from hires.execution.offload import offload_parts

    backbone = load_model(load.model, device, load.dtype, weights="random")
    if adapter:
        _add_adapter(backbone)
    if load.fp8:
        backbone.model.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=getattr(torch, load.dtype))
    if load.offload != "none":
        offload_parts(backbone.pipe, load.offload, torch.device(device))
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        if load.limit_gb is not None:
            total = torch.cuda.get_device_properties().total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, load.limit_gb * GB / total))
    return backbone


def _add_adapter(backbone: "Backbone") -> None:
    from peft import LoraConfig

    from hires.additions.adapters import SCALE_DIT_ADAPTER, switch_adapter
    from hires.training.scale_dit.recipe import Lora

    shape = Lora()
    backbone.model.add_adapter(
        LoraConfig(r=shape.rank, lora_alpha=int(shape.alpha), target_modules=shape.targets), SCALE_DIT_ADAPTER
    )
    switch_adapter(backbone.model, SCALE_DIT_ADAPTER, on=False)


def image(backbone: "Backbone", row: Row, load: Load, steps: int) -> dict[str, Any]:
    """One row: every stage and the decoding, each with seconds, peak memory and whether all its numbers are finite.

    `seconds` of a stage are measured, `composed_seconds` are those plus the published steps that were left out, each as
    long as the last steps' median. What the first step compiles counts in both. DiffuseHigh's are not composed: its
    guided steps take longer than the others.
    """
    import torch

    from hires import provenance

    gc.collect()
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()
    found: dict[str, Any] = {
        "key": key(row, load, steps),
        "row": row.name,
        **load.model_dump(mode="json", exclude={"images"}),
        "mode": load.mode(),
        "variant": row.variant,
        "height": row.height,
        "width": row.width,
        "text": "random text embeddings" if backbone.pipe.text_encoder is None else "text encoders run",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": provenance.machine(),
        "stages": [],
        "reason": None,
    }
    try:
        for stage in _stages(backbone, row, steps, load.vae_tiling):
            found["stages"].append(stage)
    except torch.OutOfMemoryError as error:
        found["reason"] = f"out of memory after {len(found['stages'])} stages: {str(error).splitlines()[0][:160]}"
    if not found["reason"]:
        parts = [stage["composed_seconds"] for stage in found["stages"]]
        found["composed_seconds"] = None if None in parts else sum(parts)
        found["peak_gb"] = max(stage["peak_gb"] for stage in found["stages"])
    return found


def _stages(backbone: "Backbone", row: Row, steps: int, vae_tiling: bool | None = None) -> Iterator[dict[str, Any]]:
    from hires.cascade import cascade
    from hires.execution.meter import Meter
    from hires.settings import Sampling

    watch, variant = _Watch(backbone.device.type == "cuda"), VARIANTS[row.variant]
    # the whole of a short schedule in each stage
    every = Sampling.of(num_inference_steps=steps, tau=1000, vae_tiling=vae_tiling)
    last = None
    for last in cascade(backbone, [PROMPT], [0], variant, row.height, row.width, every, callback=watch):
        yield _stage_row(last, watch.steps.get(last.name, []), backbone, variant.dwt and last.name != "base")
    assert last is not None
    if last.pixels is not None and last.name == "upsample":
        return
    with Meter(backbone.device) as cost:
        assert last.latents is not None
        pixels = backbone.decode(last.latents, vae_tiling)
    yield {
        "stage": "decode",
        "height": row.height,
        "width": row.width,
        "steps": 0,
        "seconds": cost.seconds,
        "composed_seconds": cost.seconds,
        "peak_gb": cost.peak_bytes / GB,
        "finite": _finite(pixels),
    }


def _stage_row(stage: "Stage", seconds: list[float], backbone: "Backbone", uneven: bool) -> dict[str, Any]:
    from statistics import median

    defaults = backbone.defaults
    published = 0
    if stage.steps:
        whole = stage.name in ("base", "noise")
        published = defaults.num_inference_steps if whole else defaults.stage_steps()
    step = median(seconds) if seconds else 0.0
    made = stage.latents if stage.latents is not None else stage.pixels
    assert made is not None
    return {
        "stage": stage.name,
        "height": stage.height,
        "width": stage.width,
        "steps": stage.steps,
        "published_steps": published,
        "seconds": stage.seconds,
        "seconds_per_step": step,
        "composed_seconds": None if uneven else stage.seconds + (published - stage.steps) * step,
        "peak_gb": stage.peak_bytes / GB,
        "finite": _finite(made),
    }


def _finite(x: "Tensor") -> bool:
    return bool(x.isfinite().all())


class _Watch:
    """A callback of the cascade: seconds of every step of a stage but its first, which also warms up."""

    def __init__(self, cuda: bool):
        self.cuda, self.last = cuda, 0.0
        self.steps: dict[str, list[float]] = {}

    def __call__(self, stage: str, step: int, steps: int, latents: "Tensor") -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if step > 1:
            self.steps.setdefault(stage, []).append(now - self.last)
        self.last = now


def line(found: dict[str, Any]) -> str:
    """A row for the terminal."""
    if found["reason"]:
        return f"{found['row']}: {found['reason']}"
    parts = ", ".join(f"{stage['stage']} {stage['seconds']:.1f} s" for stage in found["stages"])
    odd = "" if all(stage["finite"] for stage in found["stages"]) else "; NOT FINITE"
    whole = "–" if found["composed_seconds"] is None else f"{found['composed_seconds']:.0f}"
    return f"{found['row']}: {whole} s, {found['peak_gb']:.1f} GB ({parts} measured{odd})"


# --- beforehand and afterwards ------------------------------------------------------------------------------------

RATES = {"flux-dev": 540e12, "sdxl": 830e12, "flux2-klein": 550e12}  # counted FLOP a second of one H200, eager
PIXEL = {"flux-dev": 0.14e-6, "sdxl": 0.19e-6, "flux2-klein": 0.12e-6}  # seconds of VAE a pixel, one way
LOADING = {"none": 15, "model": 30, "group": 85}  # seconds


def seconds(row: Row, load: Load, steps: int) -> float | None:
    """About how long a row takes on one H200, loading aside; None for models that were never counted."""
    from hires.settings import Sampling
    from hires.stages.arithmetic import ARCHITECTURES, step_flop
    from hires.variants import Variant

    if load.model not in RATES:
        return None
    variant, sampling, size = VARIANTS[row.variant], Sampling(), (row.height, row.width)
    base, *larger = stage_sizes(*size, 1024, 64, variant.stages)
    sizes = [size] if variant.start == "noise" else larger if variant.denoise else []
    flop = sum(step_flop(ARCHITECTURES[load.model], size, base, variant, sampling) for size in sizes)
    flop += step_flop(ARCHITECTURES[load.model], base, base, Variant(), sampling)
    pixels = 2 * (1 + steps * variant.dwt) * sum(h * w for h, w in sizes)  # encoded and decoded
    moved = {"none": 0.0, "model": 12 * (1 + len(sizes)), "group": 0.6 * (1 + len(sizes)) * steps}[load.offload]
    return 0.5 + steps * flop / RATES[load.model] + pixels * PIXEL[load.model] + moved


def plan(loads: dict[str, Load], wanted: list[Row], steps: int) -> str:
    """The rows, each with its seconds on one H200, and their sum with what loading takes."""
    lines, total = [], 0.0
    for name in dict.fromkeys(row.load for row in wanted):
        lines.append(f"{LOADING[loads[name].offload]:5} s  load {name}: {loads[name].mode()}")
        total += LOADING[loads[name].offload]
        for row in (row for row in wanted if row.load == name):
            each = seconds(row, loads[name], steps)
            lines.append(f"{'?' if each is None else round(each):>5} s  {row.name}")
            total += each or 0
    return "\n".join([*lines, f"{total:5.0f} s  in all, on one H200"])


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """What is in a folder's rows, in the order of their names."""
    return [read_json(path) for path in sorted((folder / "rows").glob("*.json"))]


TABLE = [
    "row", "model", "height", "width", "variant", "mode", "limit_gb", "seconds", "peak_gb", "finite", "gpu", "reason",
]  # fmt: skip
STAGES = [
    "row", "stage", "height", "width", "steps", "published_steps", "seconds", "seconds_per_step", "composed_seconds",
    "peak_gb", "finite",
]  # fmt: skip


def write_tables(folder: Path) -> Path:
    """memory.csv, a line for each image, and stages.csv, a line for each of its stages; the path of the first."""
    import pandas as pd

    found = read_rows(folder)
    images = [
        {
            **row,
            "seconds": row.get("composed_seconds"),
            "peak_gb": row.get("peak_gb"),
            "finite": all(stage["finite"] for stage in row["stages"]),
            "gpu": row["machine"]["gpu"],
        }
        for row in found
    ]
    stages = [{"row": row["row"], **stage} for row in found for stage in row["stages"]]
    for name, lines, columns in (("memory", images, TABLE), ("stages", stages, STAGES)):
        with replacing(folder / f"{name}.csv") as temporary:
            pd.DataFrame(lines, columns=columns).to_csv(
                temporary, index=False, float_format="%.4g", lineterminator="\n"
            )
    return folder / "memory.csv"


REFERENCE = Path("results/reference/memory")
UNMEASURED = "*Not measured yet: `hires memory` on a GPU, then `hires promote memory`, fill this in.*\n"


def promote(source: Path, readme: Path = Path("README.md")) -> Path:
    """Copy the tables of `hires memory` to `REFERENCE` and bring the README's table up to date.

    HiresError where there are none, or where they were made without a GPU.
    """
    import shutil

    found = read_rows(source)
    if not found:
        raise HiresError(f"{source} holds no rows: run hires memory first")
    if any(row["machine"]["gpu"] is None for row in found):
        raise HiresError(
            f"{source} was made without a GPU, where small architectures stand in: run hires memory on one"
        )
    REFERENCE.mkdir(parents=True, exist_ok=True)
    write_tables(source)
    for name in ("memory.csv", "stages.csv"):
        shutil.copy(source / name, REFERENCE / name)
    with_table = readme_with_table(readme.read_text(encoding="utf-8"), REFERENCE / "memory.csv")
    readme.write_text(with_table, encoding="utf-8")
    return REFERENCE


def readme_with_table(text: str, csv: Path) -> str:
    """The README with its table of ScaleDiff's rows drawn from `csv`, or with a line that says that there are none."""
    return with_block(text, "memory", _readme_table(csv))


def _readme_table(csv: Path) -> str:
    import pandas as pd

    if not csv.is_file():
        return UNMEASURED
    lines = ["| model | size | mode | seconds | peak GB |", "|---|---|---|---|---|"]
    rows = pd.read_csv(csv).query("variant == 'scalediff'")
    for row in rows.sort_values(["model", "height", "peak_gb"], ascending=[True, True, False]).itertuples():
        limit = "" if pd.isna(row.limit_gb) else f", within {row.limit_gb:g} GB"
        made = f"{row.seconds:.0f} | {row.peak_gb:.1f}" if pd.isna(row.reason) else "out of memory |"
        lines.append(f"| {row.model} | {row.height}x{row.width} | {row.mode}{limit} | {made} |")
    return "\n".join(lines) + "\n"
