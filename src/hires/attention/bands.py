"""Neighborhood Patch Attention of one image on several devices of a host, one process each.

A process holds a band of rows of the token grid, whole query patches, for all linear layers; text is replicated. In
every layer the rows of keys and values that a band's windows reach into come from the processes that hold them, and the
text rows, means over a band's patches, are averaged by their numbers of patches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

import hires_kernels
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.library import custom_op

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


@custom_op("hires::gather_rows", mutates_args=())
def gather_rows(key: Tensor, value: Tensor, width: int, owned: Sequence[int], seen: Sequence[int]) -> list[Tensor]:
    """Keys and values of the rows that this process sees, from its own and those of the processes that hold the others.

    Tensors (batch, rows · width, heads, head_dim). `owned` and `seen`: first row and last + 1 of every process.
    """
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    (low, high), own = (seen[2 * rank], seen[2 * rank + 1]), owned[2 * rank]
    shape = (key.shape[0], (high - low) * width, *key.shape[2:])
    outputs = [key.new_empty(shape) for _ in range(2)]
    transfers, arrived = [], []
    for other in ranks:
        given = _overlap(owned, rank, seen, other)
        taken = _overlap(owned, other, seen, rank)
        if other == rank:
            for x, output in zip((key, value), outputs, strict=True):
                output[:, _tokens(taken, low, width)] = x[:, _tokens(taken, own, width)]
            continue
        for x, output in zip((key, value), outputs, strict=True):
            if given:
                sent = x[:, _tokens(given, own, width)].contiguous()
                transfers.append(dist.P2POp(dist.isend, sent, other))
            if taken:
                place = output[:, _tokens(taken, low, width)]
                whole = place.is_contiguous()
                buffer = place if whole else torch.empty_like(place, memory_format=torch.contiguous_format)
                transfers.append(dist.P2POp(dist.irecv, buffer, other))
                if not whole:
                    arrived.append((place, buffer))
    for work in dist.batch_isend_irecv(transfers) if transfers else ():
        work.wait()
    for place, buffer in arrived:
        place.copy_(buffer)
    return outputs


def _overlap(owned: Sequence[int], owner: int, seen: Sequence[int], seer: int) -> range:
    return range(max(owned[2 * owner], seen[2 * seer]), min(owned[2 * owner + 1], seen[2 * seer + 1]))


def _tokens(rows: range, first: int, width: int) -> slice:
    return slice((rows.start - first) * width, (rows.stop - first) * width)


@gather_rows.register_fake
def _(key, value, width, owned, seen):
    rank = dist.get_rank()
    shape = (key.shape[0], (seen[2 * rank + 1] - seen[2 * rank]) * width, *key.shape[2:])
    return [key.new_empty(shape) for _ in range(2)]


@custom_op("hires::sum_over_processes", mutates_args=())
def sum_over_processes(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total


@sum_over_processes.register_fake
def _(x):
    return torch.empty_like(x)


class BandLayer:
    """Stands in for the `NpaLayer` of a layer, of which this process has a band: gathers, attends, averages text rows.

    rope: (cos, sin) of the rows that the band's windows see.
    """

    def __init__(self, whole: NpaLayer, rope: tuple[Tensor, Tensor], divided: list[Band]) -> None:
        band, width, self.window = divided[dist.get_rank()], whole.layer.grid[1], whole.layer.window
        self.layer = replace(whole.layer, grid=(band.last - band.first, width))
        self.tokens, self.backend, self.rope = (band.last - band.first) * width, whole.backend, rope
        self.seen_grid, self.first = (band.high - band.low, width), band.first - band.low
        patches = [ceil((one.last - one.first) / (self.window[0] // 2)) for one in divided]
        self.share = patches[dist.get_rank()] / sum(patches)
        self.owned = [row for one in divided for row in (one.first, one.last)]
        self.seen = [row for one in divided for row in (one.low, one.high)]

    def check(self, tokens: int, attention_mask: Tensor | None) -> None:
        check_call("npa", self.layer, tokens, attention_mask)

    def __call__(self, query, key, value, text=None, rope=None):
        key, value = gather_rows(key, value, self.seen_grid[1], self.owned, self.seen)
        image, text_rows = hires_kernels.band_attention(
            query, key, value, grid=self.seen_grid, window=self.window, first=self.first,
            text=text, rope=self.rope, backend=self.backend,
        )  # fmt: skip
        return image, sum_over_processes(text_rows.float() * self.share).to(text_rows.dtype)


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
