"""Guides: what a field of `Variant` does to the model's output at every step of a stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Generator, Tensor

from hires.settings import Sampling

if TYPE_CHECKING:
    from hires.backbones import Backbone, Schedule

Guide = Callable[[Tensor, Tensor, int], Tensor]  # (model output, noisy latents, step) -> model output


@dataclass(frozen=True)
class Guided:
    """What a guide is made of.

    Attributes:
        reference: Z_ref (n, C, h, w), the clean latents that the stage begins with.
        enlarged: gives the picture that the stage begins with, (n, 3, H, W) in [−1, 1] at the stage's size.
    """

    backbone: "Backbone"
    schedule: "Schedule"
    sampling: Sampling
    generators: Sequence[Generator]
    reference: Tensor
    enlarged: Callable[[], Tensor]
