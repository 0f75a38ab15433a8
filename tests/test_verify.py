"""hires verify: what it notices, on a small complete run with untrained models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from hires import layout
from hires.cli import main
from hires.config import load_config
from hires.files.storage import read_json, write_json
from hires.models import HINTS, build_pipeline
from hires.stages import VERSIONS

CONFIG = """
name: small
prompts: {n: 2, scenes: {pool: 8}}
backbones:
  flux: {model: model, base_resolution: 128, size_multiple: 32, sampling: {num_inference_steps: 2, tau: 500}}
studies:
  main: {backbones: [flux], variants: [upsample, npa+sg], sizes: {192x192: 2}}
compute: {shard_size: 1, device: cpu}
metrics: {bootstrap: 5, kid_subset_size: 2, kid_subsets: 2, patch: {per_image: 1}}
"""
ROOT = Path("results/small")
PLACE = "images/main/default/flux/npa+sg/192x192"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    build_pipeline("tiny-flux").save_pretrained(folder / "model")
    write_json(folder / "model/hires.json", HINTS["tiny-flux"])
    (folder / "small.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "--config", "small.yaml"]) == 0
    return folder


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A copy of the finished folder, now the working directory."""
    shutil.copytree(finished / "results", tmp_path / "results")
    shutil.copytree(finished / "model", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def verify(place, capsys):
    def run(*arguments, folder=ROOT):
        code = main(["verify", str(folder), *map(str, arguments)])
        return code, capsys.readouterr().out.splitlines()

    return run


def image(suffix=".png"):
    return sorted((ROOT / PLACE).glob(f"*{suffix}"))[0]


def edit(file, change):
    """Change a JSON record, as a program that knows nothing of its digest would, and drop the digest."""
    record = read_json(file)
    record.pop("digest", None)
    change(record)
    write_json(file, record)


def test_a_run_is_as_it_was_made(verify, place, tmp_path_factory):
    code, lines = verify()
    assert code == 0 and len(lines) == 1
    listed = [path for path in ROOT.rglob("*") if path.is_file() and "logs" not in path.parts]
    aside = [path for path in listed if path.name in (".lock", "SHA256SUMS") or path.name.endswith(".png.json")]
    aside += ROOT.glob("base/**/*.safetensors.json")
    assert lines == [f"results/small: {len(listed) - len(aside)} files, all as they were made"]
    moved = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(ROOT, moved)
    code, lines = verify(folder=moved)
    assert code == 0 and lines[0].endswith("all as they were made")


def test_the_list_is_one_of_sha256sum(place):
    assert subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "file",
    ["prompts.parquet", "prompts/scenes.parquet", "metrics.parquet", "report.html", "config.yaml", "provenance.json",
     f"{PLACE}/*.png", "base/flux/*/*.safetensors", "references/192x192/*.png", f"{PLACE}/shard-000.json",
     "features/main/default/flux/upsample/192x192.safetensors", "scores/main/default/flux/upsample/192x192.parquet"],
)  # fmt: skip
def test_one_flipped_bit_and_one_lost_file_are_told(verify, file):
    path = sorted(ROOT.glob(file))[0]
    name = path.relative_to(ROOT).as_posix()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, lines = verify()
    assert code == 1 and f"changed: {name}" in lines
    path.unlink()
    code, lines = verify()
    assert code == 1 and f"missing: {name}" in lines


def test_what_is_listed_nowhere_is_told(verify):
    (ROOT / "tables").mkdir()
    (ROOT / "tables/mine.md").write_text("| a |")
    shutil.copy(image(), ROOT / PLACE / "copy.png")
    (ROOT / "logs").mkdir()
    (ROOT / "logs/run.log").write_text("aside")
    code, lines = verify()
    assert code == 1
    assert lines[:2] == [f"extra: {PLACE}/copy.png", "extra: tables/mine.md"]
    assert lines[2].startswith("results/small: 2 differences in ") and lines[2].endswith(" files: 2 extra")


def test_an_image_that_was_exchanged_together_with_its_record_is_told(verify):
    first, second = sorted((ROOT / PLACE).glob("*.png"))
    for suffix in ("", ".json"):
        shutil.copy(f"{second}{suffix}", f"{first}{suffix}")
    code, lines = verify()
    name = first.relative_to(ROOT)
    assert code == 1 and {f"changed: {name}", f"other: {name}: made from other settings, prompts or models"} <= {*lines}
    assert any(line.startswith(f"changed: {name}.json: the manifest states another hash") for line in lines)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda m: m.update(version=0), f"made by version 0 of the stage images, not {VERSIONS['images']}"),
        (lambda m: m.update(version=99), f"made by version 99 of the stage images, not {VERSIONS['images']}"),
        (lambda m: m["provenance"][0].update(commit="abc", dirty=True), "made by commit abc with local changes, not "),
        (lambda m: m["provenance"][0].update(hires="9.9"), "made by hires 9.9, not 0.1.0"),
        (lambda m: m["provenance"][0].update(revision="abc"), "made with another revision or other files of 'model'"),
        (lambda m: m["images"][0].update(file="../../escape.png"), "images.0.file: string should match pattern"),
        (lambda m: m.update(tempo=1), "tempo: extra inputs are not permitted: hires 0.1.0 wrote it, this is 0.1.0"),
    ],
)
def test_shards_that_something_else_made_are_told(verify, change, told):
    edit(ROOT / PLACE / "shard-000.json", change)
    code, lines = verify()
    assert code == 1
    assert [line for line in lines if line.startswith(f"other: {PLACE}/shard-000.json: {told}")]
    assert not [line for line in lines if line.startswith("extra")]


