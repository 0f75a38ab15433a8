"""`hires generate` with what users add: against the same in Python, and every mistake in one line."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from extended import controlnet, image_encoder, ip_adapter, picture, wrapped
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

import hires
from hires.additions.lora import save_lora
from hires.backbones.loading import load
from hires.cli import main
from hires.cli.generate import blocks
from hires.errors import HiresError
from hires.execution.offload import offload_parts
from hires.files.storage import sha256
from hires.models import build_pipeline

FAST = {"num_inference_steps": 2, "tau": 500}
PROMPT = "two red cubes"


def cli(*args, size=192, model="tiny-flux"):
    fast = [f"--set={name}={value}" for name, value in FAST.items()]
    return main(["generate", "--model", model, "--weights", "random", "--device", "cpu", "--prompt", PROMPT,
                 "--size", str(size), *fast, *map(str, args)])  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder with a LoRA and a ControlNet of each family, an IP-Adapter and its encoder, and pictures."""
    folder = tmp_path_factory.mktemp("parts")
    for family in ("tiny-flux", "tiny-sdxl"):
        pipe = build_pipeline(family)
        controlnet(family, pipe).save_pretrained(folder / f"{family}-controlnet")
        model = pipe.transformer if family == "tiny-flux" else pipe.unet
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
        if family == "tiny-flux":
            save_lora(pipe, folder / f"{family}-lora", "style")
        else:
            pipe.save_lora_weights(
                folder / f"{family}-lora", unet_lora_layers=get_peft_model_state_dict(model, adapter_name="style")
            )
        adapter = ip_adapter(family, pipe)
        tensors = {f"{kind}.{name}": tensor for kind, part in adapter.items() for name, tensor in part.items()}
        save_file(tensors, folder / ("ip.safetensors" if family == "tiny-flux" else "ip-sdxl.safetensors"))
    image_encoder().save_pretrained(folder / "encoder")
    picture().save(folder / "square.png")
    picture(100, 200, seed=1).save(folder / "wide.png")
    return folder


def made(path):
    image = Image.open(path)
    return np.array(image), json.loads(image.text["parameters"])


def test_controlnet_ip_adapter_and_lora_from_the_command_line(parts, tmp_path, capsys):
    """All in one go."""
    out = tmp_path / "out.png"
    given = ["--controlnet", parts / "tiny-flux-controlnet", "--control-image", parts / "square.png",
             "--controlnet-conditioning-scale", 0.7, "--control-guidance-end", 0.9,
             "--ip-adapter", parts / "ip.safetensors", "--image-encoder", parts / "encoder",
             "--ip-adapter-image", parts / "square.png", "--ip-adapter-scale", 0.6,
             "--lora", f"{parts / 'tiny-flux-lora'}:0.5"]  # fmt: skip
    assert cli(*given, "--out", out) == 0
    pixels, record = made(out)
    digest = sha256(parts / "square.png")
    told = record["additions"]
    style = sha256(parts / "tiny-flux-lora" / "pytorch_lora_weights.safetensors")
    assert told["loras"] == [{"file": "tiny-flux-lora", "sha256": style, "weight": 0.5}]
    assert len(record["adapters"]) == 1
    assert told["control_images"] == [{"file": "square.png", "sha256": digest}] == told["ip_adapter_images"]
    assert told["controlnet_conditioning_scale"] == 0.7 and told["ip_adapter_scale"] == 0.6
    assert told["controlnets"][0]["source"].endswith("tiny-flux-controlnet")
    assert told["ip_adapters"] == [{"file": "ip.safetensors", "sha256": sha256(parts / "ip.safetensors")}]

    from diffusers import FluxControlNetModel

    backbone = load("tiny-flux", "cpu", weights="random")
    backbone = backbone.with_controlnets([FluxControlNetModel.from_pretrained(parts / "tiny-flux-controlnet")])
    backbone.pipe.register_modules(image_encoder=image_encoder())
    backbone.pipe.load_ip_adapter(str(parts), weight_name="ip.safetensors")
    backbone.pipe.set_ip_adapter_scale(0.6)
    backbone.pipe.load_lora_weights(parts / "tiny-flux-lora", adapter_name="style")
    backbone.pipe.set_adapters(["style"], [0.5])
    extras = {"control_image": picture(), "controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.9,
              "ip_adapter_image": picture()}  # fmt: skip
    (same,) = hires.generate(backbone, PROMPT, height=192, width=192, **extras, **FAST)
    assert np.array_equal(pixels, np.array(same))

    capsys.readouterr()  # progress bars
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(parts / "tiny-flux-lora" / "pytorch_lora_weights.safetensors", moved)
    again = ["show", str(out), "--again", str(tmp_path / "again.png"), "--device", "cpu"]
    few = ["--with", parts / "ip.safetensors", "--with", parts / "encoder", "--with", parts / "square.png"]
    assert main([*again, *map(str, few)]) == 2
    told = capsys.readouterr().err
    assert f"made with 'tiny-flux-lora' with sha256 {style}, not in the image" in told and told.count("\n") == 1
    assert main([*again, *map(str, few), "--with", str(moved)]) == 0
    assert capsys.readouterr().out.endswith("the same pixels\n")
    assert made(tmp_path / "again.png")[1]["adapters"] == record["adapters"]
    assert main([*again, *map(str, few), "--with", str(moved), "--with", str(out)]) == 2
    assert f"--with {out}: the record names nothing of its sha256" in capsys.readouterr().err


