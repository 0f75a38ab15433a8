"""Tiny pipelines with what users add to theirs: ControlNets and IP-Adapters of the real classes, drawn at random."""

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from hires import models
from hires.backbones import Backbone
from hires.models import HINTS

FAMILIES = ["tiny-flux", "tiny-sdxl"]


def build_pipeline(family):
    """A tiny pipeline; SDXL's starts above zero signal, where hires takes Euler's step just as diffusers does."""
    pipe = models.build_pipeline(family)
    if family == "tiny-sdxl":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=False)
    return pipe


def picture(height=128, width=128, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def drawn(model, seed=5):
    """Every parameter anew: what training starts from zero would hide whether an extra acts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.eval().requires_grad_(False)


def controlnet(family, pipe, seed=5, **changes):
    if family == "tiny-flux":
        config = dict(pipe.transformer.config) | {"num_layers": 1, "num_single_layers": 1} | changes
        return drawn(FluxControlNetModel.from_config(config), seed)
    return drawn(ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 16, 8)), seed)


def with_controlnet(family, net):
    pipe = build_pipeline(family)
    sibling = FluxControlNetPipeline if family == "tiny-flux" else StableDiffusionXLControlNetPipeline
    parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    pipe = sibling(**parts, controlnet=net(pipe))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wrapped(pipe, family):
    return Backbone.from_pipeline(pipe, family, HINTS[family])


def image_encoder():
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=8,
        projection_dim=24,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def ip_adapter(family, pipe, seed=2):
    """A state dict as the published adapters have it, which diffusers loads."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    width = 24
    if family == "tiny-flux":
        config, inner = pipe.transformer.config, pipe.transformer.inner_dim
        attention = {}
        for block in range(config.num_layers):
            for name in ("to_k_ip", "to_v_ip"):
                attention[f"{block}.{name}.weight"] = draw(inner, config.joint_attention_dim)
                attention[f"{block}.{name}.bias"] = draw(inner)
        across = config.joint_attention_dim
    else:
        across = pipe.unet.config.cross_attention_dim
        attention = {}
        for index, (name, _) in enumerate(pipe.unet.attn_processors.items()):
            if name.endswith("attn2.processor"):
                inner = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
                for part in ("to_k_ip", "to_v_ip"):
                    attention[f"{index}.{part}.weight"] = draw(inner, across)
    projection = {
        "proj.weight": draw(4 * across, width), "proj.bias": draw(4 * across), "norm.weight": torch.ones(across),
        "norm.bias": torch.zeros(across),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": attention}


def with_ip_adapter(family, adapters=1):
    pipe = build_pipeline(family)
    feature_extractor = CLIPImageProcessor(size=32, crop_size=32)
    pipe.register_modules(image_encoder=image_encoder(), feature_extractor=feature_extractor)
    model = pipe.transformer if family == "tiny-flux" else pipe.unet
    model._load_ip_adapter_weights([ip_adapter(family, pipe, seed) for seed in range(adapters)])
    return pipe
