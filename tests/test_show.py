"""`hires show`: the record of an image, and the image once more from it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from peft import LoraConfig
from PIL import Image, PngImagePlugin

import hires
from hires import layout
from hires.additions.lora import save_lora
from hires.cli import main
from hires.config import load_config
from hires.errors import HiresError
from hires.files.storage import write_json
from hires.models import HINTS, build_pipeline
from hires.stages import base, images, prompts

CPU = ("--device", "cpu")
FAST = ("--set=num_inference_steps=2", "--set=tau=500")


def generate(out, *args):
    command = ["generate", *CPU, "--weights", "random", "--prompt", "two red cubes", *FAST, "--out", out, *args]
    assert main(list(map(str, command))) == 0
    return out


def show(*args):
    return main(["show", *map(str, args)])


def rewritten(path, to, change):
    """A copy of an image whose record is `change`d in place."""
    image = Image.open(path)
    record = json.loads(image.text["parameters"])
    change(record)
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", json.dumps(record))
    image.save(to, pnginfo=info)
    return to


@pytest.fixture(scope="module")
def cubes(tmp_path_factory):
    """Scalediff by way of 256² to 320 x 320, every stage written."""
    out = tmp_path_factory.mktemp("cubes") / "cubes.png"
    return generate(out, "--size", 320, "--seed", 7, "--all-stages", "--set=prompt_suffix=, sharp\n")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A picture of one's own, and what was made from it."""
    folder = tmp_path_factory.mktemp("mine")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)).save(folder / "mine.png")
    return folder / "mine.png", generate(folder / "out.png", "--size", 192, "--image", folder / "mine.png",
                                         "--strength", 1)  # fmt: skip


