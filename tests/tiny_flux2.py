"""FLUX.2 [klein] in miniature, from the classes that the full-size pipeline has, with random weights."""

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hires.backbones.catalogue import CONFIGS

HINTS = {"base_resolution": 128, "size_multiple": 32, "sampling": {"max_sequence_length": 40, "vae_tiling": False}}


def build_tokenizer():
    """Every byte is a token: a vocabulary without merges."""
    pieces = ["<|endoftext|>", *bytes_to_unicode().values()]
    tokenizer = Qwen2TokenizerFast(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


def build_transformer(**options):
    return Flux2Transformer2DModel(**{
        "in_channels": 64, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 3 * 16, "timestep_guidance_channels": 32, "axes_dims_rope": (8, 8, 8, 8),
        "guidance_embeds": False, **options,
    })  # fmt: skip


def build_pipeline(is_distilled=False):
    """16 latent channels, 8 pixels a latent pixel; the text encoder has the 27 layers that the pipeline reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        config = Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=27,
            num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, initializer_range=0.1,
        )  # fmt: skip
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4,
            sample_size=128, mid_block_add_attention=False,
        )  # fmt: skip
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        pipe = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(CONFIGS / "flux2-klein" / "scheduler"),
            vae=vae, text_encoder=Qwen3ForCausalLM(config), tokenizer=tokenizer, transformer=build_transformer(),
            is_distilled=is_distilled,
        )  # fmt: skip
    for part in (pipe.vae, pipe.text_encoder, pipe.transformer):
        part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
