"""Stages base, images, references, notebook, provenance and run: on a tiny untrained FLUX, 128² to 256²."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

import hires
from hires import layout, provenance, shards
from hires.cli import main
from hires.config import Config, load_config
from hires.data.pictures import Missing
from hires.data.pictures import contents as contents_of
from hires.data.prompts import Prompt, read_prompts
from hires.errors import HiresError
from hires.execution.threads import allowed
from hires.files.storage import read_json, sha256, write_json
from hires.metrics import load_clip, load_features
from hires.models import HINTS, build_clip, build_pipeline
from hires.scenes import reference_image, scene_of_url
from hires.stages import base, images, models, notebook, prompts, references

CONFIG = """
name: tested
prompts: {n: 3, scenes: {pool: 12}}
backbones:
  flux: {model: model, base_resolution: 128, size_multiple: 32, sampling: {num_inference_steps: 2, tau: 500}}
studies:
  main: {backbones: [flux], variants: [direct, npa+sg], sizes: {256x256: 3}}
compute: {shard_size: 2, batch_size: 2, device: cpu}
"""
PLACE = ("main", "flux", 256, 256)


def make(config, shard):
    (latents,) = layout.base_sets(config)
    base.run(config, "flux", latents.name, shard)
    images.run(config, *PLACE, shard)


def contents(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pictures(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith((".png", ".safetensors"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which both shards are done, with an untrained model in its folder `model`."""
    folder = tmp_path_factory.mktemp("finished")
    model = tmp_path_factory.mktemp("model")
    build_pipeline("tiny-flux").save_pretrained(model)
    write_json(model / "hires.json", HINTS["tiny-flux"])
    (folder / "model").symlink_to(model)
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = load_config("config.yaml")
        prompts.run(config)
        for shard in (0, 1):
            make(config, shard)
    return folder


