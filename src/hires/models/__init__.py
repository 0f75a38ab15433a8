"""The embedded models: FLUX, SDXL and CLIP in miniature, from the real diffusers and transformers classes.

`build_pipeline` and `build_clip` give them random weights, `hires train` trains them, `ASSETS` holds the trained ones.
Head dimension 32 throughout, so that the fused kernels serve them; one VAE serves both pipelines.
"""

from hires.files import ASSETS
from hires.models.tiny import (
    BASE_RESOLUTION,
    DEGRADED,
    HINTS,
    build_clip,
    build_flux_transformer,
    build_pipeline,
    build_text_encoders,
    build_tokenizer,
    build_unet,
    build_vae,
)

__all__ = [
    "ASSETS",
    "BASE_RESOLUTION",
    "DEGRADED",
    "HINTS",
    "build_clip",
    "build_flux_transformer",
    "build_pipeline",
    "build_text_encoders",
    "build_tokenizer",
    "build_unet",
    "build_vae",
]
