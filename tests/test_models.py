"""The tiny models: tokenizers, architecture, and the trained folders in the hands of stock diffusers."""

import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline

from hires.errors import HiresError
from hires.models import ASSETS, DEGRADED, build_clip, build_pipeline, build_tokenizer, build_unet
from hires.models.tiny import word_merges
from hires.scenes import VOCABULARY, caption, parse, scene, scene_ids


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_every_word_is_one_token_and_no_other_is_unknown(kind):
    tokenizer = build_tokenizer(kind)
    specials = len(tokenizer("").input_ids)
    for word in [*VOCABULARY, *DEGRADED]:
        assert len(tokenizer(word).input_ids) == 1 + specials, word
    assert tokenizer.unk_token_id not in tokenizer("zebra quilt", add_special_tokens=False).input_ids
    assert len(tokenizer.tokenize("zebra")) > 1


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_captions_fit(kind):
    tokenizer = build_tokenizer(kind)
    texts = [f"noisy {caption(scene(number))}" for number in scene_ids("held-out", 500)]
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= tokenizer.model_max_length


def test_the_vocabulary_is_the_same_in_every_process():
    code = "from hires.models import build_tokenizer; print(sorted(build_tokenizer('clip').get_vocab().items()))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_merges_rebuild_every_word():
    words = ["red", "ring", "rings", "brick", "bricks"]
    merges = word_merges(words)
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # plain byte-pair encoding, the slow way
            for at in range(len(pieces) - 2, -1, -1):
                if tuple(pieces[at : at + 2]) == pair:
                    pieces[at : at + 2] = ["".join(pair)]
        assert pieces == [word + "</w>"]


def test_random_pipelines_follow_their_seed():
    first, again, other = (build_pipeline("tiny-flux", seed).transformer.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["proj_out.weight"], other["proj_out.weight"])
    with pytest.raises(HiresError, match="did you mean 'tiny-flux'"):
        build_pipeline("tiny-flix")


def test_the_unet_has_attention_where_sdxl_has_it():
    names = {name.split(".attentions")[0] for name in build_unet().attn_processors if "attn1" in name}
    assert names == {"down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"}


def test_clip_has_one_joint_space():
    model, tokenizer = build_clip()
    ids = tokenizer(["a red star"], return_tensors="pt").input_ids
    output = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 128, 128))
    assert output.image_embeds.shape == output.text_embeds.shape == (1, 128)


@pytest.mark.parametrize(("name", "kind"), [("tiny-flux", FluxPipeline), ("tiny-sdxl", StableDiffusionXLPipeline)])
def test_stock_pipelines_run_the_trained_models(name, kind):
    """Loaded and called without our code; the prompt's colours are in the images."""
    pipe = DiffusionPipeline.from_pretrained(ASSETS / name)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is kind
    length = {"max_sequence_length": pipe.tokenizer_2.model_max_length} if kind is FluxPipeline else {}
    prompts = ["a large red square on sand", "a large blue disc on snow", "a large green star on planks"] * 2
    images = pipe(
        prompts,
        height=128,
        width=128,
        num_inference_steps=14,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(6)],
        **length,
    ).images
    seen = [prompt.split()[2] in parse(image).colours for prompt, image in zip(prompts, images)]
    assert sum(seen) >= 5


def test_both_pipelines_hold_the_same_vae():
    flux, sdxl = (ASSETS / name / "vae" / "diffusion_pytorch_model.safetensors" for name in ("tiny-flux", "tiny-sdxl"))
    assert flux.read_bytes() == sdxl.read_bytes()


def test_embedded_weights_stay_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*.safetensors")) <= 36 * 2**20