@pytest.fixture
def config(finished, tmp_path, monkeypatch):
    """The configuration, in a copy of the finished folder that is now the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return load_config("config.yaml")


def test_manifests_say_what_was_made(config):
    for images_of in config.image_sets():
        listed = []
        for shard, path in enumerate(layout.image_shards(config, images_of)):
            manifest = read_json(path)
            assert {name: manifest[name] for name in ("study", "setting", "backbone", "variant")} == {
                "study": "main", "setting": "default", "backbone": "flux", "variant": images_of.variant
            }  # fmt: skip
            assert manifest["sampling"]["num_inference_steps"] == 2 and manifest["sampling"]["tau"] == 500
            assert len(manifest["images"]) == [2, 1][shard]
            for image in manifest["images"]:
                file = path.parent / image["file"]
                assert sha256(file) == image["sha256"]
                assert Image.open(file).size == (256, 256)
                assert image["seconds"] == pytest.approx(sum(s["seconds"] for s in image["stages"]), abs=1e-3)
            listed += [image["id"] for image in manifest["images"]]
        assert listed == [prompt.id for prompt in read_prompts(layout.prompts(config))]


def test_stages_of_a_cascade_include_the_stored_base(config):
    cascade, direct = (
        read_json(layout.image_shard(config, config.image_set("main", "default", "flux", variant, 256, 256), 0))
        for variant in ("npa+sg", "direct")
    )
    (latents,) = layout.base_sets(config)
    stored = read_json(layout.base_shard(config, latents, 0))["latents"][0]
    stages = cascade["images"][0]["stages"]
    assert [(s["name"], s["height"], s["steps"]) for s in stages] == [
        ("base", 128, 2), ("stage-1", 256, 1), ("decode", 256, 0)
    ]  # fmt: skip
    assert stages[0]["seconds"] == stored["seconds"]
    assert [(s["name"], s["steps"]) for s in direct["images"][0]["stages"]] == [("noise", 2), ("decode", 0)]


def test_images_are_those_of_the_library(config):
    """Stored base latents, batches and shards change nothing: `hires.generate` gives the same pixels, every variant
    those of the same noise."""
    backbone = models.load(config, "flux", "cpu")
    prompt = read_prompts(layout.prompts(config))[2]
    given, seed = config.sampling("main", "default", "flux").model_dump(exclude_unset=True), None
    for images_of in config.image_sets():
        found = Image.open(layout.image(config, images_of, prompt.id, 0))
        stated = json.loads(found.text["parameters"])["seed"]
        (expected,) = hires.generate(
            backbone, prompt.prompt, images_of.variant, height=256, width=256, seed=stated, **given
        )
        assert seed in (None, stated)
        seed = stated
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_each_prompt_has_noise_of_its_own(finished):
    """Shared by all variants, settings and sizes of a prompt and trial, and the same on every machine."""
    more = "sizes: {256x256: 3, 192x256: 2}, settings: {a: {}, b: {num_inference_steps: 3}}, seeds: [0, 1]"
    (finished / "more.yaml").write_text(CONFIG.replace("sizes: {256x256: 3}", more))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        config = load_config("more.yaml")
        drawn = [images.items(config, made, 0) for made in config.image_sets()]
        drawn += [base.items(config, made, 0) for made in layout.base_sets(config)]
        seeds = {(item.prompt.prompt, item.seed, item.noise_seed) for items in drawn for item in items}
    assert len(drawn) == 12 and len(seeds) == len({seed for *_, seed in seeds}) == 4
    assert shards.noise_seed("two green cones in the snow, näher", 1) == 4116963416


def test_a_job_runs_on_its_own_threads(config):
    before = torch.get_num_threads()
    models.load(load_config("config.yaml", {"compute": {"threads": before + 1}}), "flux", "cpu")
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_base_latents(config):
    (latents,) = layout.base_sets(config)
    for prompt in read_prompts(layout.prompts(config)):
        (tensor,) = load_file(layout.base_latents(config, latents, prompt.id, 0)).values()
        assert tuple(tensor.shape) == (1, 16, 16, 16) and tensor.isfinite().all()


def test_an_image_says_how_it_was_made(config):
    prompt = read_prompts(layout.prompts(config))[0]
    file = layout.image(config, config.image_set("main", "default", "flux", "npa+sg", 256, 256), prompt.id, 0)
    parameters = json.loads(Image.open(file).text["parameters"])
    seed = shards.noise_seed(prompt.prompt, 0)
    assert parameters["prompt"] == prompt.prompt and parameters["seed"] == seed and parameters["variant"] == "npa+sg"
    assert parameters["sampling"]["tau"] == 500 and parameters["model"] == "model"


def test_tiff_holds_the_same_picture(config):
    file = layout.image(config, config.image_sets()[0], read_prompts(layout.prompts(config))[0].id, 0)
    picture = Image.open(file)
    tiff = Image.open(io.BytesIO(images.encode(picture, "tiff", {"seed": 3})))
    assert np.array_equal(np.asarray(tiff), np.asarray(picture)) and json.loads(tiff.tag_v2[270]) == {"seed": 3}


def test_a_second_run_touches_nothing(config, capfd):
    before = {path: path.stat().st_mtime_ns for path in Path("results").rglob("*") if path.is_file()}
    for shard in (0, 1):
        make(config, shard)
    assert {path: path.stat().st_mtime_ns for path in Path("results").rglob("*") if path.is_file()} == before
    assert capfd.readouterr().err.splitlines()[1].startswith("images main flux 256x256 shard 0: 0 of 4 made, 4 kept, ")


def test_finished_work_needs_no_model(config):
    """Nothing heavy is imported when nothing is to be made."""
    code = (
        "import sys; from hires.cli import main;"
        "code = main('images --config config.yaml --study main --backbone flux --size 256x256 --shard 0'.split());"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0 False\n"


def test_deleted_manifests_come_back_byte_for_byte(config):
    before = contents(Path("results"))
    for path in Path("results/tested/images").rglob("shard-*.json"):
        path.unlink()
    images.run(config, *PLACE, 0)
    images.run(config, *PLACE, 1)
    assert contents(Path("results")) == before


def test_damaged_and_missing_images_are_made_again(config):
    before = pictures(Path("results"))
    first, second, third = sorted(Path("results/tested/images/main/default/flux/npa+sg").rglob("*.png"))
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    third.with_name(f"{third.name}.json").unlink()
    for shard in (0, 1):
        make(config, shard)
    assert pictures(Path("results")) == before


def test_a_batch_is_the_same_whatever_was_finished(config):
    """One of a batch of two is missing: both are computed, one is written."""
    before = pictures(Path("results"))
    file = layout.image(config, config.image_sets()[1], read_prompts(layout.prompts(config))[1].id, 0)
    file.unlink()
    times = {path: path.stat().st_mtime_ns for path in Path("results").rglob("*.png")}
    images.run(config, *PLACE, 0)
    assert pictures(Path("results")) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    items = [shards.Item(prompt, 0, Path(prompt.id), "", 1) for prompt in read_prompts(layout.prompts(config))]
    assert [len(batch) for batch, _ in shards.batches(items, 2)] == [2, 1]


def test_another_setting_makes_other_images(config):
    before = contents(Path("results/tested/images"))
    edited = load_config("config.yaml", {"studies": {"main": {**CONFIG_STUDY, "settings": {"default": {"tau": 1000}}}}})
    images.run(edited, *PLACE, 0, variants=["npa+sg"])
    changed = {name for name, data in contents(Path("results/tested/images")).items() if before[name] != data}
    shard = {
        image["file"]
        for image in read_json(Path("results/tested/images/main/default/flux/npa+sg/256x256/shard-000.json"))["images"]
    }
    assert {Path(name).name for name in changed if name.endswith(".png")} == shard
    assert all("npa+sg" in name for name in changed)


CONFIG_STUDY = {"backbones": ["flux"], "variants": ["direct", "npa+sg"], "sizes": {"256x256": 3}}


def unfinished(config):
    """Remove all images; returns what they were."""
    before = pictures(Path("results"))
    shutil.rmtree("results/tested/images")
    return before


SHARD = "images --config config.yaml --study main --backbone flux --size 256x256 --shard"


def start_shard(shard, **options):
    command = [sys.executable, "-m", "hires.cli", *SHARD.split(), str(shard)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on(config, how):
    before = unfinished(config)
    # A test run in the background ignores Ctrl-C, and so would its children.
    child = start_shard(0, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 120
    while not list(Path("results/tested/images").rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(how)
    _, err = child.communicate()
    kept = {path: path.stat().st_mtime_ns for path in Path("results/tested/images").rglob("*.png")}
    assert child.returncode != 0 and 0 < len(kept) < 4
    if how == signal.SIGINT:
        assert child.returncode == 130 and err == "hires images: interrupted; finished work is kept\n"
    assert not list(Path("results/tested/images").rglob("shard-*.json"))
    for path in kept:
        Image.open(path).load()
    recorded = [path for path in kept if path.with_name(f"{path.name}.json").exists()]
    for shard in (0, 1):
        images.run(config, *PLACE, shard)
    assert pictures(Path("results")) == before
    assert all(path.stat().st_mtime_ns == kept[path] for path in recorded)
    assert not list(Path("results").rglob("*.part"))


def test_a_full_disk_is_told_in_one_line(config):
    before = unfinished(config)
    images.run(config, *PLACE, 0)
    first = contents(Path("results"))
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # or a module is written in part, and read as whole
    child = start_shard(1, preexec_fn=limit, env=environment)
    _, err = child.communicate()
    assert child.returncode == 2
    assert err.startswith("hires images: cannot write results/tested/images/main") and err.count("\n") == 1
    assert contents(Path("results")) == first
    images.run(config, *PLACE, 1)
    assert pictures(Path("results")) == before


def test_missing_base_latents_are_named(config, capsys):
    shutil.rmtree("results/tested/base")
    shutil.rmtree("results/tested/images/main/default/flux/npa+sg")
    assert main([*SHARD.split(), "0"]) == 2
    assert "hires base" in capsys.readouterr().err


def test_wrong_names_are_refused(config, capsys):
    for arguments, answer in (
        ("--study mein --backbone flux --size 256x256 --shard 0", "did you mean 'main'?"),
        ("--study main --backbone flax --size 256x256 --shard 0", "did you mean 'flux'?"),
        ("--study main --backbone flux --size 256x265 --shard 0", "did you mean '256x256'?"),
        ("--study main --backbone flux --size 256x256 --shard 2", "shards 0 to 1"),
        ("--study main --backbone flux --size 256x256 --shard 0 --variant npa-sg", "did you mean 'npa+sg'?"),
    ):
        assert main(["images", "--config", "config.yaml", *arguments.split()]) == 2
        err = capsys.readouterr().err
        assert answer in err and err.count("\n") == 1


def test_everything_runs_without_snakemake(finished, tmp_path, monkeypatch, capfd):
    """One process gives the files that single stages give; a second run makes only pages again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(finished / "model")
    write_notebook_folder(tmp_path / "notebooks")
    for part in build_clip():
        part.save_pretrained(tmp_path / "assets/tiny-clip")
    monkeypatch.setattr("hires.models.ASSETS", tmp_path / "assets")
    load_clip.cache_clear(), load_features.cache_clear()
    metrics = "metrics: {bootstrap: 10, kid_subset_size: 2, kid_subsets: 2, patch: {per_image: 1}}"
    (tmp_path / "config.yaml").write_text(f"{CONFIG}\n{metrics}\nnotebooks: {{summary: {{word: done}}}}\n")
    try:
        assert main(["run", "--config", "config.yaml"]) == 0
        before = {path: path.stat().st_mtime_ns for path in Path("results").rglob("*") if path.is_file()}
        assert main(["run", "--config", "config.yaml"]) == 0
    finally:
        load_clip.cache_clear(), load_features.cache_clear()
    config = load_config("config.yaml")
    made = pictures(Path("results/tested"))
    assert made.items() >= pictures(finished / "results/tested").items()
    after = {path: path.stat().st_mtime_ns for path in Path("results").rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} - {config.root / ".lock"} == {
        layout.report(config), layout.provenance(config), layout.checksums(config)
    }  # fmt: skip
    record = read_json(layout.provenance(config))
    assert record["images"]["n"] == 6 and record["models"]["flux"]["model"] == "model"
    assert provenance.config_data(config) == record["configuration"] and len(record["runs"]) >= 1
    assert "done" in layout.notebook(config, "summary").read_text()
    assert str(tmp_path) not in layout.provenance(config).read_text()


