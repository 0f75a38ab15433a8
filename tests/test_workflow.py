"""The Snakefile: its jobs, its errors, what reruns; the Makefile's lock and the conda environment."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hires.config import load_config
from hires.files.storage import claim, read_json, write_json
from hires.models import HINTS, build_pipeline

ROOT = Path(__file__).parents[1]

TINY = """
name: tiny
prompts: {n: 2, scenes: {pool: 12}}
backbones:
  tiny: {model: model, base_resolution: 128, size_multiple: 32, sampling: {num_inference_steps: 2, tau: 500}}
studies:
  main: {backbones: [tiny], variants: [upsample, npa+lfm], sizes: {256x256: 2}}
compute: {shard_size: 2, device: cpu}
"""


@pytest.fixture
def folder(tmp_path):
    """A working directory outside the repository, so that no test writes into it."""
    for name in ("config", "notebooks"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def snakemake(folder, *arguments):
    binaries = Path(sys.executable).parent
    command = [binaries / "snakemake", "--snakefile", ROOT / "Snakefile", *arguments]
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def jobs(done):
    """Rule -> number of jobs, from what a run says."""
    text = done.stdout + done.stderr
    if "Nothing to be done" in text:
        return {}
    table = text.split("Job stats:")[1].split("total")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def test_the_jobs_of_a_small_run(folder):
    done = snakemake(folder, "-n", "--configfile", "config/smoke.yaml")
    assert done.returncode == 0, done.stderr
    config = load_config(ROOT / "config/smoke.yaml")
    per_study = {
        f"{stage}_{study}": len(entry.backbones) * len(entry.sizes)
        for study, entry in config.studies.items()
        for stage in ("images", "features", "scores")
    }
    assert jobs(done) == per_study | {
        "draw_prompts": 1,
        "references": 1,
        "reference_features": 1,
        "base": 2,
        "collect_metrics": 1,
        "notebook": 4,
        "provenance": 1,
        "html_report": 1,
        "checksums": 1,
        "all": 1,
    }
    assert "Using workflow specific profile" in done.stdout + done.stderr
    assert not (folder / "results").exists()


def test_targets(folder):
    small = ("-n", "--configfile", "config/smoke.yaml")
    assert set(jobs(snakemake(folder, "prompts", *small))) == {"draw_prompts", "prompts"}
    images = {"draw_prompts", "base", "images_main", "images_tau", "images"}
    assert set(jobs(snakemake(folder, "images", *small))) == images
    assert "notebook" not in jobs(snakemake(folder, "metrics", *small))
    assert set(jobs(snakemake(folder, "report", *small))) >= {*images, "notebook", "html_report"} - {"images"}


@pytest.mark.parametrize(("visible", "divided"), [("0", []), ("0,1", ["flux-dev"]), ("", ["tiny-flux"])])
def test_a_machine_with_one_gpu_is_not_asked_for_two(folder, monkeypatch, visible, divided):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    done = snakemake(folder, "-n", "speed", "--config", "compute={device: cpu}")
    assert jobs(done)["speed_tables"] == 1
    assert re.findall(r"Speed: (\S+)-gpus", done.stdout + done.stderr) == divided


def test_all_outputs_are_ignored_by_git(folder):
    done = snakemake(folder, "--summary", "--configfile", "config/smoke.yaml")
    outputs = [line.split("\t")[0] for line in done.stdout.splitlines()[1:]]
    assert len(outputs) > 40 and all(output.startswith("results/smoke/") for output in outputs)
    assert subprocess.run(["git", "-C", ROOT, "check-ignore", "--quiet", *outputs[:1]]).returncode == 0


def test_lint(folder):
    done = snakemake(folder, "--lint")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "your workflow is in a good condition" in done.stdout + done.stderr


def test_every_job_depends_on_the_version_of_its_stage():
    for file in (ROOT / "rules").glob("*.smk"):
        for rule in re.split(r"^ *rule\b", file.read_text(), flags=re.MULTILINE)[1:]:
            if rule.startswith(" claims_page:"):
                continue  # another form of a notebook's page, which depends on it
            stage = re.search(r'"hires (\w+) ', rule)
            assert stage and f'version=VERSIONS["{stage[1]}"]' in rule, rule


def test_a_wrong_key_is_told_in_one_line(folder):
    done = snakemake(folder, "-n", "--config", "compute={shard_sise: 4}")
    assert done.returncode != 0
    assert "compute.shard_sise: unknown key 'shard_sise': did you mean 'shard_size'?" in done.stdout + done.stderr


def test_a_wrong_parameter_of_a_notebook_is_told_before_any_work(folder):
    done = snakemake(folder, "prompts", "--config", "notebooks={03_tau: {studdy: tau}}")
    assert done.returncode != 0 and not (folder / "results").exists()
    assert "unknown parameter of notebooks/03_tau.ipynb 'studdy': did you mean 'study'?" in done.stdout + done.stderr


def test_a_failing_job_says_why(folder):
    """The log is shown through a pipe, which must not hide the job's failure."""
    (folder / "source.parquet").write_text("no parquet")
    done = snakemake(
        folder, "prompts", "--configfile", "config/smoke.yaml", "--config", "prompts={source: source.parquet}"
    )
    told = done.stdout + done.stderr
    assert done.returncode != 0 and "non-zero exit status 2" in told
    assert re.search("^hires prompts: source.parquet: not a readable parquet file", told, re.MULTILINE)
    assert not (folder / "results/smoke/prompts.parquet").exists()


