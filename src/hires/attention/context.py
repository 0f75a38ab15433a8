"""`use_attention`: another attention for a while, the old one back in any case."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from hires.attention import npa, scale_dit
from hires.attention.layers import AttentionHandle, Grid, attention_layers
from hires.attention.processors import stock
from hires.errors import unknown

Processors = dict[str, Any]


def _dense(stock_processors: Processors, handle: AttentionHandle) -> Processors:
    """The model's own attention, also inside another context."""
    return stock_processors


# A kind turns the stock processors of the layers, {layer name: processor}, into its own. Its keyword-only
# parameters are the options of the kind.
KINDS: dict[str, Callable[..., Processors]] = {
    "dense": _dense,
    "npa": npa.processors,
    "scale_dit": scale_dit.processors,
}


@contextmanager
def use_attention(
    model: nn.Module, kind: str, size: Grid, base_size: Grid, **options: Any
) -> Iterator[AttentionHandle]:
    """Run the self-attention of a stock diffusers model as `kind` within the context.

    Every layer gets a processor that knows its own grid and window; weights, LoRA and IP-Adapters stay as they are,
    and plain `model(...)` calls work. On leaving, also through an exception, the former processors are back. Inside
    another context the new kind replaces the outer one for a while.

    Args:
        model: FluxTransformer2DModel, Flux2Transformer2DModel, UNet2DConditionModel or a ControlNet of the first or the
            last; compiled or not.
        kind: "dense" (the model's own attention), "npa" (Neighborhood Patch Attention, arXiv 2510.25818; a layer whose
            window covers its grid keeps its own attention) or "scale_dit" (Scale-DiT, arXiv 2510.16325; FLUX.1 only).
        size: (height, width) of the latents that the model will see, in latent pixels.
        base_size: (height, width) in latent pixels whose grid is the window of each layer.
        options: of "npa": text_rows ("patch" | "global"), backend ("auto" or a backend of hires_kernels), shifts
            (a table from `draw_shifts`, or None), window_scale and window_overlap (see `hires.settings`). Of
            "scale_dit": radius or window (tokens), guidance_neighbours ("row" | "all"), order, guidance (from
            `low_resolution_pass`, or None), collect, backend.

    Yields:
        AttentionHandle: `.layers` in call order; set `.step` in the sampling loop where shifts are given.

    Raises:
        HiresError: unknown kind or option, a model or size that doesn't fit.
    """
    if kind not in KINDS:
        raise unknown("attention kind", kind, KINDS)
    allowed = [name for name, p in signature(KINDS[kind]).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in allowed:
            raise unknown(f"option of {kind!r} attention", name, allowed)
    model = unwrap_module(model)
    handle = AttentionHandle(attention_layers(model, size, base_size))
    modules: dict[str, Any] = {layer.name: model.get_submodule(layer.name) for layer in handle.layers}
    former = {name: module.processor for name, module in modules.items()}
    wanted = KINDS[kind]({name: stock(processor) for name, processor in former.items()}, handle, **options)
    try:
        for name, module in modules.items():
            module.set_processor(wanted[name])
        yield handle
    finally:
        for name, module in modules.items():
            module.set_processor(former[name])
