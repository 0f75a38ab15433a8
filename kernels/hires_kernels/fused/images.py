"""GroupNorm and SiLU of images, channels last: x is read twice and written once, whatever the number of groups.

With x the values of one image, s a number for each channel (a convolution's bias, added here for nothing), and mean
and variance over all pixels and the channels of a group:

    n = (x + s − mean) / sqrt(variance + eps) · weight + bias,    y = n / (1 + exp(−n)) with SiLU

in float32, rounded once. PyTorch's own takes channels first, with one thread block for each group of an image: 32 of
them for the 256 MiB that 128 channels of 1024² take in 16 bits.

Three launches. `_moments`: a program reads some pixels, all channels, and keeps the mean of each channel and the sum of
squares about it; it sums differences to the first pixel, so that nothing cancels. `_merge`: a program for each group
puts them together (Chan et al. 1979) and says what a channel is multiplied by, and what is added. `_apply` does it.
Sums have the same order in every run, for an image in any batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hires_kernels import watching

ELEMENTS = 4096  # of one load
LOADS = 16  # of a program of `_moments`
WARPS = 4


@triton.jit
def _moments(
    x, means, squares, pixels, chunks, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, LOADS: tl.constexpr
):
    """Program (k, b): pixels k·PIXELS·LOADS … of image b; means and squares (batch, chunks, C)."""
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    first = chunk.to(tl.int64) * (PIXELS * LOADS)
    base = x + (image * pixels + first) * C
    left = tl.minimum(pixels - first, PIXELS * LOADS).to(tl.int32)
    pilot = tl.load(base + channel, mask=inside, other=0.0).to(tl.float32)
    row = tl.arange(0, PIXELS)[:, None]
    total = tl.zeros([PIXELS, BLOCK], tl.float32)
    square = tl.zeros([PIXELS, BLOCK], tl.float32)
    for start in range(0, left, PIXELS):
        there = (start + row < left) & inside[None, :]
        value = tl.load(base + (start + row) * C + channel[None, :], mask=there, other=0.0).to(tl.float32)
        value = tl.where(there, value - pilot[None, :], 0.0)
        total += value
        square += value * value
    total = tl.sum(total, axis=0)
    square = tl.sum(square, axis=0)
    place = (image * chunks + chunk) * C + channel
    tl.store(means + place, pilot + total / left, mask=inside)
    tl.store(squares + place, square - total * total / left, mask=inside)


@triton.jit
def _merge(
    means,
    squares,
    shift,
    weight,
    bias,
    factors,
    offsets,
    pixels,
    chunks,
    eps,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Program (g, b): GROUP channels of image b; factors and offsets (batch, C): y = x · factor + offset."""
    image = tl.program_id(1).to(tl.int64)
    own = tl.arange(0, BLOCK)
    channel = tl.program_id(0) * GROUP + own
    inside = own < GROUP
    moved = tl.zeros([BLOCK], tl.float32)
    if SHIFT:
        moved = tl.load(shift + channel, mask=inside, other=0.0).to(tl.float32)
    base = image * chunks * C + channel[None, :]
    row = tl.arange(0, CHUNKS)[:, None]
    count = pixels * 1.0 * GROUP
    total = tl.zeros([CHUNKS, BLOCK], tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + row
        there = (chunk < chunks) & inside[None, :]
        held = tl.minimum(pixels - chunk * CHUNK, CHUNK).to(tl.float32)
        mean = tl.load(means + base + chunk * C, mask=there, other=0.0) + moved[None, :]
        total += tl.where(there, mean * held, 0.0)
    mean_all = tl.sum(total) / count
    total = tl.zeros([CHUNKS, BLOCK], tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + row
        there = (chunk < chunks) & inside[None, :]
        held = tl.minimum(pixels - chunk * CHUNK, CHUNK).to(tl.float32)
        apart = tl.load(means + base + chunk * C, mask=there, other=0.0) + moved[None, :] - mean_all
        square = tl.load(squares + base + chunk * C, mask=there, other=0.0)
        total += tl.where(there, square + apart * apart * held, 0.0)
    deviation = tl.sqrt(tl.sum(total) / count + eps)
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) / deviation
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) + (moved - mean_all) * factor
    tl.store(factors + image * C + channel, factor, mask=inside)
    tl.store(offsets + image * C + channel, offset, mask=inside)


@triton.jit
def _apply(
    x, factors, offsets, y, pixels, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr
):
    """Program (k, b): pixels k·PIXELS … of image b."""
    image = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    factor = tl.load(factors + image * C + channel, mask=inside, other=0.0)
    offset = tl.load(offsets + image * C + channel, mask=inside, other=0.0)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    there = (pixel < pixels)[:, None] & inside[None, :]
    place = (image * pixels + pixel)[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32) * factor[None, :] + offset[None, :]
    if SILU:
        value = value / (1 + tl.exp(-value))
    tl.store(y + place, value.to(y.dtype.element_ty), mask=there)


@triton.jit
def _sum(x, y, bias, out, pixels, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Program k: pixels k·PIXELS … of all images."""
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    moved = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    there = (pixel < pixels)[:, None] & inside[None, :]
    place = pixel[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    value += tl.load(y + place, mask=there, other=0.0).to(tl.float32) + moved[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=there)


def group_norm(
    x: Tensor, *, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    """The public function's arguments, checked."""
    x = _channels_last(x)
    batch, channels, height, width = x.shape
    pixels, block, group = height * width, triton.next_power_of_2(channels), triton.next_power_of_2(channels // groups)
    at_once = max(1, ELEMENTS // block)
    chunk = at_once * LOADS
    chunks = triton.cdiv(pixels, chunk)
    means, squares = x.new_empty(2, batch, chunks, channels, dtype=torch.float32)
    factors, offsets = x.new_empty(2, batch, channels, dtype=torch.float32)
    y = torch.empty_like(x)
    watching.launched("fused.group_norm", elements=ELEMENTS, loads=LOADS, warps=WARPS)
    with torch.cuda.device_of(x):
        _moments[chunks, batch](x, means, squares, pixels, chunks, channels, at_once, block, LOADS, num_warps=WARPS)
        _merge[groups, batch](
            means,
            squares,
            weight if shift is None else shift,
            weight,
            bias,
            factors,
            offsets,
            pixels,
            chunks,
            eps,
            C=channels,
            GROUP=channels // groups,
            BLOCK=group,
            CHUNK=chunk,
            CHUNKS=max(1, ELEMENTS // group),
            SHIFT=shift is not None,
            num_warps=WARPS,
        )
        _apply[triton.cdiv(pixels, at_once), batch](
            x, factors, offsets, y, pixels, channels, at_once, block, silu, num_warps=WARPS
        )
    return y


def add_bias(x: Tensor, y: Tensor, *, bias: Tensor) -> Tensor:
    """The public function's arguments, checked."""
    x, y = _channels_last(x), _channels_last(y)
    batch, channels, height, width = x.shape
    pixels, block = batch * height * width, triton.next_power_of_2(channels)
    at_once = max(1, ELEMENTS // block)
    out = torch.empty_like(x)
    watching.launched("fused.add_bias", elements=ELEMENTS, warps=WARPS)
    with torch.cuda.device_of(x):
        _sum[triton.cdiv(pixels, at_once),](x, y, bias, out, pixels, channels, at_once, block, num_warps=WARPS)
    return out


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
