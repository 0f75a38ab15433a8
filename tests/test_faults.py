"""Faults that are injected for real; after the next run everything is as if nothing had happened."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_storage import start

from hires import layout
from hires.backbones.loading import revision
from hires.cli import main
from hires.config import load_config
from hires.errors import HiresError
from hires.execution.devices import locked_device
from hires.files import parquet
from hires.files.storage import Damaged, claim, read_sealed, replacing, sealed, write_bytes, write_json
from hires.metrics import Features, load_clip, load_features
from hires.models import HINTS, build_clip, build_pipeline
from hires.shards import read_manifest
from hires.stages import base, features, images, metrics, models, prompts, provenance, references, scores

ROOT = Path(__file__).parents[1]
CONFIG = """
name: tested
prompts: {n: 3, scenes: {pool: 400}}
backbones:
  flux: {model: model, base_resolution: 128, size_multiple: 32, sampling: {num_inference_steps: 2, tau: 500}}
studies:
  main: {backbones: [flux], variants: [direct, npa+sg], sizes: {256x256: 3}}
compute: {shard_size: 2, device: cpu}
metrics: {scores: [fid, clip, fid_patch, count], bootstrap: 10, patch: {per_image: 1}}
"""
PLACE = ("main", "flux", 256, 256)


def make(config):
    """All stages up to the table of scores, in order, as Snakemake runs them."""
    if not layout.prompts(config).exists():
        prompts.run(config)
    references.run(config, 256, 256)
    (latents,) = layout.base_sets(config)
    for shard in (0, 1):
        base.run(config, "flux", latents.name, shard)
        images.run(config, *PLACE, shard)
    features.run_references(config, 256, 256, device="cpu")
    features.run(config, *PLACE, device="cpu")
    scores.run(config, *PLACE)
    metrics.run(config)


def hashes(root=Path("results/tested")):
    """SHA-256 of everything that depends on nothing measured."""
    files = [path for path in root.rglob("*") if path.suffix in (".png", ".safetensors", ".parquet")]
    return {str(path.relative_to(root)): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of an untrained FLUX and an untrained CLIP."""
    folder, model = tmp_path_factory.mktemp("finished"), tmp_path_factory.mktemp("model")
    build_pipeline("tiny-flux").save_pretrained(model)
    write_json(model / "hires.json", HINTS["tiny-flux"])
    (folder / "model").symlink_to(model)
    for part in build_clip():
        part.save_pretrained(folder / "assets/tiny-clip")
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("hires.models.ASSETS", folder / "assets")
        load_clip.cache_clear(), load_features.cache_clear()
        make(load_config("config.yaml"))
        yield folder
    load_clip.cache_clear(), load_features.cache_clear()


@pytest.fixture
def config(finished, tmp_path, monkeypatch):
    """The configuration, in a copy of the finished folder that is now the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return load_config("config.yaml")


# damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """Change one bit in the middle; a JSON file stays JSON."""
    data = bytearray(path.read_bytes())
    at = len(data) // 2
    if path.suffix == ".json":
        at = next(i for i in range(at, len(data)) if chr(data[i]).isdigit())
    data[at] ^= 1
    path.write_bytes(data)


def folder(path):
    """A folder in its place: even root can't read that."""
    path.unlink()
    path.mkdir()


