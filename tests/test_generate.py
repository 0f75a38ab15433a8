"""`hires.generate` and `hires generate`."""

import hashlib
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import hires
from hires.cli import COMMANDS, main
from hires.errors import HiresError
from hires.settings import Sampling
from hires.variants import VARIANTS, Variant

FAST = {"num_inference_steps": 2, "tau": 500}


@pytest.fixture(scope="module")
def backbone():
    return hires.load("tiny-flux", device="cpu", weights="random")


def cli(*args):
    return main(["generate", "--weights", "random", "--device", "cpu", "--prompt", "two red cubes",
                 *(f"--set={name}={value}" for name, value in FAST.items()), *map(str, args)])  # fmt: skip


@pytest.mark.parametrize("variant", [name for name, variant in VARIANTS.items() if variant.adapter is None])
def test_every_variant_makes_an_image(backbone, variant):
    (image,) = hires.generate(backbone, "two red cubes", variant, height=256, width=192, **FAST)
    assert image.size == (192, 256) and image.mode == "RGB"


@pytest.mark.parametrize("variant", ["scale-dit", "hybrid"])
def test_the_adapter_beside_the_model_acts(variant, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [caplog.handler])
    trained = hires.load("tiny-flux", device="cpu")
    on, off = (
        hires.generate(trained, "two red discs", variant, height=256, width=256, lr_adapter=adapter, **FAST)[0]
        for adapter in (True, False)
    )
    assert np.any(np.array(on) != np.array(off))
    assert "No LoRA keys" not in caplog.text


def test_several_prompts_are_as_alone(backbone):
    both = hires.generate(backbone, ["a cone", "a ball"], height=192, width=192, seed=[3, 4], **FAST)
    (alone,) = hires.generate(backbone, "a ball", height=192, width=192, seed=4, **FAST)
    difference = np.abs(np.array(both[1], dtype=int) - np.array(alone, dtype=int))
    assert difference.max() <= 1
    same = hires.generate(backbone, ["a ball", "a ball"], height=192, width=192, seed=4, **FAST)
    assert np.abs(np.array(same[0], dtype=int) - np.array(same[1], dtype=int)).max() <= 1


def test_own_variant_and_settings(backbone):
    own = Variant(attention="npa", stages="single")
    one, two = (
        hires.generate(backbone, "a cone", own, height=192, width=192, text_rows=rows, **FAST)[0]
        for rows in ("patch", "global")
    )
    assert np.any(np.array(one) != np.array(two))


def test_own_image(backbone):
    image = Image.fromarray(np.full((96, 160, 3), 90, np.uint8))
    made = hires.generate(backbone, "a cone", height=192, width=320, image=image, strength=0.5, **FAST)
    assert made[0].size == (320, 192)
    with pytest.raises(HiresError, match="aspect ratios must agree"):
        hires.generate(backbone, "a cone", height=192, width=192, image=image, **FAST)
    with pytest.raises(HiresError, match="takes no image"):
        hires.generate(backbone, "a cone", "direct", height=192, width=320, image=image, **FAST)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "scalediv"}, "did you mean 'scalediff'"),
        ({"tua": 3}, "did you mean 'tau'"),
        ({"num_image_per_prompt": 2}, "did you mean 'num_images_per_prompt'"),
        ({"generator": torch.Generator()}, "'generator' is diffusers': give seed"),
        ({"callback_on_step_end": print}, "give callback"),
        ({"tau": 2000}, "tau = 2000"),
        ({"height": 200}, "nearest allowed sizes"),
        ({"prompt": []}, "no prompt"),
        ({"seed": [1, 2]}, "give one seed per prompt"),
    ],
)
def test_bad_input_is_one_line(backbone, options, message):
    with pytest.raises(HiresError, match=message) as error:
        hires.generate(backbone, **{"prompt": "a cone", "height": 192, "width": 192, **FAST, **options})
    assert "\n" not in str(error.value)


def test_a_pipeline_is_no_backbone_yet(backbone):
    with pytest.raises(HiresError, match=r"FluxPipeline is no backbone: give hires\.Backbone\.from_pipeline\(pipe\)"):
        hires.generate(backbone.pipe, "a cone", height=192, width=192)


def test_seeds_of_numpy(backbone):
    (image,) = hires.generate(backbone, "a cone", height=128, width=128, seed=np.int64(3), **FAST)
    assert json.loads(image.info["parameters"])["seed"] == 3


def test_every_stage_has_the_pipelines_progress_bar(backbone, capsys):
    size = {"height": 256, "width": 256, "num_inference_steps": 2, "tau": 900}
    backbone.pipe.set_progress_bar_config(ncols=60)
    hires.generate(backbone, "a red ball on snow", **size)
    told = capsys.readouterr().err
    assert "base: 100%" in told and "stage-1: 100%" in told and told.count("2/2") == 2
    backbone.pipe.set_progress_bar_config(disable=True)
    hires.generate(backbone, "a red ball on snow", **size)
    assert capsys.readouterr().err == ""


def test_a_backbone_says_what_it_is(backbone):
    assert repr(backbone) == "<Flux 'tiny-flux': base 128x128, sides in multiples of 32, float32 on cpu>"


