"""The self-attention layers of a model in call order, and the token grid of each at any latent size."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ControlNetModel, FluxControlNetModel, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from hires.errors import HiresError
from hires.sizes import scaled_window

Grid = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One self-attention layer: module name, and its (height, width) in tokens at the size and at the base size."""

    name: str
    grid: Grid
    window: Grid

    @property
    def dense(self) -> bool:
        """Whether a window covers the grid, so that windowed and dense attention are the same."""
        return self.window[0] >= self.grid[0] and self.window[1] >= self.grid[1]


def scaled(layers: Sequence[Layer], scale: float) -> list[Layer]:
    """The layers with windows of `scale` times the side (`hires.sizes.scaled_window`)."""

    def window(layer: Layer) -> Grid:
        rows, columns = (scaled_window(*axis, scale) for axis in zip(layer.window, layer.grid))
        return rows, columns

    return [replace(layer, window=window(layer)) for layer in layers]


class AttentionHandle:
    """What `use_attention` yields: the layers in call order, and the index of the denoising step, set by the loop.

    `place` is the same index as a tensor (1,): a compiled model would be compiled anew for every value of a number.
    """

    def __init__(self, layers: list[Layer]) -> None:
        self.layers, self.place = layers, torch.zeros(1, dtype=torch.long)

    @property
    def step(self) -> int:
        return int(self.place)

    @step.setter
    def step(self, step: int) -> None:
        self.place.fill_(step)


def attention_layers(model: nn.Module, size: Grid, base_size: Grid) -> list[Layer]:
    """The self-attention layers of `model` in call order; sizes are (height, width) in latent pixels.

    A layer's window is its own grid at `base_size`. FLUX packs 2 x 2 latent pixels into a token; in a U-Net each
    downsampler halves the grid and rounds up.

    Raises HiresError for another model, a side below 1, or an odd side on FLUX.
    """
    model = unwrap_module(model)
    for side in (*size, *base_size):
        if side < 1:
            raise HiresError(f"size {size} and base_size {base_size}: sides are latent pixels, at least 1")
    for known, layers in LAYERS.items():
        if isinstance(model, known):
            return layers(model, size, base_size)
    raise HiresError(f"{type(model).__name__}: allowed: {', '.join(known.__name__ for known in LAYERS)}")


def flux_layers(model: Any, size: Grid, base_size: Grid) -> list[Layer]:
    """All double blocks, then all single blocks, of a transformer with FLUX's names and 2 x 2 packing."""
    if any(side % 2 for side in (*size, *base_size)):
        raise HiresError(f"size {size} and base_size {base_size}: FLUX packs 2x2 latent pixels: sides must be even")
    return [
        Layer(f"{blocks}.{index}.attn", (size[0] // 2, size[1] // 2), (base_size[0] // 2, base_size[1] // 2))
        for blocks in ("transformer_blocks", "single_transformer_blocks")
        for index in range(len(getattr(model, blocks)))
    ]


def unet_layers(model: Any, size: Grid, base_size: Grid) -> list[Layer]:
    """The self-attention of a U-Net's transformer blocks."""
    return [Layer(name, _level(size, level), _level(base_size, level)) for name, level in _unet_names(model)]


# A model class and what finds its layers; other modules of this package add theirs.
LAYERS: dict[type[nn.Module], Callable[[Any, Grid, Grid], list[Layer]]] = {
    FluxTransformer2DModel: flux_layers,
    FluxControlNetModel: flux_layers,
    UNet2DConditionModel: unet_layers,
    ControlNetModel: unet_layers,
}


def _unet_names(model: Any) -> Iterator[tuple[str, int]]:
    """Names of the self-attention modules and how often the grid was halved before them."""
    level = 0
    for index, block in enumerate(model.down_blocks):
        yield from _self_attention(f"down_blocks.{index}", block, level)
        level += bool(block.downsamplers)
    if model.mid_block is not None:
        yield from _self_attention("mid_block", model.mid_block, level)
    for index, block in enumerate(getattr(model, "up_blocks", ())):  # a ControlNet has none
        yield from _self_attention(f"up_blocks.{index}", block, level)
        level -= bool(block.upsamplers)


def _self_attention(prefix: str, block: nn.Module, level: int) -> Iterator[tuple[str, int]]:
    for name, module in block.named_modules():
        if name.endswith(".attn1") and not module.is_cross_attention:
            yield f"{prefix}.{name}", level


def _level(size: Grid, level: int) -> Grid:
    """ceil(side / 2**level): a stride-2 convolution rounds up, and ceilings compose."""
    return -(-size[0] >> level), -(-size[1] >> level)