def write_notebook_folder(folder):
    folder.mkdir()
    write_notebook(folder / "summary.ipynb", 'results = ""\nword = ""', "print(word)")


# references


def test_references_are_the_true_scenes(config):
    references.run(config, 256, 256)
    manifest = read_json(layout.reference_manifest(config, 256, 256))
    listed = read_prompts(layout.prompts(config))
    assert [image["id"] for image in manifest["images"]] == [prompt.id for prompt in listed] and not manifest["missing"]
    for prompt in listed:
        found = Image.open(layout.reference(config, 256, 256, prompt.id))
        expected = reference_image(scene_of_url(prompt.url), 256, 256)
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    before = contents(Path("results/tested/references"))
    references.run(config, 256, 256)
    assert contents(Path("results/tested/references")) == before
    with pytest.raises(HiresError, match="256x256"):
        references.run(config, 256, 128)


@pytest.fixture
def server(tmp_path_factory):
    """A web server on this machine: (its folder, its address)."""
    folder = tmp_path_factory.mktemp("web")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_photographs_are_cut_around_their_centre(server):
    folder, address = server
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, 20:80] = (200, 100, 50)
    Image.fromarray(pixels).save(folder / "wide.png")
    (folder / "page.html").write_text("no image")
    web = contents_of(None, private=True)

    def made(name, height, width, read=web):
        prompt = Prompt(0, "00", "a picture", f"{address}/{name}", None, None, None)
        return references.reference(prompt, height, width, read)

    found, origin = made("wide.png", 30, 30)
    assert origin == {"source_sha256": sha256(folder / "wide.png")}
    assert found.size == (30, 30)
    assert np.abs(np.asarray(found)[:, 2:-2].astype(int) - (200, 100, 50)).max() <= 1
    assert made("wide.png", 20, 40)[0].size == (40, 20)
    for name, why in (("gone.png", "no answer"), ("page.html", "no image"), ("\0", "no answer")):
        with pytest.raises(Missing, match=why):
            made(name, 30, 30)
    with pytest.raises(Missing, match="no answer"):  # of the local network
        made("wide.png", 30, 30, contents_of(None))


