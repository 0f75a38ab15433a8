"""Architectures of the embedded models. Latents: 16 channels, 8 pixels each; base 128², so 16×16 latent pixels."""

import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from hires.errors import unknown
from hires.scenes import VOCABULARY

BASE_RESOLUTION = 128
TEXT_TOKENS = 40
# tiny-clip is taught these words before a caption, so that its features notice lost or false detail.
DEGRADED = ("blurry", "noisy")

# What `hires.json` in a model folder tells the backbone: the training size, the size rule and sampling defaults.
HINTS: dict[str, dict[str, Any]] = {
    "tiny-flux": {
        "base_resolution": BASE_RESOLUTION,
        "size_multiple": 32,
        "sampling": {
            "num_inference_steps": 28,
            "guidance_scale": 2.0,
            "max_sequence_length": TEXT_TOKENS,
            "vae_tiling": False,
            "tau": 340,
            "lfm_factor": 0.25,
            "sg_factor": 0.25,
            "gamma": "sigma",
            "local_radius": 4,
        },
    },
    "tiny-sdxl": {
        "base_resolution": BASE_RESOLUTION,
        "size_multiple": 32,
        "sampling": {
            "num_inference_steps": 28,
            "guidance_scale": 2.0,
            "vae_tiling": False,
            "tau": 480,
            "lfm_factor": 0.25,
            "sg_factor": 0.25,
            "gamma": "one_minus_alpha_bar",
        },
    },
}


def build_tokenizer(kind: str) -> CLIPTokenizer | T5Tokenizer:
    """A tokenizer in which every word of the scenes is one token and any other word falls apart into letters.

    Args:
        kind: "clip" (byte-pair) or "t5" (unigram).
    """
    words = [*VOCABULARY, *DEGRADED]
    letters = string.ascii_lowercase + string.digits + string.punctuation
    if kind == "clip":
        pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
        merges = word_merges(words)
        pieces += [a + b for a, b in merges]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_TOKENS)
    if kind == "t5":
        scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        scores += [(f"▁{w}", -1.0) for w in words] + [("▁", -9.0)] + [(a, -9.0) for a in letters]
        return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=TEXT_TOKENS)
    raise unknown("tokenizer", kind, ("clip", "t5"))


def word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, best first, after which each of `words` is one token.

    Of the commonest pairs the alphabetically first is merged: the order never depends on a hash.
    """
    splits = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for split in splits for pair in pairwise(split)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for split in splits:
            at = 0
            while at < len(split) - 1:
                if (split[at], split[at + 1]) == best:
                    split[at : at + 2] = [best[0] + best[1]]
                at += 1
    return merges


def build_vae() -> AutoencoderKL:
    """tiny-vae: 8 pixels a latent pixel, 16 channels, no attention; half a second for a 512² decode on two cores."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=BASE_RESOLUTION,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_flux_transformer() -> FluxTransformer2DModel:
    """tiny-flux's transformer: 2 double and 5 single blocks of 6 heads × 32, guidance embedding, 8×8 tokens at 128²."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build_unet() -> UNet2DConditionModel:
    """tiny-sdxl's U-Net: SDXL's three levels, attention on the lower two, size conditioning."""
    channels = (64, 96, 128)
    return UNet2DConditionModel(
        sample_size=BASE_RESOLUTION // 8,
        in_channels=16,
        out_channels=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        attention_head_dim=tuple(c // 32 for c in channels),
        cross_attention_dim=2 * 96,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96 + 6 * 32,
    )


def _clip_text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoders(family: str) -> dict[str, Any]:
    """Tokenizers and text encoders of a family ("tiny-flux", "tiny-sdxl") under the names its pipeline gives them."""
    clip = build_tokenizer("clip")
    if family == "tiny-flux":
        t5 = build_tokenizer("t5")
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
                pad_token_id=t5.pad_token_id,
                eos_token_id=t5.eos_token_id,
            )
        )
        text = CLIPTextModel(_clip_text_config(clip, 128, 2))
        return {"tokenizer": clip, "text_encoder": text, "tokenizer_2": t5, "text_encoder_2": encoder}
    # SDXL reads the layer before the last, so each encoder has one layer more than it uses for the tokens.
    return {
        "tokenizer": clip,
        "text_encoder": CLIPTextModel(_clip_text_config(clip, 96, 3)),
        "tokenizer_2": clip,
        "text_encoder_2": CLIPTextModelWithProjection(_clip_text_config(clip, 96, 3)),
    }


def build_pipeline(name: str, seed: int = 0) -> DiffusionPipeline:
    """A tiny pipeline with random weights drawn from `seed`: "tiny-flux" or "tiny-sdxl".

    Every class is the one the full-size pipeline has; `HiresError` names the nearest name on a wrong one.
    """
    if name not in HINTS:
        raise unknown("tiny model", name, HINTS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = build_vae()
        text = build_text_encoders(name)
        if name == "tiny-flux":
            # μ is the same at every token count, so that τ means the same σ at every size.
            scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=1.15, max_shift=1.15)
            pipe: DiffusionPipeline = FluxPipeline(
                scheduler=scheduler, vae=vae, transformer=build_flux_transformer(), **text
            )
        else:
            # SDXL's schedule, down to no signal at all: what is left of the mean would decide the background.
            scheduler = EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
            )
            pipe = StableDiffusionXLPipeline(scheduler=scheduler, vae=vae, unet=build_unet(), **text)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe


def build_clip(seed: int = 0) -> tuple[CLIPModel, CLIPTokenizer]:
    """tiny-clip with random weights: 128² images in 16-pixel patches, 128-dimensional joint space."""
    tokenizer = build_tokenizer("clip")
    text = _clip_text_config(tokenizer, 128, 2)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=BASE_RESOLUTION,
        patch_size=16,
        projection_dim=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))
    return model.eval(), tokenizer
