"""LoRA adapters that a variant needs: found beside the model, switched on and off without touching the user's own."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from hires.errors import HiresError

SCALE_DIT_ADAPTER = "scale-dit"  # Scale-DiT's own: on for the low-resolution image, off for everything else
States = list[tuple[Any, Any, bool]]  # LoRA layer, its active adapters, whether it is disabled


def adapter_states(module: nn.Module) -> States:
    """Which LoRAs are on, layer by layer, in a model or a part of one."""
    return [(layer, layer._active_adapter, layer._disable_adapters) for _, layer in _lora_layers(module)]


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


def adapter_digests(pipe: Any, needed: str | None = None) -> dict[str, str]:
    """What the LoRAs that act on a pipeline are: name -> SHA-256 of their weights as loaded and of their scale.

    `needed`: the adapter of the variant, which counts though it is switched on for one pass only; Scale-DiT's own is
    left aside for other variants, which switch it off. A LoRA fused into the weights can't be told from them.
    """
    hashes: dict[str, Any] = {}
    parts = {part: model for part, model in pipe.components.items() if getattr(model, "peft_config", None)}
    for part, model in sorted(parts.items()):
        for place, layer in _lora_layers(model):
            acting = {*([] if layer._disable_adapters else layer.active_adapters)} - {SCALE_DIT_ADAPTER} | {needed}
            for name in acting & layer.scaling.keys():
                _add(hashes.setdefault(name, hashlib.sha256()), f"{part}.{place}", layer, name)
    return {name: found.hexdigest() for name, found in sorted(hashes.items())}


def _lora_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """The LoRA layers within a module, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]


def _add(digest: Any, place: str, layer: Any, name: str) -> None:
    """Add one LoRA of a layer to a hash, also where offloading keeps its weights elsewhere."""
    from accelerate.utils import align_module_device

    digest.update(f"{place} {layer.scaling[name]}".encode())
    for matrix in layer.adapter_layer_names:
        held = getattr(layer, matrix, {})
        if name in held:
            module = held[name]
            with align_module_device(module) if isinstance(module, nn.Module) else nullcontext():
                for x in module.parameters() if isinstance(module, nn.Module) else [module]:
                    x = x.detach().cpu().contiguous()
                    digest.update(f"{matrix} {x.dtype} {tuple(x.shape)}".encode())
                    digest.update(x.view(torch.uint8).numpy())
