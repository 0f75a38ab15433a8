"""Guides: what a field of `Variant` does to the model's output at every step of a stage."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hires.backbones import Schedule
    from hires.cascade import Run

Guide = Callable[[Tensor, Tensor, int], Tensor]  # (model output, noisy latents, step) -> model output


@dataclass(frozen=True)
class Guided:
    """What a guide is made of.

    Attributes:
        reference: Z_ref (n, C, h, w), the clean latents that the stage begins with.
        enlarged: gives the picture that the stage begins with, (n, 3, H, W) in [−1, 1] at the stage's size.
    """

    run: "Run"
    schedule: "Schedule"
    reference: Tensor
    enlarged: Callable[[], Tensor]
