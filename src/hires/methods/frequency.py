"""Resampling and low-pass filters on (B, C, H, W) tensors.

LFM and SG define LP as antialiased bilinear downsampling by `factor` followed by bilinear upsampling
(ScaleDiff, arXiv 2510.25818, section 3.3). The other kernels answer a question that the paper leaves open.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hires.errors import HiresError
from hires.settings import Interpolation, LowPass


def resize(x: Tensor, size: tuple[int, int], kernel: Interpolation = "bicubic") -> Tensor:
    """Resample (B, C, h, w) to (B, C, *size), pixel centres aligned, antialiased when it shrinks (but for nearest).

    Kernels: nearest, bilinear, bicubic (a = −0.5 when it shrinks, −0.75 when it grows, as torch has them), lanczos
    (three lobes, as PIL has it).
    """
    if kernel == "nearest":
        return F.interpolate(x, size, mode="nearest-exact")
    if kernel == "lanczos":
        rows = _lanczos_matrix(x.shape[2], size[0]).to(x)
        columns = _lanczos_matrix(x.shape[3], size[1]).to(x)
        return rows @ x @ columns.T
    shrinks = size[0] < x.shape[2] or size[1] < x.shape[3]
    return F.interpolate(x, size, mode=kernel, align_corners=False, antialias=shrinks)


def low_pass(x: Tensor, kernel: LowPass = "bilinear", factor: float = 1 / 8) -> Tensor:
    """Keep about the lowest `factor` of the frequencies of x (B, C, H, W), along both axes.

    Kernels: bilinear, bicubic, nearest and lanczos go down to int(H·factor) × int(W·factor) and back up; fft is the
    ideal filter, |frequency| ≤ factor·Nyquist, on the periodic image; wavelet keeps the approximation of log2(1/factor)
    levels of the LeGall 5/3 wavelet. HiresError where the factor leaves less than 2×2 pixels, or fits no level.
    """
    height, width = x.shape[2:]
    if kernel == "fft":
        spectrum = torch.fft.rfft2(x.float())
        keep = (torch.fft.fftfreq(height).abs() <= factor / 2)[:, None] & (torch.fft.rfftfreq(width) <= factor / 2)
        return torch.fft.irfft2(spectrum * keep.to(x.device), s=(height, width)).to(x.dtype)
    if kernel == "wavelet":
        levels = (1 / factor).as_integer_ratio()[0].bit_length() - 1
        if factor != 0.5**levels:
            raise HiresError(f"wavelet low-pass: the factor must be 1, 1/2, 1/4, 1/8, …, not {factor}")
        return _approximation(_approximation(x, levels, 2), levels, 3)
    small = int(height * factor), int(width * factor)
    if min(small) < 2:  # one pixel is no image, and torch's antialiased resize to a width of one is wrong
        raise HiresError(f"low-pass factor {factor} leaves {small[0]}x{small[1]} of {height}x{width} pixels: raise it")
    return resize(resize(x, small, kernel), (height, width), kernel)


@lru_cache(maxsize=64)
def _lanczos_matrix(n: int, m: int) -> Tensor:
    """(m, n) weights of Lanczos-3 resampling from n to m samples; the window widens by n/m where it shrinks."""
    scale = max(n / m, 1.0)
    centres = (torch.arange(m, dtype=torch.float64) + 0.5) * n / m
    distance = (torch.arange(n, dtype=torch.float64) + 0.5 - centres[:, None]) / scale
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    return weights / weights.sum(dim=1, keepdim=True)


def _approximation(x: Tensor, levels: int, dim: int) -> Tensor:
    """The signal that is left along `dim` when the details of the first `levels` LeGall 5/3 levels are dropped."""
    if levels == 0 or x.shape[dim] < 2:
        return x
    x = x.movedim(dim, -1)
    even, odd = x[..., ::2], x[..., 1::2]
    # lifting with mirrored borders: detail = odd − mean of its even neighbours, low = even + mean of details / 2
    detail = odd - (even[..., : odd.shape[-1]] + _next(even, odd.shape[-1])) / 2
    before = torch.cat([detail[..., :1], detail], -1)[..., : even.shape[-1]]
    after = torch.cat([detail, detail[..., -1:]], -1)[..., : even.shape[-1]]
    low = _approximation(even + (before + after) / 4, levels - 1, -1)
    # the inverse without details: odd samples are the mean of their neighbours
    out = torch.empty_like(x)
    out[..., ::2] = low
    out[..., 1::2] = (low[..., : odd.shape[-1]] + _next(low, odd.shape[-1])) / 2
    return out.movedim(-1, dim)


def _next(x: Tensor, n: int) -> Tensor:
    """x[1 … n], the last sample mirrored where x ends."""
    return torch.cat([x[..., 1:], x[..., -1:]], -1)[..., :n]