def test_a_killed_run_does_not_stop_the_next(folder):
    small = ("prompts", "--configfile", "config/smoke.yaml")
    with claim(folder / "results/smoke"):
        done = snakemake(folder, *small)
        assert done.returncode != 0 and "another run is writing to results/smoke" in done.stdout + done.stderr
        assert snakemake(folder, *small, "-n").returncode == 0
    command = [Path(sys.executable).parent / "snakemake", "--snakefile", ROOT / "Snakefile", *small]
    child = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while "Job" not in (line := child.stderr.readline()) or "stats" in line:
        assert child.poll() is None
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    done = snakemake(folder, *small)
    assert done.returncode == 0 and (folder / "results/smoke/prompts.parquet").is_file(), done.stderr


def test_command_line_overrides_single_keys(folder):
    given = ["prompts", "--configfile", "config/smoke.yaml", "--config", "compute={shard_size: 1}", "name=other"]
    done = snakemake(folder, "-n", *given)
    assert done.returncode == 0, done.stderr
    assert not (folder / "results/other").exists()  # a dry run leaves everything alone
    done = snakemake(folder, *given)
    assert done.returncode == 0, done.stderr
    stored = load_config(folder / "results/other/config.yaml")
    given = load_config(ROOT / "config/smoke.yaml", {"compute": {"shard_size": 1}, "name": "other"})
    assert stored == given.model_copy(update={"extends": None}) and stored.compute.shard_size == 1
    done = snakemake(folder, "-n", "--configfile", "config/smoke.yaml", "config/config.yaml")
    assert "give one --configfile" in done.stdout + done.stderr


def test_figures_need_reference_results_and_generate_nothing(folder):
    done = snakemake(folder, "-n", "figures")
    assert "no results/reference/metrics.parquet to draw figures from yet" in done.stdout + done.stderr
    (folder / "results/reference").mkdir(parents=True)
    (folder / "results/reference/metrics.parquet").touch()
    assert set(jobs(snakemake(folder, "-n", "figures"))) == {"redraw", "redraw_claims", "claims_page", "figures"}


