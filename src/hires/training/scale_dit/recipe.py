"""The recipe of `hires train scale-dit`: one YAML file, validated before any work."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from hires.config import Section, load_section
from hires.errors import HiresError
from hires.settings import Sampling

ATTENTION_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Data(Section):
    """Images and captions."""

    source: str = Field(
        "scenes", description="scenes; a folder of images with captions; or tar shards: a file, a folder, a glob"
    )
    pool: int | None = Field(
        None, ge=1, description="encode this many samples beforehand and draw from them; null: encode at every step"
    )
    workers: int = Field(0, ge=0, description="processes that read, crop and draw")
    whole: float = Field(0.55, ge=0, le=1, description="scenes: share of views of the whole scene")
    close_up: float = Field(0.27, ge=0, le=1, description="scenes: share of close-ups of an object; the rest: anywhere")
    careless: float = Field(0.05, ge=0, le=1, description="scenes: share of views with the whole scene's caption")


class Lora(Section):
    """The adapter."""

    rank: int = Field(16, ge=1, description="rank")
    alpha: float = Field(16, gt=0, description="its output is multiplied by alpha / rank")
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        ATTENTION_TARGETS, description="ends of the names of the linear layers that it is added to"
    )
    init: str | None = Field(None, description="LoRA file or folder to begin from, whose rank and targets then hold")


class Optimizer(Section):
    """Optimiser and learning rate."""

    name: Literal["adamw", "prodigy"] = Field("adamw", description="prodigy needs pip install -e .[train]")
    lr: float | None = Field(
        None, gt=0, description="learning rate; null: 1e-4 with adamw, 1 with prodigy, which finds its own scale"
    )
    betas: tuple[float, float] = Field((0.9, 0.99), description="decay of the two moments")
    weight_decay: float = Field(0.01, ge=0, description="weight decay")
    warmup: int = Field(0, ge=0, description="steps over which the learning rate rises")
    decay_from: float = Field(1.0, ge=0, le=1, description="share of the steps after which it falls linearly to 0")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class Timestep(Section):
    """t = sigmoid(mean + std · N(0, 1)), then shift · t / (1 + (shift − 1) · t)."""

    mean: float = Field(0.0, description="mean of the normal")
    std: float = Field(1.0, gt=0, description="standard deviation of the normal")
    shift: float = Field(1.0, gt=0, description="static timestep shift; above 1 there is more noise")


class Validation(Section):
    """What is looked at on the way: samples and noise that stay the same, and images of prompts."""

    every: int = Field(0, ge=0, description="steps between two looks; 0: none. The first is before training")
    samples: int = Field(64, ge=0, description="samples whose mean loss is logged, in whole batches")
    prompts: list[str] = Field([], description="prompts painted with the variant scale-dit, to validation/<step>.png")
    seed: int = Field(0, ge=0, description="seed of the images")


class Recipe(Section):
    """Everything that an adapter is made from."""

    model: str = Field("tiny-flux", description="FLUX model: a name, a diffusers folder or a hub id, as hires.load has")
    weights: Literal["pretrained", "random"] = Field("pretrained", description="random: to measure time and memory")
    size: int = Field(1024, ge=32, description="side of the native crops, pixels")
    sampling: Sampling = Field(
        default_factory=Sampling,
        description="what tokens see, as at inference: lr_ratio, local_radius or local_window, lr_neighbours, "
        "lr_anchors, token_order, attention_backend; on top of the model's own",
    )
    data: Data = Field(default_factory=Data, description="images and captions")
    lora: Lora = Field(default_factory=Lora, description="the adapter")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="optimiser and learning rate")
    timestep: Timestep = Field(default_factory=Timestep, description="noise levels")
    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch: int = Field(1, ge=1, description="crops in one pass, per process")
    accumulation: int = Field(1, ge=1, description="passes per optimiser step")
    caption_drop: float = Field(0.1, ge=0, le=1, description="share of captions left out")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the average of the weights that is then saved")
    gradient_checkpointing: bool = Field(False, description="run blocks again in the backward pass to save memory")
    cuda_graph: bool = Field(True, description="on a GPU: launch a pass as one CUDA graph")
    seed: int = Field(0, ge=0, description="draws weights, data, noise")
    log_every: int = Field(50, ge=1, description="steps between two rows of the log")
    checkpoint_every: int = Field(1000, ge=1, description="steps between two checkpoints")
    validation: Validation = Field(default_factory=Validation, description="looks on the way")

    @model_validator(mode="after")
    def _sees_the_low_resolution_image(self) -> Self:
        for name in ("lr_keys", "lr_adapter"):
            if not getattr(self.sampling, name):
                raise HiresError(f"sampling.{name} = false is an ablation of images: nothing would be left to train")
        return self

    def record(self) -> dict[str, Any]:
        """Every key for JSON, of `sampling` those that were given."""
        return self.model_dump(mode="json") | {"sampling": self.sampling.model_dump(mode="json", exclude_unset=True)}

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> Self:
        """Read and validate a recipe; `overrides` replace keys of the file. HiresError, one line, on any mistake."""
        return load_section(path, cls, overrides)
