"""Training data: rendered camera views of scenes from the training split, and their captions."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hires.errors import HiresError
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


def draw_views(n: int, seed: int, whole: float = 0.55, close_up: float = 0.27, careless: float = 0.05) -> Views:
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


@dataclass(frozen=True)
class Pool:
    """Rendered views that all models train on.

    Attributes:
        images: (n, 3, h, w) uint8.
        captions: n texts.
    """

    images: Tensor
    captions: list[str]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"images": self.images.cpu()}, folder / "pool.safetensors")
        (folder / "captions.txt").write_text("\n".join(self.captions) + "\n")

    @classmethod
    def load(cls, folder: Path, count: int, device: torch.device) -> "Pool":
        """The first `count` views of a saved pool; HiresError where it holds fewer."""
        path = folder / "pool.safetensors"
        if not path.is_file():
            raise HiresError(f"--pool {folder}: no pool there; write one with `hires train pool --out {folder}`")
        with safe_open(path, "pt") as file:
            images = file.get_slice("images")
            if images.get_shape()[0] < count:
                raise HiresError(f"--pool {folder} holds {images.get_shape()[0]} views, fewer than {count}")
            captions = (folder / "captions.txt").read_text().split("\n")[:count]
            return cls(images[:count].to(device), captions)


@torch.no_grad()
def render_pool(count: int, size: int, seed: int, workers: int, device: torch.device, chunk: int = 1024) -> Pool:
    """Render `count` views of `size`² pixels on `device`; HiresError unless it is a multiple of `chunk`, or less."""
    chunk = min(chunk, count)
    if count < 1 or count % chunk:
        raise HiresError(f"{count} views: give a multiple of {max(chunk, 1)}, or fewer")
    images, captions = [], []
    for views in batches(count // chunk, chunk, seed, workers):
        images.append(((views.render(size, device) + 1) * 127.5).round().to(torch.uint8))
        captions += views.captions
    return Pool(torch.cat(images), captions)


def normalised(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1] in float32."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode_pool(vae, pool: Pool, chunk: int = 512) -> Tensor:
    """(mean, logvar) of the latents of a pool: (n, 2·channels, h, w) in fp16."""
    moments = []
    for images in pool.images.split(chunk):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            posterior = vae.encode(normalised(images)).latent_dist
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).half())
    return torch.cat(moments)
