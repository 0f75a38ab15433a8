"""Neighborhood Patch Attention (ScaleDiff, arXiv 2510.25818, section 3.1) as diffusers attention processors.

Queries are cut into patches of half the window's side, each of which sees one window of keys and all text. The
operation is `hires_kernels.neighborhood_patch_attention`, its definition in plain PyTorch `hires_kernels.reference`,
and which window belongs to a patch `hires_kernels.geometry.patches`. Here are the layers that it runs in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import hires_kernels
import torch
from diffusers.models import attention_processor
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import Tensor, nn

from hires.attention.flux import FluxIPAdapterProcessor, FluxProcessor, Joint, check_call, joint_projections
from hires.attention.layers import AttentionHandle, Layer, scaled
from hires.attention.processors import WindowedProcessor
from hires.errors import HiresError, unknown
from hires.sizes import patch_side

UNET_PROCESSORS = (
    attention_processor.AttnProcessor,
    attention_processor.AttnProcessor2_0,
    attention_processor.FusedAttnProcessor2_0,
    attention_processor.SlicedAttnProcessor,
    attention_processor.XFormersAttnProcessor,
)
TEXT_ROWS = ("patch", "global")


def draw_shifts(
    generators: Sequence[torch.Generator], steps: int, layers: Sequence[Layer], overlap: float = 0.5
) -> Tensor:
    """Query window random shifts (arXiv 2510.25818, appendix B.1): integer tensor (steps, layers, batch, 2).

    Every image draws its own column from its own CPU generator in one go: a (row, column) offset in
    0 … side of a query patch for each step and layer. `layers`: those of `attention_layers`, dense ones included, with
    windows as they are used (`hires.attention.layers.scaled`).
    """
    choices = torch.tensor([[patch_side(side, overlap) + 1 for side in layer.window] for layer in layers])
    uniform = [torch.rand(steps, len(layers), 2, generator=generator, dtype=torch.float64) for generator in generators]
    return (torch.stack(uniform, dim=2) * choices[:, None]).long()


def processors(
    stock_processors: dict[str, Any],
    handle: AttentionHandle,
    *,
    text_rows: str = "patch",
    backend: str = "auto",
    shifts: Tensor | None = None,
    window_scale: float = 1.0,
    window_overlap: float = 0.5,
) -> dict[str, Any]:
    """One processor per layer; a layer whose window covers its grid keeps the stock one."""
    layers = scaled(handle.layers, window_scale)
    if text_rows not in TEXT_ROWS:
        raise unknown("text_rows", text_rows, TEXT_ROWS)
    if backend not in (backends := ("auto", *hires_kernels.BACKENDS)):
        raise unknown("attention backend", backend, backends)
    if shifts is not None and (shifts.ndim != 4 or shifts.shape[1] != len(handle.layers) or shifts.shape[3] != 2):
        allowed = f"(steps, {len(handle.layers)}, batch, 2), as draw_shifts gives it for these layers"
        raise HiresError(f"shifts of shape {tuple(shifts.shape)}: must be {allowed}")
    chosen = {}
    for index, layer in enumerate(layers):
        former = stock_processors[layer.name]
        if layer.dense:
            chosen[layer.name] = former
            continue
        drawn = None if shifts is None else shifts[:, index]
        operation = NpaLayer(layer, handle, drawn, text_rows, backend, window_overlap)
        stand_in = next((ours for known, ours in STAND_INS.items() if isinstance(former, known)), None)
        if stand_in is None:
            raise HiresError(
                f"{layer.name} has a {type(former).__name__}: npa can only stand in for the stock processors of FLUX "
                "and U-Nets and for FLUX's IP-Adapter"
            )
        chosen[layer.name] = stand_in(former, operation)
    return chosen


class NpaLayer:
    """The operation of one layer with its geometry and options."""

    def __init__(
        self,
        layer: Layer,
        handle: AttentionHandle,
        shifts: Tensor | None,
        text_rows: str,
        backend: str,
        overlap: float = 0.5,
    ) -> None:
        if any(window > side for window, side in zip(layer.window, layer.grid)):
            raise HiresError(
                f"{layer.name}: window {layer.window[0]}x{layer.window[1]} (its grid at the base size) is larger than "
                f"its grid {layer.grid[0]}x{layer.grid[1]} along one axis: choose a size no smaller than the base"
            )
        if min(layer.window) < 2:
            raise HiresError(
                f"{layer.name}: window {layer.window[0]}x{layer.window[1]} (its grid at the base size): must be at "
                "least 2 tokens a side: choose an aspect ratio nearer to 1, or a larger base"
            )
        self.layer, self.handle, self.shifts = layer, handle, shifts
        self.text_rows, self.backend = text_rows, backend
        self.patch = patch_side(layer.window[0], overlap), patch_side(layer.window[1], overlap)
        self.tokens = layer.grid[0] * layer.grid[1]

    def check(self, tokens: int, attention_mask: Tensor | None) -> None:
        """Raise HiresError where the model was called with other latents than the context was opened for."""
        check_call("npa", self.layer, tokens, attention_mask)

    def shift(self, batch: int) -> Tensor | None:
        """Offsets (batch, 2) of the current step; classifier-free guidance repeats the images, and so the rows."""
        if self.shifts is None:
            return None
        steps, images = self.shifts.shape[:2]
        if not torch.compiler.is_compiling() and self.handle.step not in range(steps):
            raise HiresError(f"step {self.handle.step}: shifts were drawn for the steps 0 … {steps - 1}")
        if batch % images:
            raise HiresError(f"a batch of {batch}: shifts were drawn for {images} images: must be a multiple")
        return self.shifts.index_select(0, self.handle.place)[0].repeat(batch // images, 1)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        text: tuple[Tensor, Tensor, Tensor] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Any, Any]:
        try:
            return hires_kernels.neighborhood_patch_attention(
                query,
                key,
                value,
                grid=self.layer.grid,
                window=self.layer.window,
                patch=self.patch,
                text=text,
                rope=rope,
                shift=self.shift(len(query)),
                text_rows=self.text_rows,
                backend=self.backend,
            )
        except hires_kernels.KernelError as error:
            raise HiresError(f"{self.layer.name}: {error}") from error


class UNetNpaProcessor(WindowedProcessor):
    """Self-attention of a U-Net's transformer blocks."""

    def __init__(self, wrapped: Any, operation: NpaLayer) -> None:
        self.wrapped, self.operation = wrapped, operation

    def __call__(
        self,
        attn: attention_processor.Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        self.operation.check(hidden_states.shape[1], attention_mask)
        if attn.fused_projections:
            projections = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            projections = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in projections)
        image, _ = self.operation(query, key, value)
        return attn.to_out[1](attn.to_out[0](image.flatten(2)))


