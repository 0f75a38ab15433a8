"""`hires doctor`: what it says of this machine, and of machines where something is amiss."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hires
from hires import doctor
from hires.cli import main

PACKAGE = Path(hires.__file__).parent
SECRET = "hf_thisIsNoTokenButMustNotBeShown"


def test_this_machine_runs_the_default_without_a_connection(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise AssertionError(f"a connection to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["doctor", "--results", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("The embedded default can run.\n") and captured.err == ""
    assert all(f"weights {model}" in captured.out for model in doctor.EMBEDDED)
    assert torch.__version__ in captured.out


def test_json_says_the_same(tmp_path, capsys):
    assert main(["doctor", "--json", "--results", str(tmp_path / "results")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["runs"] is True and {check["state"] for check in said["checks"]} <= {"ok", "note"}
    assert {check["name"] for check in said["checks"]} == {check.name for check in doctor.examine()}
    assert not (tmp_path / "results").exists()


def test_another_machine(tmp_path):
    """Weights cut short or missing, a GPU that torch can't use, a token in the environment, no pyproject.toml."""
    package = tmp_path / "hires"
    shutil.copytree(PACKAGE, package, copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__"))
    cut = package / "assets/tiny-flux/transformer/diffusion_pytorch_model.safetensors"
    whole = cut.read_bytes()
    cut.unlink()
    cut.write_bytes(whole[:-7])
    (package / "assets/tiny-sdxl/tokenizer/tokenizer.json").unlink()
    (package / "assets/tiny-clip/config.json").unlink()
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU-0a, NVIDIA L4, 22528, 570.86.15'\n")
    driver.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    places = {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "home"), "PATH": f"{tmp_path}:{clean['PATH']}"}
    switches = {"HF_TOKEN": SECRET, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-m", "hires.cli", "doctor", "--json"], capture_output=True, text=True,
                          env=clean | places | switches)  # fmt: skip

    assert done.returncode == 1 and json.loads(done.stdout)["runs"] is False
    assert SECRET not in done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    wrong = {name: check["found"] for name, check in checks.items() if check["state"] == "wrong"}
    assert set(wrong) == {f"weights {model}" for model in doctor.EMBEDDED}
    assert wrong["weights tiny-flux"].startswith("transformer/diffusion_pytorch_model.safetensors is cut short")
    assert "vocabulary" in wrong["weights tiny-sdxl"] and "config.json is missing" in wrong["weights tiny-clip"]
    assert done.stderr.count("\n") == 3 and "fetch src/hires/assets/tiny-flux again" in done.stderr
    assert checks["packages"]["state"] == "ok"
    assert checks["Hugging Face token"]["found"] == "present, in the environment"
    assert checks["GPU"]["found"] == "NVIDIA L4, 22 GiB free, driver 570.86.15" and checks["GPU"]["mend"]
    assert checks["disk of models"]["found"].startswith(f"{tmp_path}/home/hub: ")
    attention = checks["neighborhood_patch_attention, embedded"]["found"]
    assert attention == "sdpa (not gluon, triton: it needs a CUDA device, got cpu)"


def test_a_torch_that_does_not_load(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: cannot open shared object file')")
    done = subprocess.run([sys.executable, "-m", "hires.cli", "doctor"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 1 and done.stdout.endswith("The embedded default can't run yet:\n")
    first, *others = done.stderr.splitlines()
    assert first == f"torch: libcudart.so: cannot open shared object file: {doctor.INSTALL}"
    assert [line.split(": not checked: ")[0] for line in others] == [f"weights {name}" for name in doctor.EMBEDDED]


def test_requirements():
    assert doctor._unmet(["torch>=2", "nothing; sys_platform == 'win32'"]) == []
    assert doctor._unmet(["torch>=99", "no-such-package>=1"]) == [
        f"torch is {torch.__version__}, not >=99", "no-such-package is missing"
    ]  # fmt: skip
    python, plain, extras = doctor._asked()
    assert python == ">=3.11" and any(line.startswith("diffusers") for line in plain) and "paper" in extras


def test_free_memory_is_within_what_there_is():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < doctor._free_memory() < total


@pytest.mark.parametrize("free, state", [(0, "wrong"), (2**30, "ok")])
def test_a_full_disk(monkeypatch, tmp_path, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2**40, 2**40 - free, free))
    results, _ = doctor._folders(tmp_path / "not" / "yet")
    assert results.state == state and bool(results.mend) == (state == "wrong")


@pytest.mark.parametrize("token, told", [(SECRET, "present, in a file"), ("", "none")])
def test_a_token_in_a_file(tmp_path, token, told):
    (tmp_path / "token").write_text(token)
    code = "from hires import doctor; print(doctor._token())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "HF_HOME": str(tmp_path), "HF_TOKEN": ""})  # fmt: skip
    assert f"found='{told}'" in done.stdout and SECRET not in done.stdout + done.stderr