def broken_sector(path):
    """A file whose reading ends in EIO."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


IMAGES = "images/main/default/flux/npa+sg/256x256"
MADE = {  # what a later stage reads back
    "prompts": "prompts.parquet",
    "reference": "references/256x256/*.png",
    "reference's record": "references/256x256/*.png.json",
    "references": "references/256x256/manifest.json",
    "base latents": "base/flux/*/*.safetensors",
    "base record": "base/flux/*/*.safetensors.json",
    "base manifest": "base/flux/*/shard-000.json",
    "image": f"{IMAGES}/*.png",
    "record": f"{IMAGES}/*.png.json",
    "manifest": f"{IMAGES}/shard-000.json",
    "features": "features/main/default/flux/npa+sg/*.safetensors",
    "reference features": "features/references/*.safetensors",
    "scores": "scores/main/default/flux/npa+sg/256x256.parquet",
    "image scores": "scores/main/default/flux/npa+sg/*.images.parquet",
}


def run_until_done(config):
    """Runs, as many as it takes; each that fails does so with one line. Returns what they said."""
    said = []
    for _ in range(4):
        try:
            make(config)
            return said
        except HiresError as error:
            assert "\n" not in str(error)
            said.append(str(error))
    raise AssertionError(said)


@pytest.mark.parametrize("damage", [cut, empty, flip])
def test_damage_to_a_finished_run_is_mended_by_the_next(config, damage):
    """Everything at once; a file is made again, or named, removed and made again by the run after."""
    before = hashes()
    for pattern in MADE.values():
        damage(sorted(Path("results/tested").glob(pattern))[0])
    assert hashes() != before
    said = run_until_done(config)
    assert hashes() == before
    assert all("damaged" in line and "results/tested" in line for line in said)


def readers(config):
    """What is read back -> the file, and the stage that comes next and reads it, which must notice by itself."""
    (latents,) = layout.base_sets(config)
    npa = config.image_set("main", "default", "flux", "npa+sg", 256, 256)
    first = next(iter(sorted(layout.image_shard(config, npa, 0).parent.glob("*.png"))))
    stored = sorted(layout.base_shard(config, latents, 0).parent.glob("*.safetensors"))
    shard = 0 if first.name.split("-")[0] in layout.image_shard(config, npa, 0).read_text() else 1

    def remake_image():
        for path in layout.image_shard(config, npa, 0).parent.glob("*.png"):
            path.unlink()
        images.run(config, *PLACE, 0, variants=["npa+sg"])
        images.run(config, *PLACE, 1, variants=["npa+sg"])

    def extract():
        layout.features(config, npa).unlink(missing_ok=True)
        features.run(config, *PLACE, variants=["npa+sg"], device="cpu")

    score = partial(scores.run, config, *PLACE, variants=["npa+sg"])
    return {
        layout.prompts(config): partial(references.run, config, 256, 256),
        stored[0]: remake_image,
        stored[0].with_name(f"{stored[0].name}.json"): remake_image,
        first: extract,
        layout.image_shard(config, npa, shard): extract,
        layout.features(config, npa): score,
        layout.reference_features(config, 256, 256): score,
        layout.scores(config, npa): partial(metrics.run, config),
        layout.base_shard(config, latents, 0): partial(provenance.run, config),
        layout.metrics(config): partial(metrics.check, config),
        layout.paired(config): partial(metrics.check, config),
    }


@pytest.mark.parametrize("damage", [cut, empty, flip, folder, broken_sector])
def test_a_stage_notices_what_it_reads(config, damage):
    """One line that names the file; nothing is made from it."""
    copies = {path: path.read_bytes() for path in Path("results").rglob("*") if path.is_file()}
    for path, stage in readers(config).items():
        damage(path)
        with pytest.raises(HiresError) as caught:
            stage()
        told = str(caught.value)
        assert str(path).removesuffix(".json") in told and "\n" not in told, (path, told)
        assert "again" in told or "mend the disk" in told or "cannot read" in told, told
        if path.is_dir():
            path.rmdir()
        for file, data in copies.items():
            if file.is_symlink() or not file.exists() or file.read_bytes() != data:
                file.unlink(missing_ok=True)
                file.write_bytes(data)


def test_swapped_files_are_noticed(config):
    """Whole files under each other's name, with their records: the records' keys tell."""
    before = hashes()
    for pattern in (MADE["image"], MADE["base latents"]):
        one, two = sorted(Path("results/tested").glob(pattern))[:2]
        for a, b in ((one, two), (Path(f"{one}.json"), Path(f"{two}.json"))):
            a.rename("aside"), b.rename(a), Path("aside").rename(b)
    shutil.rmtree("results/tested/images/main/default/flux/npa+sg")
    with pytest.raises(HiresError, match="was made from"):
        images.run(config, *PLACE, 0)
    run_until_done(config)
    assert hashes() == before


def test_a_parquet_file_tells_any_changed_bit(tmp_path):
    """A bit of each byte of a small file: either it is noticed, or the table is the same."""
    path = tmp_path / "table.parquet"
    frame = pd.DataFrame({"id": ["a", "b"], "value": [0.5, 2.0], "replicates": [[1.0, 2.0], [3.0]]})
    parquet.write_frame(path, frame)
    data, good = path.read_bytes(), parquet.read(path)
    assert pd.read_parquet(path)["value"].tolist() == [0.5, 2.0]
    rng, noticed = np.random.default_rng(0), 0
    for at in range(0, len(data), 3):
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            assert parquet.read(path).to_pydict() == good.to_pydict(), at
        except Damaged:
            noticed += 1
    assert noticed > len(data) / 6


def test_a_json_file_tells_any_changed_letter(tmp_path):
    path, value = tmp_path / "record.json", {"seconds": 1.25, "ids": ["a", "b"], "nested": {"n": 3}}
    write_json(path, sealed(value))
    data = path.read_bytes()
    assert read_sealed(path) == value
    for at in range(len(data)):
        for bit in (0, 3, 6):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            try:
                found = read_sealed(path)
            except Damaged:
                continue
            assert found == value or {k: found[k] for k in value} == value, (at, bit)  # white space, or the seal's name
    path.write_text("[1]")
    with pytest.raises(Damaged):
        read_sealed(path)


def test_features_tell_any_changed_bit(config, tmp_path):
    path = layout.features(config, config.image_sets()[0])
    good = Features.load(path)
    data = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(data), 200):
        changed = bytearray(data)
        changed[at] ^= 16
        path.write_bytes(changed)
        try:
            found = Features.load(path)
        except HiresError:
            continue
        assert found.metadata == good.metadata
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in good.tensors.items())


def test_flipped_weights_are_another_model(config):
    """No image of damaged weights passes for one of the whole model: revision, keys and records differ."""
    before, seen = hashes(), revision(Path("model"))
    real = Path("model").resolve()
    Path("model").unlink()
    shutil.copytree(real, "model")
    weights = Path("model/transformer/diffusion_pytorch_model.safetensors")
    tensors = bytearray(weights.read_bytes())
    tensors[-3] ^= 1  # one bit of one number; header and length are as they were
    models._load.cache_clear(), models._content.cache_clear(), models.folder_digests.cache_clear()
    weights.write_bytes(tensors)
    assert revision(Path("model")) != seen
    config = load_config("config.yaml")
    (latents,) = layout.base_sets(config)
    base.run(config, "flux", latents.name, 0)
    images.run(config, *PLACE, 0, variants=["direct"])
    images_of = config.image_set("main", "default", "flux", "direct", 256, 256)
    manifest = read_manifest(layout.image_shard(config, images_of, 0), "images")
    assert manifest["provenance"][0]["revision"] == revision(Path("model"))
    assert {name for name, found in hashes().items() if found != before[name]}
    tensors[-3] ^= 1
    weights.write_bytes(tensors)
    models._load.cache_clear(), models._content.cache_clear(), models.folder_digests.cache_clear()
    run_until_done(config)
    assert hashes() == before


# disks


def test_a_full_disk_keeps_what_is_finished(config):
    """The kernel refuses a file of every stage: one line, nothing half-written, and then the same hashes."""
    before = hashes()
    (latents,) = layout.base_sets(config)
    npa = config.image_set("main", "default", "flux", "npa+sg", 256, 256)
    stages = {
        layout.prompts(config): partial(prompts.run, config),
        next(layout.base_shard(config, latents, 0).parent.glob("*.safetensors")): partial(make, config),
        next(layout.image_shard(config, npa, 0).parent.glob("*.png")): partial(make, config),
        layout.image_shard(config, npa, 0): partial(make, config),
        layout.features(config, npa): partial(features.run, config, *PLACE, device="cpu"),
        layout.scores(config, npa): partial(scores.run, config, *PLACE),
        layout.metrics(config): partial(metrics.run, config),
    }
    for path, stage in stages.items():
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size - 1, hard))
        path.unlink()
        try:
            with pytest.raises(HiresError, match=r"cannot write .*File too large; finished work is kept: free some"):
                stage()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert not path.exists() and not list(Path("results").rglob(".*.part"))
        stage()
    assert hashes() == before


def test_folders_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """A results folder that is a file; one on a file system that takes no files, which stops root as well."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.replace("model: model", "model: tiny-flux"))
    for place in ("file", "/sys/kernel"):
        if place == "file":
            Path("results").write_text("not a folder")
        else:
            Path("results").symlink_to(place)
        for command in ("prompts", "run"):
            assert main([command, "--config", "config.yaml"]) == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and "results/tested" in err and "cannot write" in err, err
        Path("results").unlink()