def test_images_are_made_once(folder):
    """A real run, then what a second one would do after this and that."""
    (folder / "tiny.yaml").write_text(TINY)
    build_pipeline("tiny-flux").save_pretrained(folder / "model")
    write_json(folder / "model/hires.json", HINTS["tiny-flux"])
    done = snakemake(folder, "images", "--cores", "2", "--configfile", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert jobs(done) == {"draw_prompts": 1, "base": 1, "images_main": 1, "images": 1}
    assert re.search(r"^images main tiny 256x256 shard 0: 4 of 4 made", done.stdout + done.stderr, re.MULTILINE)
    manifest = folder / "results/tiny/images/main/default/tiny/npa+lfm/256x256/shard-000.json"
    assert [image["seed"] for image in read_json(manifest)["images"]] == [0, 0]
    assert (folder / "results/tiny/logs/images/main/tiny/256x256/shard-000.log").read_text().count("\n") == 1

    def again(**overrides):
        edits = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        return jobs(
            snakemake(folder, "images", "-n", "--configfile", "tiny.yaml", *(["--config", *edits] if edits else []))
        )

    study = yaml.safe_load(TINY)["studies"]["main"]
    once = {"images": 1, "images_main": 1}
    assert again() == {}
    assert again(compute={"batch_size": 2, "threads": 2}, metrics={"bootstrap": 3}) == {}
    assert again(studies={"main": {**study, "variants": ["upsample", "npa+lfm", "npa"]}}) == once
    assert again(studies={"main": {**study, "settings": {"default": {"tau": 1000}}}}) == once
    assert "draw_prompts" in again(prompts={"n": 3})
    manifest.unlink()
    assert again() == once
    shutil.copyfile(folder / "model/model_index.json", folder / "model/another.json")
    assert again() == {"base": 1, **once}


def lock():
    return (ROOT / "requirements.lock").read_text().splitlines()


def test_the_conda_environment_has_the_pins_of_the_lock():
    python, pip, packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert python == "python=3.11" and pip == "pip"
    assert packages == {"pip": lock()}


def test_the_lock_holds_what_the_project_asks_for():
    pins = {}
    for line in lock():
        pin = Requirement(line)
        (only,) = pin.specifier
        assert only.operator == "==" and "+" not in only.version
        pins[canonicalize_name(pin.name)] = only.version
    assert pins["torch"] == "2.13.0"
    assert not any(name.startswith(("nvidia-", "cuda-")) or name in ("torchvision", "hires") for name in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for text in project["project"]["dependencies"] + extras["workflow"] + extras["dev"]:
        needed = Requirement(text)
        assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), text


# --- clusters, several GPUs


def test_the_slurm_profile_runs_dry(folder):
    """Without its plugin, which the lock leaves out; where it is installed, a job of `gpu: 1` asks for --gpus=1."""
    (folder / "tiny.yaml").write_text(TINY.replace("model: model", "model: tiny-flux").replace("cpu", "cuda"))
    profile = ROOT / "profiles/slurm"
    settings = yaml.safe_load((profile / "profile.yaml").read_text())
    assert settings["executor"] == "slurm" and settings["default-resources"]["slurm_partition"] == "gpu"
    options = ["-n", "--executor", "dryrun", "--workflow-profile", profile, "--configfile", "tiny.yaml"]
    done = snakemake(folder, "images", *options)
    assert done.returncode == 0, done.stderr
    assert jobs(done) == {"draw_prompts": 1, "base": 1, "images_main": 1, "images": 1}


GPU_JOBS = """
rule all:
    input: expand("{n}.txt", n=range(4))
rule job:
    output: "{n}.txt"
    resources: gpu=1
    shell: "PYTHON hold.py > {output}"
"""
HOLD = """
import os, time
from hires.execution.devices import locked_device
with locked_device() as device:
    began = time.monotonic()
    time.sleep(1)
    print(device, os.environ["CUDA_VISIBLE_DEVICES"], began, time.monotonic())
"""


def test_jobs_on_one_host_get_gpus_of_their_own(tmp_path):
    """Snakemake counts two GPUs and names none: its jobs lock one each."""
    (tmp_path / "hold.py").write_text(HOLD)
    (tmp_path / "Snakefile").write_text(GPU_JOBS.replace("PYTHON", sys.executable))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "4,7", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "snakemake", "--cores", "4", "--resources", "gpu=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    held = [file.read_text().split() for file in tmp_path.glob("*.txt")]
    assert [row[0] for row in held] == ["cuda"] * 4 and {row[1] for row in held} == {"4", "7"}
    for gpu in ("4", "7"):
        turns = sorted((float(began), float(ended)) for _, name, began, ended in held if name == gpu)
        assert all(ended <= began for (_, ended), (began, _) in pairwise(turns))
