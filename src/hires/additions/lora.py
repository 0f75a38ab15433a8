"""LoRA files of FLUX and SDXL: written as diffusers names them, read in every naming that diffusers converts."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hires.additions.adapters import adapter_states, restore_adapters
from hires.errors import HiresError
from hires.files.storage import replacing

WEIGHTS = "pytorch_lora_weights.safetensors"


def save_lora(pipe: Any, folder: Path, name: str) -> None:
    """Write the LoRA `name` of a FluxPipeline's transformer to `folder`, for `pipe.load_lora_weights(folder)`.

    The file says rank, alpha and targets too, without which diffusers would take alpha = rank.
    """
    model = pipe.transformer
    config = model.peft_config[name]
    shape = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    weights = {
        key: x.detach().cpu().contiguous() for key, x in get_peft_model_state_dict(model, adapter_name=name).items()
    }
    with replacing(folder / WEIGHTS) as temporary:
        pipe.save_lora_weights(folder, weights, weight_name=temporary.name, transformer_lora_adapter_metadata=shape)


def metadata(file: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors."""
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def load_lora(pipe: Any, source: Path, name: str) -> None:
    """Load a LoRA into a pipeline of FLUX or SDXL as the adapter `name`; those on it stay as they are.

    Args:
        source: a safetensors file, or a folder with pytorch_lora_weights.safetensors; in the naming of diffusers and
            peft, kohya, xlabs and whatever else `pipe.lora_state_dict` knows.

    Raises:
        HiresError: there is no such file, it is cut short, of unknown naming, or made for another architecture.
    """
    file = source / WEIGHTS if source.is_dir() else source
    if not file.is_file():
        raise HiresError(f"LoRA {source}: there is no {WEIGHTS if source.is_dir() else 'such file'}")
    part, model = ("unet", pipe.unet) if hasattr(pipe, "unet") else ("transformer", pipe.transformer)
    options = {"unet_config": model.config} if part == "unet" else {}
    try:
        found = pipe.lora_state_dict(load_file(file), **options)
        weights = convert_unet_state_dict_to_peft(found[0]) if part == "unet" else found
    except SafetensorError:
        raise HiresError(f"LoRA {file} is cut short or no safetensors file: fetch it again") from None
    except Exception as error:  # diffusers' converters take a well-formed file for granted
        reason = " ".join(str(error).split())[:160] or "its sizes differ from those of the model"
        raise HiresError(f"LoRA {file}: diffusers cannot convert it: {reason}") from None
    check_lora(model, weights, str(file), part)
    before = adapter_states(model)
    try:
        with _quiet_about_text_encoders(weights):
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    except Exception as error:  # metadata that is none
        if name in getattr(model, "peft_config", {}):
            pipe.delete_adapters(name)
        raise HiresError(f"LoRA {file}: diffusers cannot load it: {' '.join(str(error).split())[:160]}") from None
    restore_adapters(before)  # peft would leave the newest one on alone


@contextmanager
def _quiet_about_text_encoders(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """diffusers warns where a LoRA has nothing for the text encoders, as one of the image model alone must."""
    log = logging.getLogger("diffusers.loaders.lora_base")
    level = log.level
    if not any(key.startswith("text_encoder") for key in weights):
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def check_lora(model: nn.Module, weights: Mapping[str, Tensor], source: str, part: str = "transformer") -> None:
    """HiresError unless every matrix of a LoRA in peft's naming belongs to a layer of `model` and fits it.

    diffusers itself would pass over a block that the model lacks. What is for text encoders is left to it.
    """
    layers = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    for key, weight in weights.items():
        if key.startswith("text_encoder"):
            continue
        name, _, matrix = key.removeprefix(f"{part}.").partition(".lora_")
        if matrix not in ("A.weight", "B.weight"):
            raise HiresError(f"LoRA {source}: its {key!r} is no LoRA matrix in a naming that diffusers knows")
        if not key.startswith(f"{part}.") or name not in layers:
            raise HiresError(
                f"LoRA {source} is of another architecture: this model has no layer {name!r}: give one made for it"
            )
        layer, reads = layers[name], matrix.startswith("A")
        if weight.ndim != layer.weight.ndim:
            raise HiresError(f"LoRA {source}: its {key!r} is no matrix, but of shape {tuple(weight.shape)}")
        given, wanted = (weight.shape[1], _reads(layer)) if reads else (weight.shape[0], _writes(layer))
        if given != wanted:
            raise HiresError(f"LoRA {source} is of another architecture: {name} is {wanted} wide here, {given} there")


def _reads(layer: Any) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _writes(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
