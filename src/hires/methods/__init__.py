"""The papers' methods, each a few pure functions on tensors.

    lfm.py             Latent Frequency Mixing (ScaleDiff): what a stage starts from
    sg.py              Structure Guidance (ScaleDiff): at every step
    multidiffusion.py  MultiDiffusion: the model on overlapping views
    diffusehigh.py     DiffuseHigh: wavelet guidance, sharpening

The low-pass filter of LFM and SG is in frequency.py. Attention, which runs inside the model, is in `hires.attention`.
"""

from collections.abc import Callable

from hires.methods import diffusehigh, sg
from hires.methods.diffusehigh import sharpen, wavelet_guidance
from hires.methods.frequency import low_pass, resize
from hires.methods.guides import Guide, Guided
from hires.methods.lfm import latent_frequency_mixing
from hires.methods.multidiffusion import multidiffusion, views
from hires.methods.sg import gamma, structure_guidance

# The fields of `Variant` that guide the steps of a stage, in the order in which they act.
GUIDES: dict[str, Callable[[Guided], Guide]] = {"sg": sg.guide, "dwt": diffusehigh.guide}

__all__ = [
    "GUIDES",
    "Guide",
    "Guided",
    "gamma",
    "latent_frequency_mixing",
    "low_pass",
    "multidiffusion",
    "resize",
    "sharpen",
    "structure_guidance",
    "views",
    "wavelet_guidance",
]
