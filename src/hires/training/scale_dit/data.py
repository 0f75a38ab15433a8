"""Data of an adapter's training: pictures to latents, and what chance decides about them.

Every draw of sample number n comes from a generator seeded by (seed, n): where a run stands is its step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hires.backbones.base import Backbone
from hires.errors import HiresError
from hires.methods.frequency import resize
from hires.settings import Resolved
from hires.sizes import Size
from hires.training.captioned import Pictures, Source, seed_of
from hires.training.scale_dit.loss import Batch
from hires.training.scale_dit.recipe import Recipe, Timestep


class Draws(NamedTuple):
    """What chance decides about n samples, each from its own generator.

    drop: bool (n,), the caption is left out. place: int (n,), in the pool. t: (n,). noise and posterior (of the
    VAE): (n, C, h, w). low_posterior: (n, C, h', w').
    """

    drop: Tensor
    place: Tensor
    t: Tensor
    noise: Tensor
    posterior: Tensor
    low_posterior: Tensor


def times(normal: Tensor, timestep: Timestep) -> Tensor:
    """Logit-normal t of standard normals, shifted."""
    t = torch.sigmoid(timestep.mean + timestep.std * normal)
    return timestep.shift * t / (1 + (timestep.shift - 1) * t)


class Passes(Dataset):
    """Pass number i: the pictures of samples i·batch … (none where a pool holds them), and their draws."""

    def __init__(self, recipe: Recipe, source: Source | None, shape: Sequence[int], low: Size, stream: int) -> None:
        self.recipe, self.source, self.stream = recipe, source, stream
        self.shape, self.low_shape = tuple(shape), (shape[0], *low)

    def __getitem__(self, index: int) -> tuple[Pictures | None, Draws]:
        numbers = range(index * self.recipe.batch, (index + 1) * self.recipe.batch)
        rows = zip(*(self._draws(number) for number in numbers))
        pictures = None if self.source is None else self.source.pictures(numbers)
        return pictures, Draws(*(torch.stack(row) for row in rows))

    def _draws(self, number: int) -> Draws:
        generator = torch.Generator().manual_seed(seed_of(self.recipe.seed, self.stream, number))
        return Draws(
            torch.rand((), generator=generator) < self.recipe.caption_drop,
            torch.randint(self.recipe.data.pool or 1, (), generator=generator),
            times(torch.randn((), generator=generator), self.recipe.timestep),
            *(torch.randn(shape, generator=generator) for shape in (self.shape, self.shape, self.low_shape)),
        )


class Encoded(NamedTuple):
    """Posterior of latents and of low-resolution latents, text embeddings and pooled; every tensor has n rows."""

    mean: Tensor
    std: Tensor
    low_mean: Tensor
    low_std: Tensor
    prompt_embeds: Tensor
    pooled: Tensor


class Encoder:
    """Pictures to what a pass needs of them, by the frozen parts of a pipeline."""

    def __init__(self, backbone: Backbone, recipe: Recipe, sampling: Resolved, low: Size, device: torch.device) -> None:
        self.backbone, self.sampling, self.size, self.device = backbone, sampling, recipe.size, device
        self.low_size = low[0] * backbone.scale, low[1] * backbone.scale
        self.empty = backbone.encode_prompt([""], sampling)

    @torch.no_grad()
    def encode(self, pictures: Pictures) -> Encoded:
        pixels = pictures.render(self.size, self.device)
        text = self.backbone.encode_prompt(pictures.captions, self.sampling)
        low = resize(pixels, self.low_size, "bicubic")
        return Encoded(
            *self._posterior(pixels), *self._posterior(low), text["prompt_embeds"], text["pooled_prompt_embeds"]
        )

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.backbone.pipe.vae
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        mean, scale = self.backbone.latent_statistics()
        return (posterior.mean.float() - mean) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def pool(self, source: Source, count: int, batch: int, workers: int) -> Encoded:
        """`count` samples, encoded once; latents are kept in half precision."""
        parts = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
        loader = DataLoader(_Numbered(source), batch_size=None, sampler=parts, num_workers=workers)  # type: ignore[arg-type]
        chunks = []
        for pictures in loader:
            found = self.encode(pictures)
            halves = {name: getattr(found, name).half() for name in ("mean", "std", "low_mean", "low_std")}
            chunks.append(found._replace(**halves))
        return Encoded(*(torch.cat(tensors) for tensors in zip(*chunks)))

    @torch.no_grad()
    def batch(self, pictures: Pictures | None, draws: Draws, pool: Encoded | None) -> Batch:
        """A pass, from its pictures or from the pool."""
        draws = Draws(*(x.to(self.device) for x in draws))
        if pictures is not None:
            found = self.encode(pictures)
        else:
            assert pool is not None
            found = Encoded(*(x[draws.place] for x in pool))
        return Batch(
            found.mean.float() + found.std.float() * draws.posterior,
            found.low_mean.float() + found.low_std.float() * draws.low_posterior,
            draws.noise,
            draws.t,
            torch.where(draws.drop[:, None, None], self.empty["prompt_embeds"], found.prompt_embeds),
            torch.where(draws.drop[:, None], self.empty["pooled_prompt_embeds"], found.pooled),
        )


class _Numbered(Dataset):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, numbers: Sequence[int]) -> Pictures:
        return self.source.pictures(numbers)


def latent_sizes(backbone: Backbone, size: int, ratio: float) -> tuple[Size, Size]:
    """Latent size of the crops and of their low-resolution version; HiresError unless both have whole tokens."""
    step = 2 * backbone.scale
    low = size / ratio
    if size % step or low % step:
        raise HiresError(
            f"size {size} and lr_ratio {ratio:g} give low-resolution images of {low:g}: both sides must be multiples "
            f"of {step} pixels"
        )
    return (size // backbone.scale,) * 2, (int(low) // backbone.scale,) * 2
