"""Everything the scores read off the pixels of one image: network inputs, crops, spectra, steps, objects."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from hires.errors import HiresError
from hires.files.storage import Damaged
from hires.files.untrusted import read_picture
from hires.scenes import COLOURS, parse

BANDS = {"low": (1 / 8, 1 / 4), "mid": (1 / 4, 1 / 2), "high": (1 / 2, 1.0)}  # fractions of the Nyquist frequency
LOW = 16  # parts a side of an image's low band


@dataclass(frozen=True)
class View:
    """How a network sees a whole image.

    `size`: side of its square input in pixels; None: the image as it is, the network resizes it.
    `fit`: squash both sides to `size`, or scale the shorter one and cut out the centre. `antialias`: where it shrinks.
    """

    size: int | None
    fit: Literal["squash", "centre"] = "squash"
    antialias: bool = True

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (3, H, W) → float32 (3, size, size), still 0 … 255: bicubic, not rounded."""
        if self.size is None:
            return pixels
        height, width = pixels.shape[1:]
        scale = self.size / min(height, width)
        sides = (self.size, self.size) if self.fit == "squash" else (round(height * scale), round(width * scale))
        resized = interpolate(pixels[None].float(), sides, mode="bicubic", antialias=self.antialias)[0].clamp(0, 255)
        top, left = (sides[0] - self.size) // 2, (sides[1] - self.size) // 2
        return resized[:, top : top + self.size, left : left + self.size]

    def __str__(self) -> str:
        if self.size is None:
            return "whole image, resized by the network"
        how = "squashed" if self.fit == "squash" else "scaled and centre-cropped"
        return f"whole image {how} to {self.size} px, bicubic {'' if self.antialias else 'not '}antialiased"


def crop_boxes(image_id: str, height: int, width: int, size: int, per_image: int, seed: int) -> list[tuple[int, int]]:
    """(top, left) of `per_image` square crops of `size` pixels.

    They depend on the seed, the prompt's id and the sizes alone, so all variants of a prompt share them.
    """
    if min(height, width) < size:
        raise HiresError(f"image of {height}x{width}: smaller than a crop of {size} px; leave out the patch scores")
    digest = hashlib.sha256(f"{seed} {image_id} {height}x{width} {size}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    tops = rng.integers(0, height - size, per_image, endpoint=True)
    lefts = rng.integers(0, width - size, per_image, endpoint=True)
    return list(zip(tops.tolist(), lefts.tolist()))


def band_powers(pixels: Tensor) -> NDArray[np.float64]:
    """log₁₀ of an image's power in each of BANDS, (3,).

    Power: variance of the grey level (mean of R, G, B; 0 … 255) that the band's ring of the Hann-windowed spectrum
    holds, plus 1/12, the variance of rounding to whole levels, below which there is nothing to see.
    """
    grey = pixels.numpy().mean(0, dtype=np.float64)
    height, width = grey.shape
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    grey = (grey - (grey * window).sum() / window.sum()) * window
    power = np.abs(np.fft.rfft2(grey)) ** 2 / (height * width * (window**2).sum())
    columns = np.fft.rfftfreq(width)
    power[:, (columns > 0) & (columns < 0.5)] *= 2  # rfft2 holds one of each conjugate pair
    radius = 2 * np.hypot(np.fft.fftfreq(height)[:, None], columns)
    sums = [power[(radius >= low) & (radius < high)].sum() for low, high in BANDS.values()]
    return np.log10(np.array(sums) + 1 / 12)


def line_steps(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient energy across every line between two rows, (H − 1,), and between two columns, (W − 1,).

    Mean square of the step in grey level (mean of R, G, B; 0 … 255) across the line, plus 1/6, the variance of the
    difference of two rounded levels. Element b − 1 belongs to the line in front of row, or column, b.
    """
    grey = pixels.float().mean(0)
    return tuple(grey.diff(dim=dim).square().mean(1 - dim) + 1 / 6 for dim in (0, 1))  # type: ignore[return-value]


def low_band(pixels: Tensor) -> Tensor:
    """An image's coarse layout: means over LOW × LOW equal parts, (3, LOW, LOW), 0 … 255."""
    return adaptive_avg_pool2d(pixels[None].float(), LOW)[0]


@dataclass(frozen=True)
class Source:
    """One image to read: a file or a picture in memory, and the id of its prompt."""

    id: str
    seed: int
    image: Path | Image.Image
    sha256: str | None = None


@dataclass(frozen=True)
class Pixels:
    """What was read: network inputs, crops (k, 3, s, s) uint8, log band powers (3,), steps across the lines between
    rows and between columns, the low band (3, LOW, LOW), objects of each colour (8,)."""

    sha256: str
    views: list[Tensor]
    boxes: list[tuple[int, int]]
    crops: Tensor | None
    bands: NDArray[np.float64]
    steps: tuple[Tensor, Tensor]
    low: Tensor
    objects: list[int]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return len(self.steps[0]) + 1, len(self.steps[1]) + 1


@dataclass(frozen=True)
class Reader:
    """Reads images for networks with these views; parses them where they are scenes."""

    views: tuple[View, ...]
    crop: tuple[int, int, int] | None  # size, crops per image, seed
    scenes: bool

    def __call__(self, source: Source) -> Pixels:
        pixels, digest = _decode(source)
        boxes, crops = [], None
        if self.crop:
            size, per_image, seed = self.crop
            _, height, width = pixels.shape
            boxes = crop_boxes(source.id, height, width, size, per_image, seed)
            crops = torch.stack([pixels[:, top : top + size, left : left + size] for top, left in boxes])
        found = parse(pixels).colours if self.scenes else {}
        made = {view: view(pixels) for view in self.views}  # both networks of tiny-clip take the same one
        return Pixels(
            digest,
            [made[view] for view in self.views],
            boxes,
            crops,
            band_powers(pixels),
            line_steps(pixels),
            low_band(pixels),
            [found.get(name, 0) for name in COLOURS],
        )


def _decode(source: Source) -> tuple[Tensor, str]:
    """uint8 (3, H, W) and the SHA-256 of the file (of the raw pixels for a picture in memory)."""
    if isinstance(source.image, Image.Image):
        image = source.image.convert("RGB")
        digest = hashlib.sha256(image.tobytes()).hexdigest()
    else:
        try:
            data = source.image.read_bytes()
        except OSError as error:
            raise Damaged(f"{source.image} can't be read ({error.strerror})") from None
        digest = hashlib.sha256(data).hexdigest()
        if source.sha256 not in (None, digest):
            raise Damaged(f"{source.image} is damaged: it is not what its manifest says")
        try:
            image = read_picture(io.BytesIO(data), source.image)
        except HiresError as error:
            raise Damaged(f"{source.image} is damaged: {error}") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), digest