def test_additions_to_sdxl(parts, tmp_path):
    outs = []
    cases = {
        "plain": [],
        "lora": ["--lora", parts / "tiny-sdxl-lora"],
        "controlnet": ["--controlnet", parts / "tiny-sdxl-controlnet", "--control-image", parts / "square.png"],
        "ip": ["--ip-adapter", parts / "ip-sdxl.safetensors", "--image-encoder", parts / "encoder",
               "--ip-adapter-image", parts / "square.png"],
        "negative": ["--negative-prompt", "a grey cone"],
    }  # fmt: skip
    for name, given in cases.items():
        out = tmp_path / f"{name}.png"
        assert cli(*given, "--out", out, model="tiny-sdxl") == 0
        outs.append(made(out)[0])
    assert all(not np.array_equal(outs[0], other) for other in outs[1:])


def test_several_images_of_a_cut_picture(parts, tmp_path, capsys):
    out = tmp_path / "many.png"
    assert cli("--image", parts / "wide.png", "--crop", "--images", 2, "--seed", 5, "--out", out) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "many-5.png"), str(tmp_path / "many-6.png")]
    backbone = load("tiny-flux", "cpu", weights="random")
    for seed in (5, 6):
        pixels, record = made(tmp_path / f"many-{seed}.png")
        image = picture(100, 200, seed=1)
        (same,) = hires.generate(backbone, PROMPT, height=192, width=192, seed=seed, image=image, crop=True, **FAST)
        assert record["seed"] == seed and record["additions"] == {"crop": True}
        assert np.array_equal(pixels, np.array(same))
    again = ["--again", str(tmp_path / "again.png"), "--image", str(parts / "wide.png"), "--device", "cpu"]
    assert main(["show", str(tmp_path / "many-5.png"), *again]) == 0


def test_previews_are_drawn_in_a_terminal(tmp_path, monkeypatch, capsys):
    assert cli("--preview", "--out", tmp_path / "out.png") == 2
    assert "--preview draws in a terminal" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli("--preview", "--out", tmp_path / "out.png") == 0
    drawn = capsys.readouterr().err
    assert drawn.count("▀") == 64 * 32 and "\x1b[0m" in drawn