def test_two_processes_never_write_one_file(tmp_path):
    path = tmp_path / "file.bin"
    child = start(
        "import pathlib, sys\n"
        "from hires.files.storage import replacing\n"
        f"with replacing(pathlib.Path({str(path)!r})) as temporary:\n"
        "    temporary.write_bytes(b'first'); print('open', flush=True); sys.stdin.read()"
    )
    assert child.stdout.readline() == "open\n"
    with pytest.raises(HiresError, match=r"another process is writing .*file\.bin"):
        write_bytes(path, b"second")
    child.communicate("")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file.bin"]
    with replacing(path) as temporary, pytest.raises(HiresError, match="another process"):
        temporary.write_bytes(b"third")
        write_bytes(path, b"fourth")
    assert path.read_bytes() == b"third"


# memory

SHORT_OF_MEMORY = """
import resource, sys
import hires
from hires import layout
from hires.config import load_config
from hires.errors import HiresError
from hires.stages import base, images, models, prompts

def config(how):
    return load_config("config.yaml", {"compute": {"out_of_memory": how}})

prompts.run(config("refuse"))
(latents,) = layout.base_sets(config("refuse"))
backbone = models.load(config("refuse"), "flux", "cpu")
hires.generate(backbone, "a red disc", "direct", height=256, width=256, num_inference_steps=1)
for megabytes, stage in (
    (30, lambda config: base.run(config, "flux", latents.name, 0)),
    (72, lambda config: images.run(config, "large", "flux", 512, 512, 0)),
    (64, lambda config: config.compute.out_of_memory == "refuse" and hires.generate(
        backbone, ["a red disc"] * 2, "direct", height=512, width=512, num_inference_steps=1)),
):
    held = int(open("/proc/self/status").read().split("VmSize:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (held + megabytes * 2**20, resource.RLIM_INFINITY))
    for how in ("refuse", "adapt"):
        try:
            stage(config(how))
        except HiresError as error:
            print(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
"""
LARGE = """
name: tested
prompts: {n: 64, scenes: {pool: 100}}
backbones:
  flux:
    {model: tiny-flux, weights: random, base_resolution: 128, size_multiple: 32,
     sampling: {num_inference_steps: 1, tau: 1000}}
studies:
  main: {backbones: [flux], variants: [upsample], sizes: {256x256: 64}}
  large: {backbones: [flux], variants: [direct], sizes: {512x512: 1}}
compute: {shard_size: 64, batch_size: 64, device: cpu}
"""