def test_the_record_in_words_and_as_it_is(cubes, capsys):
    assert show(cubes) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["model", "tiny-flux"] in lines and ["prompt", "two red cubes"] in lines and ["seed", "7"] in lines
    assert ["tau", "500.0"] in lines and ["lfm", "true"] in lines and ["prompt_suffix", '", sharp\\n"'] in lines
    assert "strength" not in dict(line for line in lines if len(line) == 2)  # null in the record
    assert show(cubes, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Image.open(cubes).text["parameters"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_error(cubes, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hires", "show", str(cubes)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("stage", ["", "-base", "-stage-1"])
def test_every_stage_is_made_again(cubes, stage, tmp_path, capsys):
    file, again = cubes.with_stem(f"cubes{stage}"), tmp_path / "again.png"
    assert show(file, "--again", again, *CPU) == 0
    assert capsys.readouterr().out == f"{again}: the same pixels\n"
    assert np.array_equal(np.array(Image.open(again)), np.array(Image.open(file)))
    assert Image.open(again).text == Image.open(file).text


@pytest.mark.parametrize("options", [["--variant", "npa-direct"], ["--model", "tiny-sdxl", "--variant", "upsample"]])
def test_other_starts_and_families(options, tmp_path):
    file = generate(tmp_path / "out.png", "--size", "192x256", *options)
    assert show(file, "--again", tmp_path / "again.png", *CPU) == 0


def test_images_of_the_python_call_carry_their_record(tmp_path, capsys):
    backbone = hires.load("tiny-flux", device="cpu", weights="random")
    settings = {"height": 192, "width": 256, "num_inference_steps": 2, "tau": 500}
    made = hires.generate(backbone, ["a cone", "a ball"], "npa", seed=[3, 4], num_images_per_prompt=2, **settings)
    for image, prompt, seed in zip(made, ["a cone", "a cone", "a ball", "a ball"], [3, 4, 4, 5], strict=True):
        record = json.loads(image.info["parameters"])
        assert (record["prompt"], record["seed"], record["additions"]) == (prompt, seed, None)
    (alone,) = hires.generate(backbone, "a ball", "npa", seed=5, **settings)
    hires.save(alone, tmp_path / "ball.png")
    assert show(tmp_path / "ball.png", "--again", tmp_path / "again.png") == 0
    own = Image.fromarray(np.full((96, 128, 3), 90, np.uint8))
    (mine,) = hires.generate(backbone, "a ball", image=own, strength=0.5, **settings)
    hires.save(mine, tmp_path / "mine.png")
    told = json.loads(mine.info["parameters"])["additions"]["in_memory"]["image"]
    assert told == {"size": "96x128", "sha256": hashlib.sha256(own.tobytes()).hexdigest()}
    assert show(tmp_path / "mine.png", "--again", tmp_path / "again.png") == 2
    assert "made in Python with image, which isn't in the image" in capsys.readouterr().err
    with pytest.raises(HiresError, match="only PNG carries the parameters"):
        hires.save(mine, tmp_path / "mine.jpg")
    with pytest.raises(HiresError, match="this image has no record"):
        hires.save(own, tmp_path / "own.png")
    assert not (tmp_path / "own.png").exists()


def test_trained_weights_are_told_by_their_revision(tmp_path, capsys):
    command = ["generate", *CPU, "--prompt", "two red cubes", *FAST, "--size", "128", "--out", str(tmp_path / "a.png")]
    assert main(command) == 0
    assert show(tmp_path / "a.png", "--again", tmp_path / "b.png", *CPU) == 0
    capsys.readouterr()
    assert show(tmp_path / "a.png", "--again", tmp_path / "c.png", *CPU, "--model", "tiny-sdxl") == 2
    message = capsys.readouterr().err
    assert "tiny-sdxl" in message and "the record says" in message and message.count("\n") == 1
    assert not (tmp_path / "c.png").exists()


def test_the_own_picture_must_be_the_same(mine, tmp_path, capsys):
    picture, out = mine
    assert show(out, "--again", tmp_path / "again.png", "--image", picture, *CPU) == 0
    capsys.readouterr()
    other = tmp_path / "other.png"
    Image.new("RGB", (96, 96)).save(other)
    for options, message in (([], "'mine.png' with sha256"), (["--image", other], "but the record says"),
                             (["--image", tmp_path / "none.png"], "No such file")):  # fmt: skip
        assert show(out, "--again", tmp_path / "again.png", *options) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1


def test_other_pixels_are_told(cubes, tmp_path, capsys):
    changed = rewritten(cubes.with_stem("cubes-base"), tmp_path / "one.png", lambda record: record["versions"].update(
        torch="2.0"))  # fmt: skip
    image = Image.open(changed)
    text, pixels = image.text["parameters"], np.array(image)
    pixels[:32, :, 1] ^= 1
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.fromarray(pixels).save(changed, pnginfo=info)
    assert show(changed, "--again", tmp_path / "again.png", *CPU) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("25.00% of the pixels differ, by at most 1 of 255")
    assert second.startswith("torch was 2.0, is ")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.pop("dtype"), "lacks dtype: hires 0.1.0 wrote it"),
        (lambda r: r["sampling"].pop("tau"), "lacks sampling.tau"),
        (lambda r: r["variant_fields"].pop("sg"), "lacks variant_fields.sg"),
        (lambda r: r["sampling"].update(novelty=3), "states sampling.novelty, unknown here"),
        (lambda r: r.update(loras=["ink"]), "states loras, unknown here"),
        (lambda r: r.update(seed="seven"), "seed = 'seven'"),
        (lambda r: r["sampling"].update(gamma=None), "setting gamma"),
        (lambda r: r.update(model="tiny-flix"), "did you mean 'tiny-flux'"),
        (lambda r: r.update(revision="3f"), "give the folder of that revision with --model"),
        (lambda r: r.update(revision=None), "a pipeline in memory"),
    ],
)
def test_records_that_make_no_image(cubes, tmp_path, capsys, change, message):
    file = rewritten(cubes, tmp_path / "changed.png", change)
    assert show(file, "--again", tmp_path / "again.png", *CPU) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert show(file) == 0  # but can be read