class FluxNpaProcessor(FluxProcessor):
    """Neighborhood Patch Attention of FLUX's double and single blocks."""

    def __init__(self, wrapped: Any, operation: NpaLayer) -> None:
        self.wrapped, self.operation = wrapped, operation

    def project(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb) -> Joint:
        """What attends: FLUX.1's text has position 0, which rotates by nothing."""
        tokens, backend = self.operation.tokens, self.operation.backend
        return joint_projections(attn, hidden_states, encoder_hidden_states, image_rotary_emb, tokens, backend)

    def attend(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
        """What the processor returns, and the image query as projected."""
        joint = self.project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        self.operation.check(joint.query.shape[1], attention_mask)
        rows = self.operation(joint.query, joint.key, joint.value, text=joint.text, rope=joint.rope)
        image, text_rows = (x.flatten(2) for x in rows)
        if encoder_hidden_states is None:
            return torch.cat([text_rows, image], dim=1), joint.projected
        return (attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text_rows)), joint.projected


class FluxIPAdapterNpaProcessor(FluxIPAdapterProcessor, FluxNpaProcessor):
    """The same with an IP-Adapter."""

    def __init__(self, wrapped: FluxIPAdapterAttnProcessor, operation: NpaLayer) -> None:
        nn.Module.__init__(self)
        FluxNpaProcessor.__init__(self, wrapped, operation)


# A stock processor and what stands in for it; other modules of this package add theirs.
STAND_INS: dict[type, Callable[[Any, NpaLayer], Any]] = {
    FluxIPAdapterAttnProcessor: FluxIPAdapterNpaProcessor,
    FluxAttnProcessor: FluxNpaProcessor,
    **dict.fromkeys(UNET_PROCESSORS, UNetNpaProcessor),
}