def test_command_writes_an_image_that_tells_how_it_was_made(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    out = tmp_path / "cubes.png"
    assert cli("--size", "256x192", "--seed", 7, "--variant", "npa", "--out", out) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n" and captured.err == ""
    image = Image.open(out)
    assert image.size == (192, 256)
    record = json.loads(image.text["parameters"])
    assert {name: record[name] for name in ("model", "revision", "prompt", "seed", "variant", "height", "width")} == {
        "model": "tiny-flux", "revision": "random", "prompt": "two red cubes", "seed": 7, "variant": "npa",
        "height": 256, "width": 192,
    }  # fmt: skip
    assert record["sampling"]["tau"] == 500 and record["sampling"]["guidance_scale"] == 2.0
    assert record["versions"]["hires"] == hires.__version__
    # The record is enough to make the image again.
    backbone = hires.load(record["model"], device="cpu", weights="random")
    settings = {name: value for name, value in record["sampling"].items() if value is not None}
    again = hires.generate(backbone, record["prompt"], Variant(**record["variant_fields"]), height=record["height"],
                           width=record["width"], seed=record["seed"], **settings)  # fmt: skip
    assert np.array_equal(np.array(again[0]), np.array(image))
    assert record["image"] is None
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_the_small_models_tell_which_words_they_never_saw(tmp_path, capsys):
    told = {}
    for prompt in ("Three red rings, on a brick wall", "a red cat"):
        command = ["generate", "--device", "cpu", "--prompt", prompt, "--size", "128", "--set=num_inference_steps=1"]
        assert main([*command, "--out", str(tmp_path / "out.png")]) == 0
        told[prompt] = capsys.readouterr().err
    known, strange = told.values()
    assert known == "" and strange.startswith("note: tiny-flux never saw cat; it knows: a, above, ")


def test_the_record_knows_the_own_image_by_its_digest(tmp_path, capsys):
    mine, out = tmp_path / "mine.png", tmp_path / "out.png"
    Image.new("RGB", (96, 96), "teal").save(mine)
    assert cli("--size", "192", "--image", mine, "--strength", "0.5", "--out", out) == 0
    record = json.loads(Image.open(out).text["parameters"])
    assert record["image"] == {"file": "mine.png", "sha256": hashlib.sha256(mine.read_bytes()).hexdigest()}


def test_settings_are_taken_as_they_stand(tmp_path):
    out = tmp_path / "out.png"
    given = {"prompt_suffix": ", sharp: 8k [", "random_shift": "true", "text_rows": "global", "view_batch": "2"}
    arguments = [f"--set={name}={value}" for name, value in given.items()]
    assert cli("--size", 128, "--out", out, *arguments) == 0
    sampling = json.loads(Image.open(out).text["parameters"])["sampling"]
    assert {name: sampling[name] for name in given} == given | {"random_shift": True, "view_batch": 2}


def test_a_write_that_fails_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "out.png"
    out.mkdir()
    assert cli("--size", 128, "--out", out) == 2
    assert f"cannot write {out}" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [out]


def test_command_writes_all_stages_of_my_image(tmp_path):
    mine = tmp_path / "mine.jpg"
    Image.fromarray(np.full((200, 200, 3), 90, np.uint8)).save(mine)
    out = tmp_path / "out.png"
    assert cli("--size", 384, "--image", mine, "--strength", 0.5, "--all-stages", "--out", out) == 0
    sizes = {path.name: Image.open(path).size[0] for path in tmp_path.glob("*.png")}
    assert sizes == {"out.png": 384, "out-base.png": 128, "out-stage-1.png": 256, "out-stage-2.png": 384}
    assert np.array_equal(np.array(Image.open(out)), np.array(Image.open(tmp_path / "out-stage-2.png")))
    assert json.loads(Image.open(out).text["parameters"])["strength"] == 0.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "tiny-flix"], "did you mean 'tiny-flux'"),
        (["--size", "5l2"], "HEIGHTxWIDTH"),
        (["--size", "500"], "nearest allowed sizes"),
        (["--size", "96x512", "--variant", "npa-direct"], "larger than its grid"),
        (["--variant", "npa+sq"], "did you mean 'npa+sg'"),
        (["--set", "tau"], "NAME=VALUE"),
        (["--set", "low_pass=foo"], "low_pass = 'foo'"),
        (["--set", "tau=1200"], "less than or equal to 1000"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--strength", "0.5"], "--strength 0.5: how much of --image"),
        (["--out", "out.jpg"], "ends with .png"),
        (["--out", "nowhere/out.png"], "does not exist"),
    ],
)
def test_command_refuses_in_one_line(arguments, message, capsys):
    assert cli(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_wrong_arguments_are_told_before_torch_is_imported():
    command = "import sys; from hires.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    wrong = ["generate", "--prompt", "a cone", "--variant", "npa+sq"]
    done = subprocess.run([sys.executable, "-c", command, *wrong], capture_output=True, text=True)
    assert done.returncode == 0 and "did you mean 'npa+sg'" in done.stderr


def test_python_runs_the_package():
    done = subprocess.run([sys.executable, "-m", "hires", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"hires {hires.__version__}\n")


def test_without_a_command_help_is_shown(capsys):
    assert main([]) == 2 and "generate  make images from a prompt" in capsys.readouterr().err


def test_public_names_are_there_for_completion():
    command = "import hires; assert {*dir(hires)} == {*hires.__all__}; [getattr(hires, name) for name in dir(hires)]"
    subprocess.run([sys.executable, "-c", command], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_defaults_where_there_are_any(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "usage: hires" in told
    assert not any(f"(default: {nothing}" in told for nothing in ("None", "False", "[", "inf"))
    if command == "run":
        assert "(default: config/config.yaml)" in told


def test_help_of_generate_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    listed = {
        line.split()[0]
        for line in capsys.readouterr().out.partition("settings of --set")[2].splitlines()[1:]
        if line[2:3].strip()
    }
    assert listed >= {*Sampling.model_fields}
