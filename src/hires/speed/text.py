"""Text encoders of the full-size models, with random weights: their configurations alone, and token ids as given."""

from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from hires.backbones.base import Backbone
from hires.speed.steps import PROMPT, Row, seconds

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
# model -> name -> (class, configuration, batch, tokens); SDXL encodes the negative prompt too
ENCODERS: dict[str, dict[str, tuple[Any, Any, int, int]]] = {
    "flux-dev": {
        "CLIP-L": (CLIPTextModel, CLIPTextConfig(**_CLIP_L), 1, 77),
        "T5-XXL": (T5EncoderModel, T5Config(**_T5_XXL), 1, 512),
    },
    "sdxl": {
        "CLIP-L": (CLIPTextModel, CLIPTextConfig(**_CLIP_L), 2, 77),
        "CLIP-bigG": (CLIPTextModelWithProjection, CLIPTextConfig(**_CLIP_G), 2, 77),
    },
}


def encoder(model: str, name: str, device: torch.device, dtype: torch.dtype, repeats: int) -> Row:
    """One text encoder of a full-size model."""
    known, config, batch, tokens = ENCODERS[model][name]
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            module = known(config).eval()
    finally:
        torch.set_default_dtype(former)
    ids = torch.ones(batch, tokens, dtype=torch.long, device=device)
    return seconds(lambda: module(ids), device, repeats, 20)


def whole(backbone: Backbone, repeats: int) -> Row:
    """All text encoders of a loaded model, tokenizers included."""
    return seconds(lambda: backbone.encode_prompt([PROMPT], backbone.defaults), backbone.device, repeats, 20)
