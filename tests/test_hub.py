"""Models of the hub, against a hub on this machine: downloads, and each refusal in one line without the token."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, serve

import hires
from hires import doctor
from hires.config import Prompts
from hires.data.prompts import draw_prompts, read_prompts
from hires.errors import HiresError
from hires.models import ASSETS

ROOT = Path(__file__).parents[1]
TOKEN = "hf_thisIsNoTokenButMustNotBeShown"
NOWHERE = "http://127.0.0.1:9"
FLUX = "https://huggingface.co/black-forest-labs/FLUX.1-dev"
REFUSALS = {  # as the hub: what a gated model is called and holds may be read, its files may not
    "black-forest-labs/FLUX.1-dev/resolve": lambda token: (
        403 if token else 401,
        {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access is restricted for {token}"},
    ),
    "api/models/some/fine-grained": lambda token: (403, {"X-Error-Message": "enable access to gated repositories"}),
    "api/models/some/down": lambda token: (503, {}),
    "api/models/some/strict": lambda token: (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
}
LOAD = """
import json, sys, hires
from hires.errors import HiresError
for model in sys.argv[1:]:
    try:
        print(json.dumps(hires.load(model, device="cpu").revision))
    except HiresError as error:
        print(json.dumps([str(error)]))
"""


def run(code, arguments, home, address, token=None, **environment):
    """What a program prints, a JSON value a line, in a process whose hub is `address`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    given = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    given |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=clean | given)
    assert (done.returncode, done.stderr) == (0, "") and TOKEN not in done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


def load(models, home, address, token=None, **environment):
    """The revision of each model, or the line that refuses it, as a process says whose hub is `address`."""
    said = run(LOAD, models, home, address, token, **environment)
    assert all(isinstance(line, str) or (line[0].startswith("model '") and "\n" not in line[0]) for line in said)
    return [line if isinstance(line, str) else line[0] for line in said]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A model beside which lie files that must not be fetched."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ASSETS / "tiny-sdxl", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*training.json"))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    (folder / "sd_xl.safetensors").write_bytes(b"another layout")
    return folder


@pytest.fixture(scope="module")
def hub(repository):
    def refuse(path, token):
        return next((answer(token) for start, answer in REFUSALS.items() if path.startswith(start)), None)

    gated = ASSETS / "tiny-flux"
    with serve(
        {"some/tiny": repository, "black-forest-labs/FLUX.1-dev": gated, "some/none": gated / "vae"}, refuse
    ) as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory, hub):
    """A cache that holds some/tiny."""
    home = tmp_path_factory.mktemp("home")
    models = {
        "some/tiny": COMMIT,
        "some/tiny@main": COMMIT,
        "some/tiny@v9": "no such revision: https://huggingface.co/some/tiny/commits/main",
        "flux-dev": f"accept the licence on {FLUX}, then hf auth login",
        "some/other": "no such repository: check the name at https://huggingface.co/some/other; for a private one",
        "some/none": "it is no diffusers pipeline with safetensors weights (",
        "some/down": "the hub answered 503: try again later",
        "some/a..b": "OWNER/NAME",
    }
    for said, told in zip(load(models, home, hub.address), models.values(), strict=True):
        assert told in said
    return home


def test_only_what_is_needed_is_fetched_and_no_token_asked_for(home, hub):
    fetched = [path for method, path, _ in hub.seen if method == "GET" and path.startswith("some/tiny/resolve/")]
    assert any(path.endswith("unet/diffusion_pytorch_model.safetensors") for path in fetched)
    assert not [path for path in fetched if path.endswith((".bin", "sd_xl.safetensors"))]
    assert {token for *_, token in hub.seen} == {None}


def test_what_a_token_does_not_open(tmp_path, hub):
    models = {
        "flux-dev": f"access is not granted to the account of your token: ask for it on {FLUX}",
        "some/strict": "the hub doesn't accept your token: renew it (hf auth login",
        "some/fine-grained": "settings/tokens, see https://huggingface.co/some/fine-grained",
        "some/other": "it may be private: see that your token may read it",
    }
    for said, told in zip(load(models, tmp_path, hub.address, TOKEN), models.values(), strict=True):
        assert told in said


