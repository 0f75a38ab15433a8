"""Training data: rendered camera views of scenes from the training split, and their captions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hires.scenes import WHOLE, Camera, Scene, caption, random_camera, render, scene, split


@dataclass(frozen=True)
class Views:
    """A batch of views before rendering."""

    scenes: list[Scene]
    cameras: list[Camera]
    captions: list[str]

    def render(self, size: int, device: torch.device | str) -> Tensor:
        """The views as (n, 3, size, size) in [-1, 1]."""
        return render(self.scenes, size, size, self.cameras, device=device) * 2 - 1


def draw_views(n: int, seed: int, whole: float = 0.5, close_up: float = 0.3, careless: float = 0.05) -> Views:
    """`n` views drawn from `seed`: a share `whole` of whole scenes, a share `close_up` aimed at an object, the rest
    anywhere at zoom 1–8. A share `careless` of the views within a scene carries the caption of the whole scene, as
    the crops of real training sets do.
    """
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene_id = int(rng.integers(2**62))
        if split(scene_id) == "train":
            scenes.append(scene(scene_id))
    cameras, captions = [], []
    for one in scenes:
        kind = rng.random()
        camera = WHOLE if kind < whole else random_camera(rng, one, close_up=kind < whole + close_up)
        cameras.append(camera)
        captions.append(caption(one, WHOLE if rng.random() < careless else camera, rng))
    return Views(scenes, cameras, captions)


class _Batches(Dataset):
    def __init__(self, batches: int, size: int, seed: int, **shares: float) -> None:
        self.batches, self.size, self.seed, self.shares = batches, size, seed, shares

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Views:
        return draw_views(self.size, seed=self.seed * 1_000_003 + index, **self.shares)


def batches(count: int, size: int, seed: int, workers: int, **shares: float) -> Iterator[Views]:
    """`count` batches of `size` views, prepared by `workers` processes in a fixed order."""
    dataset = _Batches(count, size, seed, **shares)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None, shuffle=False
    )
    return iter(loader)


@torch.no_grad()
def encoded_views(vae, count: int, seed: int, workers: int, device: torch.device, chunk: int = 512):
    """Latents of `count` views for the diffusion models: (mean, logvar) in fp16 on `device`, and the views' texts.

    Returns:
        moments (count, 2·channels, h, w) fp16, captions, and SDXL's (count, 4) original size and crop in pixels:
        a view at zoom z is a crop of the scene at z times the base size.
    """
    size = vae.config.sample_size
    moments, captions, crops = [], [], []
    for views in batches(count // chunk, chunk, seed, workers):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(views.render(size, device)).latent_dist
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).half())
        captions += views.captions
        for camera in views.cameras:
            full = size * camera.zoom
            corner = [full * (centre - 0.5 / camera.zoom) for centre in (camera.y, camera.x)]
            crops.append([full, full, *corner])
    return torch.cat(moments), captions, torch.tensor(crops).round().to(device)
