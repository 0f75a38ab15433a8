"""What is learnt: the velocity loss of the high-resolution pass, and the LoRA through which it is lowered."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hires.additions.adapters import SCALE_DIT_ADAPTER, adapter_states, adapter_switched, restore_adapters
from hires.additions.lora import load_lora
from hires.attention import low_resolution_pass, use_attention
from hires.attention.flux import image_ids
from hires.backbones.base import Backbone
from hires.backbones.flux import pack, unpack
from hires.errors import unknown
from hires.settings import Sampling
from hires.sizes import Size
from hires.training.scale_dit.recipe import Lora


class Batch(NamedTuple):
    """What one pass sees: clean latents and noise (n, C, h, w), clean low-resolution latents (n, C, h', w'), times
    (n,) in (0, 1), text embeddings (n, tokens, width) and pooled (n, width)."""

    latents: Tensor
    low: Tensor
    noise: Tensor
    t: Tensor
    prompt_embeds: Tensor
    pooled: Tensor


def velocity_loss(model: Any, batch: Batch, sampling: Sampling, adapter: str = SCALE_DIT_ADAPTER) -> Tensor:
    """Mean squared error of the high-resolution velocity ε − z at z_t = (1 − t)·z + t·ε: a scalar, float32.

    Args:
        model: FluxTransformer2DModel that carries the LoRA `adapter`.
        sampling: what tokens see: local_radius or local_window, lr_neighbours, lr_anchors, token_order and
            attention_backend, as at inference.
    """
    size, low_size = _side(batch.latents), _side(batch.low)
    visible = sampling.local_attention()
    with adapter_switched(model, adapter, on=True):
        guidance = low_resolution_pass(
            model, pack(batch.low), batch.pooled, low_size=low_size, size=size, scaled=sampling.lr_anchors, **visible
        )
    noisy = torch.lerp(batch.latents, batch.noise, batch.t[:, None, None, None])
    device = noisy.device
    with (
        adapter_switched(model, adapter, on=False),
        use_attention(
            model, "scale_dit", size, size, guidance=guidance, guidance_neighbours=sampling.lr_neighbours, **visible
        ),
    ):
        output = model(
            hidden_states=pack(noisy),
            encoder_hidden_states=batch.prompt_embeds,
            pooled_projections=batch.pooled,
            timestep=batch.t,
            guidance=torch.ones_like(batch.t) if model.config.guidance_embeds else None,
            img_ids=image_ids((size[0] // 2, size[1] // 2), device),
            txt_ids=torch.zeros(batch.prompt_embeds.shape[1], 3, device=device),
            return_dict=False,
        )[0]
    return F.mse_loss(unpack(output.float(), size), batch.noise - batch.latents)


def _side(latents: Tensor) -> Size:
    return latents.shape[2], latents.shape[3]


def checkpointed(block: nn.Module, *args: Any) -> Any:
    """For `model.enable_gradient_checkpointing`: run a block, and run it again alike in the backward pass.

    By then its processor and the state of its LoRA are those of another pass, so they are put back for as long.
    """
    attention: Any = block.attn
    processor = copy.copy(attention.processor)
    processor.collect = None  # the keys and values of the first run are the ones in use
    states = adapter_states(block)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), as_before()

    @contextmanager
    def as_before() -> Iterator[None]:
        before = attention.processor, adapter_states(block)
        attention.set_processor(processor)
        restore_adapters(states)
        try:
            yield
        finally:
            attention.set_processor(before[0])
            restore_adapters(before[1])

    return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def add_adapter(backbone: Backbone, lora: Lora, seed: int) -> list[Tensor]:
    """Put the LoRA `scale-dit` on a FLUX backbone: its parameters, float32. Everything else is frozen.

    A is Gaussian, B zero, drawn from `seed`; or both come from the file `lora.init`.
    """
    for part in backbone.pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    model = backbone.model
    if lora.init is not None:
        load_lora(backbone.pipe, Path(lora.init).expanduser(), SCALE_DIT_ADAPTER)
    else:
        _check_targets(model, lora.targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(
                r=lora.rank, lora_alpha=cast(int, lora.alpha), init_lora_weights="gaussian", target_modules=lora.targets
            )
            model.add_adapter(config, SCALE_DIT_ADAPTER)
    parameters: list[Tensor] = [p for name, p in model.named_parameters() if f".{SCALE_DIT_ADAPTER}." in name]
    for p in parameters:
        p.data = p.data.float()
        p.requires_grad_(True)
    return parameters


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = {name.split(".", 2)[-1].removeprefix("attn.") for name in names}
            raise unknown("LoRA target", target, ends)
