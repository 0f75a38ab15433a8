"""Reading a picture back without a model: how many objects, of which colours, where.

Objects are the strongly coloured things. Lighting scales red, green and blue alike, so chroma is measured
relative to brightness; the ground's own colour is estimated from the picture, so that what counts as
strong depends on what the objects lie on.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from hires.errors import HiresError
from hires.scenes.world import COLOURS

SIDE = 128  # pictures are read at this side (of a square of the same area)
LEAST_AREA = 0.03**2  # of the picture: smaller things are texture


@dataclass(frozen=True)
class Found:
    """One object: centre as fractions of width and height, area as a fraction of the picture, colour."""

    x: float
    y: float
    area: float
    colour: str


@dataclass(frozen=True)
class Reading:
    """What `parse` found in a picture."""

    objects: list[Found]

    @property
    def count(self) -> int:
        return len(self.objects)

    @property
    def colours(self) -> dict[str, int]:
        """Objects of each colour that occurs."""
        return dict(Counter(item.colour for item in self.objects))


def _pixels(image: Tensor | Image.Image) -> np.ndarray:
    """(height, width, 3) in [0, 1] at about SIDE² pixels."""
    if isinstance(image, Image.Image):
        image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise HiresError(f"image of shape {tuple(image.shape)}: parse takes one RGB image (3, height, width)")
    pixels = image.detach().cpu().float() / (255 if image.dtype == torch.uint8 else 1)
    height, width = pixels.shape[1:]
    factor = SIDE / (height * width) ** 0.5
    size = (max(8, round(height * factor)), max(8, round(width * factor)))
    if size != (height, width):
        mode = "area" if factor < 1 else "bilinear"
        pixels = functional.interpolate(pixels[None], size, mode=mode)[0]
    return pixels.permute(1, 2, 0).numpy().clip(0, 1)


def _hue_angle(rgb: np.ndarray) -> np.ndarray:
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)


_NAMES = tuple(COLOURS)
_HUES = _hue_angle(np.array([COLOURS[name] for name in _NAMES]))


def _nearest_colour(rgb: np.ndarray) -> np.ndarray:
    """Index of the named colour with the nearest hue, for each pixel."""
    return np.abs(np.angle(np.exp(1j * (_HUES - _hue_angle(rgb)[..., None])))).argmin(-1)


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """Hue and saturation as a complex number: its angle, and its length from 0 (grey) to about 1."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    colour = (2 * r - g - b) + 1j * np.sqrt(3) * (g - b)
    return colour * ((rgb.max(-1) - rgb.min(-1)) / (rgb.max(-1) + 0.06) / np.maximum(np.abs(colour), 1e-6))


def _ground(chroma: np.ndarray) -> complex:
    """The typical chroma of the ground: the median of the paler half of the picture's range."""
    pale = chroma[np.abs(chroma) < 0.55]
    pale = pale if pale.size > 0.1 * chroma.size else chroma
    return complex(np.median(pale.real), np.median(pale.imag))


def _score(rgb: np.ndarray) -> np.ndarray:
    """How surely a pixel belongs to an object: 1 and above is sure, the ground stays below 0.75."""
    chroma = _chroma(rgb)
    return np.minimum(np.abs(chroma - _ground(chroma)) / 0.22, np.abs(chroma) / 0.5)


def parse(image: Tensor | Image.Image) -> Reading:
    """Count the objects of a picture of the scenes' world and name their colours.

    Args:
        image: (3, height, width), floats in [0, 1] or uint8, or a PIL image; any size and aspect ratio.
    """
    rgb = _pixels(image)
    height, width = rgb.shape[:2]
    smooth = ndimage.gaussian_filter(rgb, (0.8, 0.8, 0))
    score = _score(smooth)
    # paler parts belong to an object (dots, veins, glints) where they touch its strong ones
    labels, _ = ndimage.label(score > 0.75, np.ones((3, 3)))
    strong = ndimage.binary_opening(score > 1, np.ones((2, 2)))
    labels *= np.isin(labels, np.unique(labels[strong]))
    hues = _nearest_colour(smooth)
    objects = []
    for k, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        member = labels[box] == k
        shares = np.bincount(hues[box][member], minlength=len(_NAMES)) / member.sum()
        # things of different colours that touch are several; a thin seam of mixed colours is none
        for colour in np.flatnonzero(shares >= min(0.25, shares.max())):
            own = member
            if shares[colour] < shares.max() or shares[colour] < 0.75:
                own = ndimage.binary_opening(member & (hues[box] == colour), np.ones((4, 4)))
            area = own.sum() / (height * width)
            if area >= LEAST_AREA:
                y, x = np.nonzero(own)
                left, top = box[1].start + 0.5, box[0].start + 0.5
                x, y = (x.mean() + left) / width, (y.mean() + top) / height
                objects.append(Found(float(x), float(y), float(area), _NAMES[colour]))
    return Reading(objects)


def parse_batch(images: Tensor) -> list[Reading]:
    """`parse` for each of (n, 3, height, width)."""
    return [parse(image) for image in images]
