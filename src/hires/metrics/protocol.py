"""Protocols: which samples a score of features compares, and everything else that it depends on beside the images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor

from hires.metrics.features import Features

FEW = 3  # crops of an image where a protocol takes fewer than there are

Samples = Literal["whole", "aliased", "patch", "patch_3"]
SAMPLES: dict[str, Samples] = {"": "whole", "aliased": "aliased", "patch": "patch", "patch_3": "patch_3"}


@dataclass(frozen=True)
class Protocol:
    """How FID, KID or IS is measured.

    Attributes:
        samples: whole images, whole images resized without antialiasing ("aliased"), crops at native resolution
            ("patch"), or the first FEW crops of each image ("patch_3").
        network, dimension: feature network and the length of its features.
        view: how a whole image meets the network's input.
        crop, crops, seed: side of the crops in pixels, how many of an image, seed of their boxes; None, 1 and None for
            whole images.
        images, references: how many of each; references None where a score needs none.
    """

    samples: Samples
    network: str
    dimension: int
    view: str
    crop: int | None
    crops: int
    seed: int | None
    images: int
    references: int | None

    @classmethod
    def of(cls, samples: Samples, images: Features, references: Features | None) -> Self:
        """The protocol under which these features are compared."""
        meta, whole = images.metadata, not samples.startswith("patch")
        crops = None if whole else meta["crops"]
        return cls(
            samples,
            meta["network"],
            images.tensors["features"].shape[1],
            meta["aliased_view"] if samples == "aliased" else meta["view"],
            crops and crops["size"],
            _count(samples, images),
            crops and crops["seed"],
            len(images),
            None if references is None else len(references),
        )

    def __str__(self) -> str:
        where = self.view
        if self.crop:
            where = f"{self.crops} crops of {self.crop} px per image, not resized, seed {self.seed}"
        against = "" if self.references is None else f" against {self.references}"
        return f"{self.network} ({self.dimension} features), {where}; {self.images}{against} images"


def split_name(score: str) -> tuple[str, Samples]:
    """A score's formula and its samples: ("fid", "patch_3") of fid_patch_3."""
    formula, _, samples = score.partition("_")
    return formula, SAMPLES[samples]


def samples_of(features: Features, samples: Samples, prompts: Tensor, name: str = "features") -> tuple[Tensor, Tensor]:
    """The samples (n·k, …) of n images, `name` "features" or "logits", and the prompt of each; `prompts` (n,)."""
    if not samples.startswith("patch"):
        return features.tensors[f"aliased_{name}" if samples == "aliased" else name], prompts
    count = _count(samples, features)
    crops = features.tensors[f"crop_{name}"].unflatten(0, (len(features), -1))[:, :count]
    return crops.flatten(0, 1), prompts.repeat_interleave(count)


def _count(samples: Samples, features: Features) -> int:
    if not samples.startswith("patch"):
        return 1
    return FEW if samples == "patch_3" else features.metadata["crops"]["per_image"]


def wants_crops(scores: Sequence[str]) -> bool:
    return any("_patch" in name for name in scores)


def wants_aliased(scores: Sequence[str]) -> bool:
    return any(name.endswith("_aliased") for name in scores)