def test_a_cell_holds_two_pixels():
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 9]], [[0, 255, 0], [1, 2, 3]]], np.uint8))
    assert blocks(image, 2) == (
        "\x1b[38;2;255;0;0;48;2;0;255;0m▀\x1b[38;2;0;0;9;48;2;1;2;3m▀\x1b[0m"
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--offload", "modle"], "did you mean 'model'"),
        (["--offload", "group"], "the device is cpu"),
        (["--images", "0"], "--images 0: allowed: 1 or more"),
        (["--negative-prompt", "blurry"], "true_cfg_scale above 1"),
        (["--image", "{wide}"], "centre of 100x100 (crop=True, --crop)"),
        (["--image", "{square}", "--strength", "1.5"], "strength 1.5: allowed: above 0, up to 1"),
        (["--image", "{square}", "--strength", "nan"], "strength nan"),
        (["--image", "{broken}"], "can't be read"),
        (["--control-image", "{broken}"], "can't be read"),
        (["--control-image", "{square}"], "acts on --controlnet, of which there is none"),
        (["--controlnet", "{flux-controlnet}"], "0 control images for 1 ControlNets"),
        (["--controlnet", "{sdxl-controlnet}", "--control-image", "{square}"], "takes a FluxControlNetModel"),
        (["--controlnet", "{encoder}", "--control-image", "{square}"], "holds a None"),
        (["--controlnet", "{flux-controlnet}", "--control-image", "{wide}"], "control image is 100x200"),
        (["--ip-adapter-image", "{square}"], "acts on --ip-adapter, of which there is none"),
        (["--control-mode", "3"], "--control-mode 3: acts on --controlnet, of which there is none"),
        (["--control-guidance-end", ".5"], "--control-guidance-end 0.5: acts on --controlnet"),
        (["--ip-adapter-scale", ".5"], "--ip-adapter-scale 0.5: acts on --ip-adapter"),
        (["--image-encoder", "{encoder}"], "encoder: acts on --ip-adapter"),
        (["--crop"], "crop cuts your own and control images, and there is none"),
        (["--ip-adapter", "{ip}"], "name it with --image-encoder"),
        (["--ip-adapter", "{square}", "--image-encoder", "{encoder}"], "give a safetensors file"),
        (["--ip-adapter", "{ip}", "--image-encoder", "{encoder}"], "0 IP-Adapter images for 1 loaded"),
        (["--ip-adapter", "{sdxl-lora}", "--image-encoder", "{encoder}"], "does not fit this model"),
        (["--ip-adapter", "{ip}", "--image-encoder", "{flux-controlnet}"], "does not fit this model"),
        (["--lora", "{sdxl-lora}"], "is of another architecture"),
        (["--lora", "{flux-lora}:heavy"], "PATH:WEIGHT"),
        (["--lora", "nowhere.safetensors"], "no such file"),
        (["--lora", "{broken}"], "no safetensors file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(parts, tmp_path, capfd, arguments, message):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot one")
    places = {
        "wide": parts / "wide.png", "square": parts / "square.png", "broken": tmp_path / "broken.png",
        "ip": parts / "ip.safetensors", "encoder": parts / "encoder",
    }  # fmt: skip
    for family in ("flux", "sdxl"):
        places[f"{family}-controlnet"] = parts / f"tiny-{family}-controlnet"
        places[f"{family}-lora"] = parts / f"tiny-{family}-lora" / "pytorch_lora_weights.safetensors"
    given = [text.format(**places) for text in arguments]
    assert cli(*given, "--out", tmp_path / "out.png") == 2
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert message in lines[-1] and lines[-1].startswith("hires generate: ") and captured.out == ""
    assert len(lines) == 1 and not (tmp_path / "out.png").exists()


def test_a_lora_of_flux_on_sdxl_is_refused(parts, tmp_path, capsys):
    assert cli("--lora", parts / "tiny-flux-lora", "--out", tmp_path / "out.png", model="tiny-sdxl") == 2
    assert "LoRA" in capsys.readouterr().err


def test_offloading_is_done_last():
    """After what `prepare` adds, so that this is offloaded too."""
    seen = []

    def prepare(backbone):
        backbone = backbone.with_controlnets([controlnet("tiny-flux", backbone.pipe)])
        seen.append(hasattr(backbone.pipe.transformer, "_hf_hook"))
        return backbone

    with pytest.raises(HiresError, match="the device is cpu"):
        load("tiny-flux", "cpu", weights="random", offload="model", prepare=prepare)
    assert seen == []
    backbone = load("tiny-flux", "cpu", weights="random", prepare=prepare)
    offload_parts(backbone.pipe, "model", torch.device("cpu"))
    assert seen == [False] and hasattr(backbone.pipe.controlnet, "_hf_hook")
    options = {"height": 192, "width": 192, **FAST}
    (one,) = hires.generate(backbone, PROMPT, control_image=picture(), **options)
    (two,) = hires.generate(wrapped(build_pipeline("tiny-flux"), "tiny-flux"), PROMPT, **options)
    assert not np.array_equal(np.array(one), np.array(two))