def test_out_of_memory_is_told_or_answered(tmp_path, monkeypatch):
    """The allocator itself refuses, in a process that may take little more than it has."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(LARGE)
    # memory that is freed goes back at once: how much a part needs doesn't hang on what ran before
    child = start(SHORT_OF_MEMORY, MALLOC_MMAP_THRESHOLD_="262144", MALLOC_ARENA_MAX="1", OMP_NUM_THREADS="1")
    out, err = child.communicate()
    told = out.splitlines()
    assert child.returncode == 0 and len(told) == 3, out + err
    assert told[0].startswith("base latents of flux, 128x128, batch 64: out of memory: ")
    assert "MiB asked for; what helps: compute.batch_size = 32; compute.out_of_memory = adapt" in told[0]
    assert told[1].startswith("direct at 512x512 on flux, batch 1: out of memory: ")
    assert "sampling.vae_tiling = true" in told[1]
    assert told[2].startswith("512x512, batch 2: out of memory: ") and "vae_tiling = true, view_batch = 1" in told[2]
    assert "going on with batch_size = 32" in err and "going on with vae_tiling = True" in err
    config = load_config("config.yaml")
    (latents,) = layout.base_sets(config)
    entry = read_manifest(layout.base_shard(config, latents, 0), "base")["latents"][0]
    assert entry["savings"]["batch_size"] == entry["batch"] < 64
    large = config.image_set("large", "default", "flux", "direct", 512, 512)
    (image,) = read_manifest(layout.image_shard(config, large, 0), "images")["images"]
    assert image["savings"] == {"vae_tiling": True}
    assert main(["show", str(layout.image(config, large, image["id"], 0)), "--json"]) == 0
    stored = load_file(layout.base_latents(config, latents, image["id"], 0))["latents"]
    shutil.rmtree("results/tested/base")
    base.run(config, "flux", latents.name, 0)
    again = load_file(layout.base_latents(config, latents, image["id"], 0))["latents"]
    assert (again - stored).norm() < 1e-4 * again.norm()


@pytest.mark.gpu
def test_out_of_gpu_memory_is_told_or_answered(tmp_path, monkeypatch, capfd):
    """The fraction of the GPU that this process may use is what is held now, and 200 MiB."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(LARGE.replace("device: cpu", "device: cuda"))
    config = load_config("config.yaml")
    prompts.run(config)
    models.load(config, "flux", "cuda")
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200 * 2**20) / total)
    try:
        large = {"studies": {"main": {"backbones": ["flux"], "variants": ["direct"], "sizes": {"1024x1024": 64}}}}
        with pytest.raises(
            HiresError, match=r"batch 64: out of memory: .* .* free; what helps: compute\.batch_size = 32"
        ):
            images.run(load_config("config.yaml", large), "main", "flux", 1024, 1024, 0)
        few = {**large, "prompts": {"n": 4}, "compute": {"out_of_memory": "adapt", "batch_size": 4}}
        few["studies"]["main"]["sizes"] = {"1024x1024": 4}
        images.run(load_config("config.yaml", few), "main", "flux", 1024, 1024, 0)
        assert "going on with batch_size = " in capfd.readouterr().err
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Snakemake: processes that are killed, hang, or come twice; clocks