@pytest.mark.parametrize(
    ("environment", "told"),
    [({}, "no connection to the hub"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it")],
)
def test_without_a_connection_the_cache_serves(home, environment, told):
    cached, refused = load(["some/tiny", "flux-dev"], home, NOWHERE, TOKEN, **environment)
    assert cached == COMMIT and told in refused


# --- hires doctor, on the same cache, in this process and without a connection


@pytest.fixture
def checks(monkeypatch, tmp_path, home):
    """The checks of a model or a configuration, by name, with the cache in `home`."""

    def examine(cache=home, **subject):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        return {check.name: check for check in doctor.examine(tmp_path, **subject)}

    return examine


def test_doctor_knows_what_the_cache_holds(checks, home, tmp_path):
    found = checks(model="some/tiny")["weights some/tiny"]
    assert found.state == "ok" and found.found.endswith(f"whole, revision {COMMIT}")
    shutil.copytree(home, tmp_path / "copy", symlinks=True)
    (weights,) = (tmp_path / "copy").rglob("unet/diffusion_pytorch_model.safetensors")
    os.truncate(weights.resolve(), 1000)
    found = checks(tmp_path / "copy", model="some/tiny")["weights some/tiny"]
    assert (found.state, found.mend) == (
        "wrong",
        "fetch it again: hf download some/tiny",
    ) and "cut short" in found.found


def test_doctor_says_how_to_get_a_gated_model(checks, home, tmp_path):
    found = checks(model="flux-dev")
    assert found["weights flux-dev"].state == "wrong" and f"licence on {FLUX}" in found["weights flux-dev"].mend
    assert "34 GB of weights" in found["GPU for flux-dev"].mend + found["GPU for flux-dev"].found
    (tmp_path / "token").write_text(TOKEN)
    assert "licence" not in checks(tmp_path, model="flux-dev")["weights flux-dev"].mend
    with pytest.raises(HiresError, match="did you mean 'flux-dev'"):
        checks(model="fluxdev")


def test_doctor_checks_what_a_configuration_needs(checks):
    found = checks(config=ROOT / "config/paper.yaml")
    assert {"weights flux-dev", "weights sdxl", "adapter scale-dit, flux-dev", "Inception"} <= set(found)
    assert found["prompts"].state == "wrong" and "'data/laion' does not exist" in found["prompts"].found
    assert found["encoders openai/clip-vit-large-patch14"].state == "note"
    assert found["disk of results"].state == "wrong" and "GiB" in found["disk of results"].mend
    embedded = checks(config=ROOT / "config/smoke.yaml")
    assert doctor.runs(list(embedded.values())) and {f"weights {name}" for name in doctor.EMBEDDED} <= set(embedded)


# --- prompts from a data set of the hub

DRAW = """
import json, sys
from hires.config import Prompts
from hires.errors import HiresError
from hires.data.prompts import draw_prompts, read_prompts
for address in sys.argv[2:]:
    try:
        draw_prompts(Prompts(n=3), address, sys.argv[1])
        print(json.dumps([prompt.prompt for prompt in read_prompts(sys.argv[1])]))
    except HiresError as error:
        print(json.dumps(str(error)))
"""


def test_prompts_are_drawn_from_a_data_set(tmp_path):
    columns = {"URL": [f"http://x/{i}" for i in range(9)], "TEXT": [f"number {i}" for i in range(9)]}
    (tmp_path / "data" / "part").mkdir(parents=True)
    pq.write_table(pa.table(columns), tmp_path / "data" / "part" / "0.parquet")
    draw_prompts(Prompts(n=3), tmp_path / "data", tmp_path / "here.parquet")

    def refuse(path, token):
        gated = {"X-Error-Code": "GatedRepo"}
        return (401, gated) if path.startswith(("api/datasets/some/gated", "datasets/some/gated")) else None

    names = ["laion", "laion@main/part/*.parquet", "gated", "none"]
    with serve({"datasets/some/laion": tmp_path / "data"}, refuse) as hub:
        addresses = [f"hf://datasets/some/{name}" for name in names]
        said = run(DRAW, [str(tmp_path / "p.parquet"), *addresses], tmp_path, hub.address)
    expected = [prompt.prompt for prompt in read_prompts(tmp_path / "here.parquet")]
    assert said[:2] == [expected, expected]
    assert "accept the licence on https://huggingface.co/datasets/some/gated" in said[2]
    assert "no such repository: check the name at https://huggingface.co/datasets/some/none" in said[3]


def test_the_published_layout_is_read(tmp_path):
    """FLUX.1's repository: CLIP's vocabulary in two files, a tokenizer class of older transformers, absent parts."""
    folder = tmp_path / "published"
    shutil.copytree(ASSETS / "tiny-flux", folder)
    whole = folder / "tokenizer" / "tokenizer.json"
    words = json.loads(whole.read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in words["merges"]]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words["vocab"]))
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    whole.unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"tokenizer_2": ["transformers", "T5TokenizerFast"], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    ours, theirs = hires.load("tiny-flux", "cpu").pipe, hires.load(folder, "cpu").pipe
    for name in ("tokenizer", "tokenizer_2"):
        one, other = (getattr(pipe, name)("three red discs").input_ids for pipe in (ours, theirs))
        assert one == other
