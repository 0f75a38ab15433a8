"""The figures of the notebooks and the report, one function each: tidy rows or images in, a Matplotlib figure out."""

from hires.figures.methods import attention_windows, band_spectra, cost, counted_cost, guidance_weight, npa_patches
from hires.figures.pictures import busiest, comparison, latent_spectra, radial_power, radial_spectra, ring_power
from hires.figures.scale_dit import (
    anchor_places,
    attention_masks,
    block_map,
    block_shares,
    blocks,
    seen_keys,
    token_orders,
    training_curve,
)
from hires.figures.scores import every_pair, paired_differences, score_points, spectra, sweep
from hires.figures.studies import Failure, failures, verdicts
from hires.figures.style import LOOKS, PAGE_WIDTH, RC, colour, label, marker, save, style

__all__ = [
    "LOOKS",
    "PAGE_WIDTH",
    "RC",
    "Failure",
    "anchor_places",
    "attention_masks",
    "attention_windows",
    "band_spectra",
    "block_map",
    "block_shares",
    "blocks",
    "busiest",
    "colour",
    "comparison",
    "cost",
    "counted_cost",
    "every_pair",
    "failures",
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
    "seen_keys",
    "spectra",
    "style",
    "sweep",
    "token_orders",
    "training_curve",
    "verdicts",
]