@pytest.fixture
def workplace(config):
    """The configuration with all prompts in one shard, as Snakemake finds it, and the hashes of its images to come."""
    for name in ("config", "notebooks"):
        Path(name).symlink_to(ROOT / name)
    Path("config.yaml").write_text(CONFIG.replace("shard_size: 2", "shard_size: 3"))
    before = made()
    shutil.rmtree("results")
    return before


LIMITED = {"PYTHONDONTWRITEBYTECODE": "1"}  # Python 3.11 takes a module that it could write in part for whole


def snakemake(*arguments, variables=None, **options):
    binaries = Path(sys.executable).parent
    command = [binaries / "snakemake", "--snakefile", ROOT / "Snakefile", "images", "--configfile", "config.yaml"]
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", **(variables or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *arguments], env=environment, start_new_session=True, **pipes, **options)


def workers(stage):
    """Numbers of the processes that run a stage below this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            ours = command[1:4] == [b"-m", b"hires.cli", stage.encode()]
            if ours and (process / "cwd").samefile("."):
                found.append(int(process.name))
        except OSError:  # ended meanwhile
            continue
    return found


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found
    return found


def made():
    return {name: found for name, found in hashes().items() if name.startswith(("images", "base"))}


def test_snakemake_goes_on_after_every_fault(workplace):
    """A worker hangs, a disk is full, two runs meet, one is killed, the clock jumps, Snakemake's notes are damaged."""
    hanging = snakemake("--config", "compute={job_minutes: 0.1}")
    os.kill(wait_for(lambda: workers("prompts"))[0], signal.SIGSTOP)
    out, _ = hanging.communicate()
    assert hanging.returncode != 0
    assert re.search("hires prompts: killed, .* or after job_minutes = 0.1; finished work is kept", out), out

    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (14_000, 14_000))
    full = snakemake(preexec_fn=limit, variables=LIMITED)
    out, _ = full.communicate()
    assert full.returncode != 0 and "finished work is kept: free some space and run it again" in out, out

    first = snakemake()
    wait_for(lambda: list(Path("results/tested/images").rglob("*.png")))
    os.kill(workers("images")[0], signal.SIGSTOP)
    second = snakemake("--config", "compute={shard_size: 1}")
    out, _ = second.communicate()
    assert second.returncode != 0 and "another run is writing to results/tested" in out
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()

    clock_jumps()
    for path in list(Path(".snakemake/metadata").iterdir())[::2]:
        path.write_text("{no JSON")
    done = snakemake()
    out, _ = done.communicate()
    assert done.returncode == 0, out
    assert re.search(r"^base .*: 0 of 3 made, 3 kept", out, re.MULTILINE), out
    assert made() == workplace


def clock_jumps():
    """Manifests are of yesterday, all else is of tomorrow."""
    for path in Path("results").rglob("*"):
        days = -1 if path.name.startswith("shard-") else 1
        os.utime(path, (time.time() + days * 86400,) * 2)


def test_a_waiting_process_says_who_has_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with locked_device("cuda"):
        child = start(
            "from hires.execution.devices import locked_device\n"
            "with locked_device('cuda', poll=0.01, patience=0.2) as device: print(device)",
            CUDA_VISIBLE_DEVICES="4",
            TMPDIR=str(tmp_path),
        )
        assert f"held by process {os.getpid()}; one that hangs may be killed" in child.stderr.readline()
    assert child.communicate()[0] == "cuda\n"


def test_a_hanging_run_is_named_and_can_be_killed(tmp_path):
    """A stopped process keeps its claim; once it is killed the next run goes on."""
    child = start(
        f"import pathlib, sys\nfrom hires.files.storage import claim\nheld = claim(pathlib.Path({str(tmp_path)!r}))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    assert child.stdout.readline() == "held\n"
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(HiresError, match=f"another run .*process {child.pid}.*end it first"):
        claim(tmp_path)
    child.kill()
    child.wait()
    with claim(tmp_path):
        pass