def test_files_without_a_record(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.tiff")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no image")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a castle, Steps: 20, Sampler: Euler")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=info)
    for name, message in {
        "nowhere.png": "no such file", ".": "a folder", "plain.png": "no metadata", "plain.tiff": "no metadata",
        "photo.jpg": "a JPEG file", "text.png": "no image", "other.png": "metadata of another program",
    }.items():  # fmt: skip
        assert show(tmp_path / name) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--again", "out.jpg"], "ends with .png"),
        (["--again", "nowhere/out.png"], "does not exist"),
        (["--again", "cubes.png"], "choose another name"),
        (["--again", "out.png", "--image", "mine.png"], "the record names no picture"),
        (["--model", "tiny-flux"], "goes with --again"),
    ],
)
def test_options_that_make_no_sense(cubes, monkeypatch, capsys, options, message):
    monkeypatch.chdir(cubes.parent)
    assert show("cubes.png", *options) == 2
    assert message in capsys.readouterr().err


CONFIG = """
name: tested
prompts: {n: 1, scenes: {pool: 12}}
backbones:
  flux:
    model: model
    base_resolution: 128
    size_multiple: 32
    adapters: {scale-dit: lora}
    sampling: {num_inference_steps: 2, tau: 500}
variants: {jump: {attention: npa, lfm: true, stages: single}}
studies:
  main: {backbones: [flux], variants: [VARIANT], sizes: {192x192: 1}}
compute: {device: cpu, image_format: FORMAT}
"""


@pytest.mark.parametrize("image_format, variant", [("png", "jump"), ("tiff", "scale-dit")])
def test_images_of_a_configuration(tmp_path, monkeypatch, capsys, image_format, variant):
    monkeypatch.chdir(tmp_path)
    pipe = build_pipeline("tiny-flux")
    pipe.save_pretrained("model")
    write_json(tmp_path / "model/hires.json", HINTS["tiny-flux"])
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "scale-dit")
    save_lora(pipe, tmp_path / "lora", "scale-dit")
    text = CONFIG.replace("FORMAT", image_format).replace("VARIANT", variant)
    (tmp_path / "mine.yaml").write_text(text)
    config = load_config("mine.yaml")
    prompts.run(config)
    base.run(config, "flux", layout.base_sets(config)[0].name, 0)
    images.run(config, "main", "flux", 192, 192, 0)
    (file,) = config.root.glob(f"images/**/*.{image_format}")
    assert show(file) == 0
    assert ["variant", variant] in [line.split() for line in capsys.readouterr().out.splitlines()]

    assert show(file, "--again", "again.png", *CPU) == 2
    assert "give its file with --config" in capsys.readouterr().err
    (config.root / "config.yaml").write_text(text)  # as `hires run` leaves it
    assert show(file, "--again", "again.png", *CPU) == 0
    assert capsys.readouterr().out == "again.png: the same pixels\n"
    if variant == "scale-dit":
        another = build_pipeline("tiny-flux")
        another.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "scale-dit")
        shutil.move("lora", "former")
        save_lora(another, tmp_path / "lora", "scale-dit")
        assert show(file, "--again", "again.png", *CPU) == 2
        told = capsys.readouterr().err
        assert told.startswith("hires show: adapter 'scale-dit' is ") and "but the record says" in told
        shutil.rmtree("lora")
        shutil.move("former", "lora")
    if variant == "jump":  # the record of what was made again is complete, but for the place of an adapter
        assert show("again.png", "--again", "third.png", *CPU) == 0
    (tmp_path / "other.yaml").write_text(text.replace("flux:", "sdxl:").replace("[flux]", "[sdxl]"))
    assert show(file, "--again", "again.png", "--config", "other.yaml", *CPU) == 2
    assert "has no backbone 'flux'" in capsys.readouterr().err