def test_another_configuration_is_told(verify):
    text = (ROOT / "config.yaml").read_text()
    (ROOT / "config.yaml").write_text(text.replace("num_inference_steps: 2", "num_inference_steps: 3"))
    code, lines = verify()
    assert code == 1 and "changed: config.yaml" in lines
    assert "other: provenance.json: made from another configuration than config.yaml" in lines
    made = [line for line in lines if line.endswith("made from other settings, prompts or models")]
    assert len(made) == 4
    (ROOT / "config.yaml").write_text(text.replace("num_inference_steps", "steps"))
    code, lines = verify()
    assert code == 1
    (told,) = [line for line in lines if line.startswith("other: config.yaml: hires 0.1.0 wrote it, this is 0.1.0: ")]
    assert "unknown key 'steps'" in told


def test_another_model_is_told(verify):
    shutil.copy("model/model_index.json", "model/more.json")
    from hires.stages import models

    models._content.cache_clear()
    code, lines = verify()
    assert code == 1
    assert "other: provenance.json: backbone 'flux': made with other files of 'model' than are here" in lines


def test_images_are_made_again(verify):
    code, lines = verify("--again", 2, "--device", "cpu")
    assert code == 0
    assert [line.split(": ")[0] for line in lines[:2]] == ["again", "again"]
    assert all(line.endswith(": the same pixels") for line in lines[:2])
    assert verify("--again", 2, "--device", "cpu")[1] == lines
    for file in (ROOT / "images").rglob("*.png"):  # a pixel changed, its record kept, and every hash renewed
        picture = Image.open(file)
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", picture.text["parameters"])
        picture.putpixel((3, 3), (255, 0, 255))
        picture.save(file, pnginfo=info)
    code, lines = verify("--again", 1, "--device", "cpu")
    assert code == 1 and any(line.startswith("again: ") and "of the pixels differ" in line for line in lines)


def test_bad_input_is_refused_in_a_line(place, capsys):
    for arguments, told in [
        (["nowhere"], "nowhere is no folder"),
        (["model"], "model holds no SHA256SUMS: finish the run first"),
        ([str(ROOT), "--again", "-1"], "--again -1: give a number of images"),
    ]:
        assert main(["verify", *arguments]) == 2
        captured = capsys.readouterr()
        assert told in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    (ROOT / "SHA256SUMS").write_text("../../etc/passwd\n")
    assert main(["verify", str(ROOT)]) == 2
    assert "SHA256SUMS, line 1: no line of sha256sum's" in capsys.readouterr().err


def test_the_reference_is_checked_and_has_no_images(place, capsys):
    assert main(["promote", "results", "--from", str(ROOT)]) == 0
    capsys.readouterr()
    assert main(["verify", "results/reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "results/reference: no images here: only scores and records were checked"
    assert lines[1] == "results/reference: 7 files, all as they were made"
    assert main(["verify", "results/reference", "--again", "1"]) == 2
    assert "holds no images to make again" in capsys.readouterr().err
    write_json(Path("results/reference/provenance/small.json"), [])
    assert main(["verify", "results/reference"]) == 1
    assert "other: metrics.parquet: nothing says what made study 'main' of 'small'" in capsys.readouterr().out


def test_the_tracked_reference_is_whole():
    """Models may have changed since; files and records have not."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "hires.cli", "verify", "results/reference"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "other files of" not in line]
    assert done.returncode in (0, 1) and not done.stderr
    assert not [line for line in lines if line.startswith(("missing", "changed", "extra", "other"))], lines


def test_no_torch_is_needed_without_again(place):
    code = f"import sys; from hires.cli import main; main(['verify', '{ROOT}']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_manifests_are_reached_from_the_list(place):
    """Whatever a run made is listed in SHA256SUMS or in a manifest that stands there."""
    config = load_config(ROOT / "config.yaml")
    sums = (ROOT / "SHA256SUMS").read_text()
    for images in config.image_sets():
        for path in layout.image_shards(config, images):
            assert path.relative_to(ROOT).as_posix() in sums
    assert json.loads((ROOT / "provenance.json").read_text())["stages"]["checksums"] == 1
