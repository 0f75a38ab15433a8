"""config/speed.yaml: which models, sizes and contenders are measured, and the parts that this makes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hires.config import Section, load_section
from hires.errors import unknown

ROOT = Path("results/speed")
STEPS = {"flux": (30, 18), "sdxl": (50, 20)}  # ScaleDiff: of the base stage, of every later one
Side = Annotated[int, Field(ge=1)]
Name = Literal["scalediff", "multidiffusion", "dense", "scale-dit", "scalediff-fp8", "scalediff-fast", "attention-free"]


class Model(Section):
    """What is measured of one model. Sizes are sides of square images, pixels; the first one is its base."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="precision of the model")
    sizes: list[Side] = Field(min_length=1, description="sides at which every contender's step is measured")
    contenders: list[Name] = Field(min_length=1, description="what is measured side by side")
    skipped: dict[Side, list[Name]] = Field({}, description="contenders that a size goes without")
    check: Side = Field(description="side of the image that is made whole, to check the sum of its parts")
    largest: list[Side] = Field([], description="sides that ScaleDiff alone tries, until memory is short")
    gpus: Side | None = Field(None, description="size of the image that two GPUs make together")

    def contenders_at(self, size: int) -> list[str]:
        """Who is measured at a size; at the base size the base stage's own."""
        if size == self.sizes[0]:
            return ["base", "base-fp8"] if "scalediff-fp8" in self.contenders else ["base"]
        return [name for name in self.contenders if name not in self.skipped.get(size, ())]


class Speed(Section):
    """config/speed.yaml."""

    repeats: int = Field(3, ge=1, description="steps timed of a contender, after those that warm up")
    patience: float = Field(20, gt=0, description="seconds; of a step that takes longer one is enough")
    compile: bool = Field(True, description="compile the blocks, on a GPU")
    models: dict[str, Model] = Field(description="model → what is measured of it")
    without_gpu: dict[str, Model] = Field(description="the same, where there is no GPU")


@dataclass(frozen=True)
class Part:
    """One measurement, one file: "steps" (and VAE) of all contenders at a size, or what `kind` names."""

    name: str
    model: str
    kind: Literal["steps", "text", "image", "options", "largest", "gpus"]
    size: int


def load_speed(path: Path) -> Speed:
    """Read the file; HiresError says in one line what is wrong with it."""
    return load_section(path, Speed)


def cascade_steps(model: str) -> tuple[int, int]:
    """Steps of the base stage and of every later one, as ScaleDiff has them for the model's family."""
    return STEPS["sdxl" if "sdxl" in model else "flux"]


def parts(models: dict[str, Model]) -> list[Part]:
    """The parts in the order in which they are measured: what the tables need first."""
    steps = [Part(f"{name}-{size}", name, "steps", size) for name, model in models.items() for size in model.sizes]
    others = [
        part
        for name, model in models.items()
        for part in (
            Part(f"{name}-text", name, "text", 0),
            Part(f"{name}-image", name, "image", model.check),
            Part(f"{name}-options", name, "options", model.check),
            *([Part(f"{name}-largest", name, "largest", model.largest[-1])] if model.largest else []),
            *([Part(f"{name}-gpus", name, "gpus", model.gpus)] if model.gpus else []),
        )
    ]
    return sorted(steps, key=lambda part: part.size) + others


def choose(found: list[Part], names: list[str]) -> list[Part]:
    """The parts of these names, all without names; HiresError names the nearest right one."""
    table = {part.name: part for part in found}
    for name in names:
        if name not in table:
            raise unknown("part", name, table)
    return [table[name] for name in names] if names else found


def root(gpu: bool, folder: Path = ROOT) -> Path:
    """Where the results go: a run without a GPU never writes over one with it."""
    return folder if gpu else folder / "cpu"
