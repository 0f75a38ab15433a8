"""The papers' methods, each a few pure functions on tensors."""

from hires.methods.frequency import low_pass, resize
from hires.methods.lfm import latent_frequency_mixing
from hires.methods.multidiffusion import multidiffusion, views
from hires.methods.sg import gamma, structure_guidance

__all__ = [
    "gamma",
    "latent_frequency_mixing",
    "low_pass",
    "multidiffusion",
    "resize",
    "structure_guidance",
    "views",
]
