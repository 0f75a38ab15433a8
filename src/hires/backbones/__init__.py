"""Backbones: one adapter per model family around a loaded diffusers pipeline. A new family is one more file,
and one in `hires.attention` where its blocks are new."""

from hires.backbones import flux, flux2, sdxl  # noqa: F401  (each registers its pipeline class)
from hires.backbones.base import Backbone, Conditioning
from hires.backbones.loading import load
from hires.backbones.schedule import Schedule

__all__ = ["Backbone", "Conditioning", "Schedule", "load"]
