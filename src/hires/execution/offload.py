"""Parts of a pipeline wait in main memory until they run on the GPU, through the hooks of diffusers and accelerate."""

from typing import Any

import torch

from hires.errors import HiresError, unknown

KINDS = {
    "model": "a whole model at a time (text encoders, transformer, VAE): little slower",
    "group": "layer by layer, the next one on its way while one runs: least memory",
    "sequential": "layer by layer without that, which is slow; for what the other two do not take",
}


def check_offload(kind: str, device: torch.device) -> None:
    """HiresError for an unknown kind, or a device that main memory is no help to."""
    if kind not in KINDS:
        raise unknown("kind of offload", kind, KINDS)
    if device.type == "cpu":
        raise HiresError(
            f"offload {kind}: parts wait in main memory for a GPU, and the device is {device}: leave it out, or name "
            "a GPU as device"
        )


def offload_parts(pipe: Any, kind: str, device: torch.device) -> None:
    """Offload a pipeline by a kind of `KINDS`; its LoRAs, ControlNets and IP-Adapters must be on it by now."""
    if kind == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to("cpu")
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(torch.float32)  # here: what streams bring to the GPU is a copy that is taken now
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
