"""MultiDiffusion (arXiv 2302.08113): the whole model on overlapping views, outputs averaged at every step."""

from collections.abc import Callable

import torch
from torch import Tensor

from hires.errors import HiresError


def starts(side: int, view: int, overlap: float) -> list[int]:
    """First latent pixel of every view along one axis; even, so that no view cuts a FLUX token.

    With `side` = s·view and half overlap there are 2s − 1. The last view is moved inwards to end with the canvas.
    """
    if view > side:
        raise HiresError(
            f"MultiDiffusion: a view of {view} latent pixels is larger than the canvas of {side}: "
            "choose a size no smaller than the base"
        )
    stride = max(2, 2 * round(view * (1 - overlap) / 2))
    return [*range(0, side - view, stride), side - view]


def views(size: tuple[int, int], view: tuple[int, int], overlap: float = 0.5) -> list[tuple[int, int]]:
    """Top-left corners (row, column) in latent pixels of all views, row by row: (2s − 1)² at half overlap."""
    return [(i, j) for i in starts(size[0], view[0], overlap) for j in starts(size[1], view[1], overlap)]


def multidiffusion(
    predict: Callable[[Tensor, Tensor, list[tuple[int, int, int]]], Tensor],
    latents: Tensor,
    view: tuple[int, int],
    overlap: float = 0.5,
    view_batch: int = 8,
) -> Tensor:
    """Model output on a large canvas: the mean over all views that hold a pixel.

    Args:
        predict: (crops (n, C, *view), images (n,), places) -> model output of the crops; `images` are batch indices,
            which say whose prompt belongs to each crop, `places` (row, column, image) of its top left latent pixel. A
            crop is a whole image to the model: positions are local.
        latents: noisy latents (B, C, H, W).
        view: (height, width) of a view in latent pixels, the size that the model was trained at.
        view_batch: crops in one model call.
    """
    total = torch.zeros_like(latents)
    count = torch.zeros_like(latents[:1, :1])
    (height, width), batch = view, len(latents)
    corners = views((latents.shape[2], latents.shape[3]), view, overlap)
    for i, j in corners:
        count[:, :, i : i + height, j : j + width] += 1
    jobs = [(i, j, image) for i, j in corners for image in range(batch)]
    for at in range(0, len(jobs), view_batch):
        chunk = jobs[at : at + view_batch]
        crops = torch.stack([latents[image, :, i : i + height, j : j + width] for i, j, image in chunk])
        images = torch.tensor([image for _, _, image in chunk]).to(latents.device, non_blocking=True)
        for (i, j, image), output in zip(chunk, predict(crops, images, chunk), strict=True):
            total[image, :, i : i + height, j : j + width] += output
    return total / count
