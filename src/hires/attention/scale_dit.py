"""Scale-DiT's local attention (arXiv 2510.16325, section 3.2) as diffusers attention processors for FLUX.

The low-resolution image sees itself alone, at timestep 0: its keys and values are the same at every step. So one pass
of the stock transformer over it (`low_resolution_pass`, where the adapter is on) gives the `Guidance` that all
high-resolution steps append to their own keys (where it is off).
"""

from dataclasses import dataclass, field
from typing import Any

import hires_kernels
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from hires_kernels.orders import ORDERS
from torch import Tensor, nn

from hires.attention.flux import FluxIPAdapterProcessor, FluxProcessor, check_call, image_ids, joint_projections
from hires.attention.layers import AttentionHandle, Grid, Layer
from hires.errors import HiresError, unknown

NEIGHBOURS = ("row", "all")


@dataclass
class Guidance:
    """Rotated keys and values (batch, rows · columns, heads, head_dim) of the low-resolution image, one per layer."""

    grid: Grid
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def processors(
    stock_processors: dict[str, Any],
    handle: AttentionHandle,
    *,
    radius: int | None = None,
    window: int | None = None,
    guidance_neighbours: str = "row",
    order: str = "hilbert",
    guidance: Guidance | None = None,
    collect: Guidance | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """One processor per layer. `collect` gets the keys and values of each layer as it runs."""
    for name, former in stock_processors.items():
        if type(former) not in (FluxAttnProcessor, FluxIPAdapterAttnProcessor):
            raise HiresError(
                f"{name} has a {type(former).__name__}: scale_dit stands in for FLUX's stock and IP-Adapter processors "
                "alone: choose another attention for other models"
            )
    if guidance_neighbours not in NEIGHBOURS:
        raise unknown("guidance_neighbours", guidance_neighbours, NEIGHBOURS)
    if order not in ORDERS:
        raise unknown("token_order", order, ORDERS)
    if backend not in (backends := ("auto", *hires_kernels.BACKENDS)):
        raise unknown("attention backend", backend, backends)
    _check_reach(radius, window)
    if guidance is not None and len(guidance.layers) != len(handle.layers):
        raise HiresError(f"guidance of {len(guidance.layers)} layers: this model has {len(handle.layers)}")
    chosen = {}
    for index, layer in enumerate(handle.layers):
        options: dict[str, Any] = {
            "radius": radius,
            "window": window,
            "guidance_neighbours": guidance_neighbours,
            "order": order,
        }
        if guidance is not None:
            options |= {"guidance": guidance.layers[index], "guidance_grid": guidance.grid}
        former = stock_processors[layer.name]
        adapted = isinstance(former, FluxIPAdapterAttnProcessor)
        kind = FluxIPAdapterScaleDitProcessor if adapted else FluxScaleDitProcessor
        chosen[layer.name] = kind(former, layer, {**options, "backend": backend}, collect)
    return chosen


def _check_reach(radius: int | None, window: int | None) -> None:
    if (radius is None) == (window is None):
        raise HiresError(f"radius {radius} and window {window}: scale_dit needs one of the two, in tokens")


class FluxScaleDitProcessor(FluxProcessor):
    """Local attention of FLUX's double and single blocks."""

    def __init__(self, wrapped: Any, layer: Layer, options: dict[str, Any], collect: Guidance | None) -> None:
        self.wrapped, self.layer, self.options, self.collect = wrapped, layer, options, collect
        self.tokens = layer.grid[0] * layer.grid[1]

    def attend(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
        """What the processor returns, and the image query as projected."""
        joint = joint_projections(
            attn, hidden_states, encoder_hidden_states, image_rotary_emb, self.tokens, self.options["backend"]
        )
        check_call("scale_dit", self.layer, joint.query.shape[1], attention_mask)
        if self.collect is not None:
            self.collect.layers.append((joint.key, joint.value))
        # Text has position 0 in FLUX, which rotates by nothing.
        text = joint.text if joint.text[0].shape[1] else None
        try:
            image, text_rows = hires_kernels.local_attention(
                joint.query, joint.key, joint.value, grid=self.layer.grid, text=text, **self.options
            )
        except hires_kernels.KernelError as error:
            raise HiresError(f"{self.layer.name}: {error}") from error
        if text_rows is None:
            text_rows = image[:, :0]
        if encoder_hidden_states is None:
            return torch.cat([text_rows, image], dim=1).flatten(2), joint.projected
        output = attn.to_out[1](attn.to_out[0](image.flatten(2))), attn.to_add_out(text_rows.flatten(2))
        return output, joint.projected


class FluxIPAdapterScaleDitProcessor(FluxIPAdapterProcessor, FluxScaleDitProcessor):
    """The same with an IP-Adapter. The low-resolution pass is called without an image prompt."""

    def __init__(self, wrapped: Any, layer: Layer, options: dict[str, Any], collect: Guidance | None) -> None:
        nn.Module.__init__(self)
        FluxScaleDitProcessor.__init__(self, wrapped, layer, options, collect)


def low_resolution_radius(radius: int | None, window: int | None, grid: Grid, low_grid: Grid) -> int:
    """How far a low-resolution token sees: max(1, radius / s), a window counting as twice the radius."""
    _check_reach(radius, window)
    reach = radius if radius is not None else (window or 0) // 2
    return max(1, reach * max(low_grid) // max(grid))


def low_resolution_pass(
    model: nn.Module,
    tokens: Tensor,
    pooled: Tensor,
    *,
    low_size: Grid,
    size: Grid,
    radius: int | None = None,
    window: int | None = None,
    scaled: bool = True,
    order: str = "hilbert",
    backend: str = "auto",
) -> Guidance:
    """The keys and values that the low-resolution image has in every block.

    Its tokens see each other, max(1, radius / s) away at most, and no text; timestep 0 and guidance 1, as in training.

    Args:
        tokens: packed clean latents (batch, rows · columns, channels) of the low-resolution image.
        pooled: pooled text embedding (batch, width), part of FLUX's time embedding.
        low_size, size: (height, width) in latent pixels of the low- and the high-resolution image.
        radius, window: those of the high-resolution image, in tokens.
        scaled: whether its tokens stand where their content stands in the high-resolution grid.
    """
    from hires.attention.context import use_attention

    low_grid, grid = ((side[0] // 2, side[1] // 2) for side in (low_size, size))
    found, batch, device = Guidance(low_grid), len(tokens), tokens.device
    transformer: Any = model
    options = {"radius": low_resolution_radius(radius, window, grid, low_grid), "order": order, "backend": backend}
    with (
        use_attention(model, "scale_dit", low_size, low_size, collect=found, **options),
        transformer.cache_context("low_resolution"),  # for the caches of diffusers, where the user has one on
        # `collect` grows: a compiled block would be compiled anew for each layer.
        torch.compiler.set_stance("force_eager"),
    ):
        transformer(
            hidden_states=tokens,
            encoder_hidden_states=tokens.new_zeros(batch, 0, transformer.config.joint_attention_dim),
            pooled_projections=pooled,
            timestep=torch.zeros(batch, device=device),
            guidance=torch.ones(batch, device=device) if transformer.config.guidance_embeds else None,
            img_ids=image_ids(low_grid, device, grid if scaled else None),
            txt_ids=torch.zeros(0, 3, device=device),
            return_dict=False,
        )
    return found
