"""Variants are data: the parts of the cascade (`hires.cascade`) that an image is made with.

A new variant is one entry in the config's `variants`, or here.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hires.errors import unknown


class Variant(BaseModel):
    """One way to reach the target size: which start, stages, attention and guidance."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: Literal["base", "noise"] = Field("base", description="from the base image, or from noise at the target size")
    stages: Literal["doubling", "single"] = Field("doubling", description="double side by side, or jump at once")
    denoise: bool = Field(True, description="false: upsample the decoded base image only (control)")
    attention: Literal["dense", "npa", "scale_dit"] = Field("dense", description="self-attention above the base size")
    views: Literal["none", "multidiffusion"] = Field("none", description="run the whole model on overlapping views")
    lfm: bool = Field(False, description="Latent Frequency Mixing")
    sg: bool = Field(False, description="Structure Guidance")
    dwt: bool = Field(False, description="DiffuseHigh's wavelet guidance, in pixels")
    sharpening: float = Field(0.0, ge=0, description="unsharp mask of the image that is enlarged for a stage")
    adapter: str | None = Field(None, description="LoRA that the variant needs")


VARIANTS: Mapping[str, Variant] = {
    "upsample": Variant(stages="single", denoise=False),
    "direct": Variant(start="noise"),
    "npa-direct": Variant(start="noise", attention="npa"),
    "multidiffusion-direct": Variant(start="noise", views="multidiffusion"),
    "multidiffusion+lfm+sg": Variant(views="multidiffusion", lfm=True, sg=True),
    "dense+lfm+sg": Variant(lfm=True, sg=True),
    "npa": Variant(attention="npa"),
    "npa+lfm": Variant(attention="npa", lfm=True),
    "npa+sg": Variant(attention="npa", sg=True),
    "scalediff": Variant(attention="npa", lfm=True, sg=True),
    "diffusehigh": Variant(dwt=True, sharpening=1.0),
    "scale-dit": Variant(stages="single", attention="scale_dit", adapter="scale-dit"),
    "hybrid": Variant(attention="scale_dit", lfm=True, sg=True, adapter="scale-dit"),
}


def variant(name: str, table: Mapping[str, Variant] = VARIANTS) -> Variant:
    """The variant called `name`; HiresError names the nearest one."""
    if name not in table:
        raise unknown("variant", name, table)
    return table[name]
