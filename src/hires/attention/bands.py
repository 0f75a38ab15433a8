"""Neighborhood Patch Attention of one image on several devices of a host, one process each.

A process holds a band of rows of the token grid, whole query patches, for all linear layers; text is replicated.
Attention is `hires_kernels.band_attention`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

import hires_kernels
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from hires.attention.flux import check_call, image_ids
from hires.attention.layers import Grid
from hires.attention.npa import FluxNpaProcessor, NpaLayer
from hires.errors import HiresError
from hires.execution.parallel import active
from hires.settings import Sampling
from hires.variants import Variant


class Band(NamedTuple):
    """Rows first … last − 1 of the token grid belong to a process, whose windows see the rows low … high − 1."""

    first: int
    last: int
    low: int
    high: int


def bands(height: int, window: int, count: int) -> list[Band]:
    """The bands of `count` processes, whole patches of window // 2 rows each, as even as these allow."""
    side = window // 2
    patches = ceil(height / side)
    if patches < count:
        raise HiresError(f"{count} devices for {patches} rows of patches: take at most {patches}, or a larger image")
    starts = [round(index * patches / count) * side for index in range(count)]
    edges = zip(starts, [*starts[1:], height], strict=True)
    return [Band(first, last, *hires_kernels.seen_rows(height, window, first, last)) for first, last in edges]


class BandLayer:
    """Stands in for the `NpaLayer` of a layer, of which this process has a band.

    rope: (cos, sin) of the rows that the band's windows see.
    """

    def __init__(self, whole: NpaLayer, rope: tuple[Tensor, Tensor], divided: list[Band]) -> None:
        band = divided[dist.get_rank()]
        self.grid, self.window = whole.layer.grid, whole.layer.window
        self.layer = replace(whole.layer, grid=(band.last - band.first, self.grid[1]))
        self.tokens, self.backend, self.rope = (band.last - band.first) * self.grid[1], whole.backend, rope
        self.edges = [*(one.first for one in divided), self.grid[0]]

    def check(self, tokens: int, attention_mask: Tensor | None) -> None:
        check_call("npa", self.layer, tokens, attention_mask)

    def __call__(self, query, key, value, text=None, rope=None):
        try:
            return hires_kernels.band_attention(
                query, key, value, grid=self.grid, window=self.window, edges=self.edges,
                text=text, rope=self.rope, backend=self.backend,
            )  # fmt: skip
        except hires_kernels.KernelError as error:
            raise HiresError(f"{self.layer.name}: {error}") from error


@contextmanager
def divided(
    model: nn.Module, variant: Variant, sampling: Sampling, size: Grid, base_size: Grid, control: bool = False
) -> Iterator[None]:
    """Within it, and within `use_attention`, each of several processes runs its band of the model.

    A stage at the base size, with the model's own attention, is run whole by every process. Sizes in latent pixels.
    HiresError for what can't be divided.
    """
    if not active() or size == base_size:
        yield
        return
    if control:
        raise HiresError("several devices for one image: a ControlNet can't be divided; leave it out")
    _check(model, variant, sampling)
    transformer: Any = model
    grid, window = ((side[0] // 2, side[1] // 2) for side in (size, base_size))
    found = bands(grid[0], window[0], dist.get_world_size())
    band, width = found[dist.get_rank()], grid[1]
    device = next(model.parameters()).device
    own = slice(band.first * width, band.last * width)
    rope = transformer.pos_embed(image_ids(grid, device)[band.low * width : band.high * width])
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        kind = type(block.attn.processor)
        if kind is not FluxNpaProcessor:
            raise HiresError(f"several devices: a {kind.__name__} can't be divided; leave the adapter out")
        block.attn.processor.operation = BandLayer(block.attn.processor.operation, rope, found)

    def cut(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {
            "hidden_states": kwargs["hidden_states"][:, own],
            "img_ids": kwargs["img_ids"][own],
        }

    def join(module: nn.Module, args: Any, output: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = output
        most = max(one.last - one.first for one in found) * width
        padded = x.new_zeros(x.shape[0], most, x.shape[2])
        padded[:, : x.shape[1]] = x
        every = [torch.empty_like(padded) for _ in found]
        dist.all_gather(every, padded)
        return (torch.cat([x[:, : (one.last - one.first) * width] for x, one in zip(every, found)], 1),)

    hooks = [model.register_forward_pre_hook(cut, with_kwargs=True), model.register_forward_hook(join)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check(model: nn.Module, variant: Variant, sampling: Sampling) -> None:
    """HiresError unless a stage above the base can be divided."""
    if not isinstance(model, FluxTransformer2DModel):
        raise HiresError(f"several devices for one image: a {type(model).__name__} can't be divided, only FLUX.1 can")
    if variant.attention != "npa" or variant.views != "none":
        raise HiresError("several devices for one image: only variants with attention 'npa' can be divided")
    for name in ("random_shift", "text_rows", "window_scale", "window_overlap"):
        if getattr(sampling, name) != Sampling.model_fields[name].default:
            raise HiresError(f"several devices for one image: {name} must have its default: leave it out")
