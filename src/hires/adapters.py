"""LoRA adapters that a variant needs: found beside the model, switched on and off without touching the user's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hires.errors import HiresError

SCALE_DIT = "scale-dit"  # Scale-DiT's own: on for the low-resolution image, off for everything else
States = list[tuple[Any, Any, bool]]  # LoRA layer, its active adapters, whether it is disabled


def adapter_states(model: nn.Module) -> States:
    """Which LoRAs are on, layer by layer."""
    if not getattr(model, "peft_config", None):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]


def restore_adapters(states: States) -> None:
    """Put back what `adapter_states` gave."""
    for layer, active, disabled in states:
        layer._active_adapter, layer._disable_adapters = active, disabled


def switch_adapter(model: nn.Module, name: str, on: bool) -> States:
    """Turn one LoRA of a model on or off; the others stay as they are. Returns every layer's former state.

    A model without it is left alone. HiresError where a LoRA is fused into the weights.

    peft's own switches also decide which weights want gradients, which is the training's business.
    """
    if name not in getattr(model, "peft_config", {}):
        return []
    before = adapter_states(model)
    if any(layer.merged for layer, _, _ in before):
        raise HiresError(f"the model has a fused LoRA, under which {name!r} can't act: call pipe.unfuse_lora() first")
    for layer, _, disabled in before:
        names = [other for other in layer.active_adapters if other != name and not disabled] + [name] * on
        layer._active_adapter, layer._disable_adapters = names or layer._active_adapter, not names
    return before


@contextmanager
def adapter_switched(model: nn.Module, name: str, on: bool) -> Iterator[None]:
    """`switch_adapter` for a while."""
    before = switch_adapter(model, name, on)
    try:
        yield
    finally:
        restore_adapters(before)