def img2dataset(folder, prompts, files, archive):
    """The output of img2dataset 1.47 for prompts.parquet with --save_additional_columns '["id"]', one shard."""
    folder.mkdir()
    rows = []
    for number, prompt in enumerate(prompts):
        content = files.get(prompt.id)
        failure = (None, "failed_to_download", "HTTP Error 404: Not Found")
        row = ("0" * 64, "success", None) if content else failure
        place = {"id": prompt.id, "caption": prompt.prompt, "url": prompt.url, "key": f"{number:09}"}
        rows.append(place | dict(zip(("sha256", "status", "error_message"), row)))
        if content:
            for suffix, data in (("jpg", content), ("txt", prompt.prompt.encode()), ("json", b"{}")):
                path = folder / "00000" / f"{number:09}.{suffix}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    if archive:
        with tarfile.open(folder / "00000.tar", "w") as tar:
            for path in sorted((folder / "00000").iterdir()):
                tar.add(path, path.name)
        shutil.rmtree(folder / "00000")


@pytest.mark.parametrize("archive", [True, False])
def test_references_are_taken_from_what_img2dataset_wrote(tmp_path, monkeypatch, archive, capsys):
    monkeypatch.chdir(tmp_path)
    table = {"URL": [f"http://127.0.0.1:9/{i}" for i in range(4)], "TEXT": [f"number {i}" for i in range(4)]}
    pq.write_table(pa.table(table), "laion.parquet")
    backbone = {"model": "tiny-flux", "base_resolution": 128, "size_multiple": 32}
    study = {"backbones": ["f"], "variants": ["npa-direct"], "sizes": {"64x64": 4}}
    entry = {"n": 4, "source": "laion.parquet", "pictures": "fetched"}
    scores = {"scores": ["fid"]}  # no crops
    data = {"name": "t", "prompts": entry, "backbones": {"f": backbone}, "studies": {"s": study}, "metrics": scores}
    config = Config.model_validate(data)
    prompts.run(config)
    listed = read_prompts(layout.prompts(config))
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "PNG")
    img2dataset(tmp_path / "fetched", listed, {listed[0].id: picture.getvalue(), listed[2].id: b"no image"}, archive)
    references.run(config, 64, 64)
    manifest = read_json(layout.reference_manifest(config, 64, 64))
    (image,) = manifest["images"]
    assert image["id"] == listed[0].id and image["source_sha256"] == hashlib.sha256(picture.getvalue()).hexdigest()
    gone = "failed_to_download: HTTP Error 404: Not Found"
    assert manifest["reasons"] == {listed[1].id: gone, listed[2].id: "no image, or a broken one", listed[3].id: gone}
    assert manifest["missing"] == [prompt.id for prompt in listed[1:]]
    assert "references 64x64: 1 of 4 survive" in capsys.readouterr().err
    expected = ImageOps.fit(Image.fromarray(pixels), (64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(Image.open(layout.reference(config, 64, 64, listed[0].id))), np.asarray(expected))


def test_a_folder_that_img2dataset_did_not_write(tmp_path):
    with pytest.raises(HiresError, match=r"holds no \*\.parquet"):
        contents_of(str(tmp_path))
    pq.write_table(pa.table({"url": ["x"], "status": ["success"], "key": ["0"]}), tmp_path / "00000.parquet")
    with pytest.raises(HiresError, match="--save_additional_columns"):
        contents_of(str(tmp_path))


# notebook


def write_notebook(path, *sources, tags=("parameters",)):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = list(tags)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def test_a_notebook_runs_with_its_parameters(tmp_path):
    source = 'a: int = 1\nb = "x"\nc = d = 2'
    write_notebook(tmp_path / "n.ipynb", source, "import os\nprint(a, b, c, os.environ['IPYTHONDIR'] != '')")
    assert notebook.notebook_parameters(tmp_path / "n.ipynb") == {"a", "b", "c", "d"}
    notebook.execute(tmp_path / "n.ipynb", tmp_path / "out" / "n.ipynb", {"a": 5, "b": "it's: [y]"})
    cells = nbformat.read(tmp_path / "out" / "n.ipynb", 4).cells
    assert cells[-1].outputs[0].text == "5 it's: [y] 2 True\n"
    assert os.listdir(tmp_path / "out") == ["n.ipynb"]


def test_parameters_from_the_command_line_come_before_the_configurations(config, tmp_path, monkeypatch, capsys):
    write_notebook(tmp_path / "n.ipynb", 'results = output = study = ""\nprompts = 0', "print(study, prompts + 1)")
    monkeypatch.setattr(notebook, "NOTEBOOKS", tmp_path)
    Path("n.yaml").write_text("extends: config.yaml\nnotebooks: {n: {study: main, prompts: 4}}\n")
    given = ["notebook", "--config", "n.yaml", "--name", "n", "--results", "r", "--output", str(tmp_path / "out")]
    assert main([*given, "--set", "study=tau"]) == 0
    made = tmp_path / "out" / "figures" / "notebooks" / "n.ipynb"
    assert nbformat.read(made, 4).cells[-1].outputs[0].text == "tau 5\n"
    for wrong, said in (
        ("studdy=tau", "unknown parameter of"),
        ("study", "--set study: give NAME=VALUE"),
        ("study=[a", "--set study=[a: not a value that YAML knows"),
    ):
        capsys.readouterr()
        assert main([*given, "--set", wrong]) == 2
        assert said in (told := capsys.readouterr().err) and told.count("\n") == 1


def test_a_failing_cell_fails_the_notebook(tmp_path):
    write_notebook(tmp_path / "n.ipynb", "a = 1", "raise KeyError('no such column')")
    with pytest.raises(HiresError, match=r"n\.ipynb failed: KeyError: 'no such column'"):
        notebook.execute(tmp_path / "n.ipynb", tmp_path / "out.ipynb", {})
    assert not (tmp_path / "out.ipynb").exists()


def test_wrong_parameters_are_refused_before_anything_runs(tmp_path):
    write_notebook(tmp_path / "n.ipynb", "prompts = 1", "1 / 0")
    with pytest.raises(HiresError, match="did you mean 'prompts'"):
        notebook.execute(tmp_path / "n.ipynb", tmp_path / "out.ipynb", {"prompt": 2})
    write_notebook(tmp_path / "m.ipynb", "prompts = 1", tags=())
    with pytest.raises(HiresError, match="no cell tagged parameters"):
        notebook.execute(tmp_path / "m.ipynb", tmp_path / "out.ipynb", {})
    with pytest.raises(HiresError, match="unknown notebook 'o': allowed: m, n"):
        notebook.execute(tmp_path / "o.ipynb", tmp_path / "out.ipynb", {})


# provenance


def test_provenance_names_the_code_but_not_the_machine(config):
    record = provenance.record(config, model="tiny-flux")
    head = subprocess.run(["git", "-C", hires.__path__[0], "rev-parse", "HEAD"], capture_output=True, text=True)
    assert record["commit"] == head.stdout.strip() and record["dirty"] in (True, False)
    assert record["packages"]["torch"] == __import__("torch").__version__
    assert record["model"] == "tiny-flux" and record["gpu"] is None
    text = json.dumps(record)
    assert socket.gethostname() not in text.replace(record["cpu"], "") or len(socket.gethostname()) < 4
    assert str(Path.home()) not in text and str(Path.cwd()) not in text


def test_provenance_needs_the_images(config, capsys):
    shutil.rmtree("results/tested/base")
    assert main(["provenance", "--config", "config.yaml"]) == 2
    err = capsys.readouterr().err
    assert "shard-000.json does not exist: make the images first" in err and err.count("\n") == 1


def test_the_stored_configuration_reads_back_equal(config):
    path = provenance.store_config(config)
    stored = load_config(path)
    assert stored == config and provenance.config_digest(stored) == provenance.config_digest(config)
    assert stored.sampling("main", "default", "flux").model_fields_set == {"num_inference_steps", "tau"}
    time_before = path.stat().st_mtime_ns
    provenance.store_config(stored)
    assert path.stat().st_mtime_ns == time_before
    assert provenance.config_digest(load_config("config.yaml", {"prompts": {"seed": 1}})) != provenance.config_digest(
        config
    )


@pytest.mark.parametrize(("given", "expected"), [(None, 8), ("2", 2), ("64", 8), ("0", 8), ("2,1", 8)])
def test_omp_num_threads_is_the_most_a_process_takes(given, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert allowed(8) == expected
