"""The figures of the notebooks and the report, one function each: tidy rows or images in, a Matplotlib figure out."""

from hires.figures.methods import attention_windows, band_spectra, cost, counted_cost, guidance_weight, npa_patches
from hires.figures.pictures import busiest, comparison, latent_spectra, radial_power, radial_spectra, ring_power
from hires.figures.scores import paired_differences, score_points, spectra, sweep
from hires.figures.style import PAGE_WIDTH, colour, label, marker, save, style

__all__ = [
    "PAGE_WIDTH",
    "attention_windows",
    "band_spectra",
    "busiest",
    "colour",
    "comparison",
    "cost",
    "counted_cost",
    "guidance_weight",
    "label",
    "latent_spectra",
    "marker",
    "npa_patches",
    "paired_differences",
    "radial_power",
    "radial_spectra",
    "ring_power",
    "save",
    "score_points",
    "spectra",
    "style",
    "sweep",
]
