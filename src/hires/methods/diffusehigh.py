"""DiffuseHigh's structural guidance (arXiv 2406.18459): the low band of a wavelet transform is the enlarged image's.

In pixels, at the first steps of a stage: decode x̂0, put the approximation of the enlarged, sharpened image in the place
of its own, encode. One level of Daubechies' db4 on mirrored borders and a third of the steps, as in the authors'
configuration (5 of 15).

Choices of ours where theirs differ or are open: stages double (theirs: 1024, 2048, 3072, 4096) and start at the τ of
the other variants (theirs: 15 of 50 steps); the scheduler steps on from the guided x̂0 (their program draws fresh
noise); the blur of the sharpening has σ = 1 (theirs is drawn from .1 … 2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hires.methods.guides import Guide, Guided
from hires.settings import Sampling

# Daubechies' scaling filter with four vanishing moments, of unit norm.
DB4 = (
    0.23037781330885523, 0.7148465705525415, 0.6308807679295904, -0.02798376941698385,
    -0.18703481171888114, 0.030841381835986965, 0.032883011666982945, -0.010597401784997278,
)  # fmt: skip


def approximation(x: Tensor) -> Tensor:
    """What is left of (B, C, H, W) when the details of one db4 level are dropped; borders are mirrored."""
    taps = torch.tensor(DB4, dtype=x.dtype, device=x.device)
    kernel = torch.outer(taps, taps)[None, None]
    rows, columns = (_mirrored(side, x.device) for side in x.shape[2:])
    padded = x[:, :, rows][:, :, :, columns].flatten(0, 1)[:, None]
    low = F.conv2d(padded, kernel, stride=2)
    back = F.conv_transpose2d(low, kernel, stride=2)[:, 0, 6 : 6 + x.shape[2], 6 : 6 + x.shape[3]]
    return back.unflatten(0, x.shape[:2])


def _mirrored(side: int, device: torch.device) -> Tensor:
    """Indices of `side` samples and of those beyond either end that the filter reaches, the border sample twice."""
    places = torch.arange(-6, side + 6 + side % 2, device=device)
    places = torch.where(places < 0, -1 - places, places)
    return torch.where(places < side, places, 2 * side - 1 - places)


def wavelet_guidance(pixels: Tensor, low_reference: Tensor) -> Tensor:
    """The image (B, 3, H, W) with the approximation `low_reference` in the place of its own: all else stays."""
    return pixels + low_reference - approximation(pixels)


def sharpen(pixels: Tensor, strength: float) -> Tensor:
    """Unsharp mask x + strength·(x − blur(x)); the blur is a 3×3 Gaussian of σ = 1."""
    if not strength:
        return pixels
    taps = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=pixels.dtype, device=pixels.device) / 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    padded = F.pad(pixels, (1, 1, 1, 1), mode="reflect")
    blurred = F.conv2d(padded, kernel.expand(pixels.shape[1], 1, 3, 3), groups=pixels.shape[1])
    return pixels + strength * (pixels - blurred)


def guided_steps(sampling: Sampling, steps: int) -> int:
    """How many of a stage's `steps` are guided."""
    return round(steps / 3) if sampling.dwt_steps is None else min(sampling.dwt_steps, steps)


def guide(stage: Guided) -> Guide:
    """DiffuseHigh's guidance of the first steps of a stage."""
    low = approximation(stage.enlarged())
    run, schedule = stage.run, stage.schedule
    end = schedule.first + guided_steps(run.sampling, schedule.num_inference_steps - schedule.first)

    def act(output: Tensor, latents: Tensor, step: int) -> Tensor:
        if step >= end:
            return output
        pixels = wavelet_guidance(run.decode(schedule.to_x0(output, latents, step)), low)
        return schedule.from_x0(run.encode(pixels), latents, step)

    return act
