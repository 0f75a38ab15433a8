"""What leads from an image to all that made it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig

import hires
from hires import layout
from hires.additions.adapters import adapter_digests
from hires.config import load_config
from hires.errors import HiresError
from hires.files.storage import read_json, read_sealed, sha256, write_json
from hires.models import HINTS, build_pipeline
from hires.provenance.schema import SCHEMA, Manifest, Provenance, Record, json_schema
from hires.stages import VERSIONS, base, images, models, prompts, provenance

CONFIG = """
name: traced
prompts: {n: 2, scenes: {pool: 8}}
backbones:
  flux: {model: model, base_resolution: 128, size_multiple: 32, sampling: {num_inference_steps: 2, tau: 500}}
studies:
  main: {backbones: [flux], variants: [direct, npa], sizes: {192x192: 2}, seeds: [3]}
compute: {device: cpu}
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A folder with the images of a configuration."""
    folder = tmp_path_factory.mktemp("traced")
    build_pipeline("tiny-flux").save_pretrained(folder / "model")
    write_json(folder / "model/hires.json", HINTS["tiny-flux"])
    (folder / "traced.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = load_config("traced.yaml")
        prompts.run(config)
        base.run(config, "flux", layout.base_sets(config)[0].name, 0)
        images.run(config, "main", "flux", 192, 192, 0)
    return folder


@pytest.fixture
def config(traced, monkeypatch):
    monkeypatch.chdir(traced)
    return load_config("traced.yaml")


def test_a_record_leads_to_the_files_of_the_model_and_to_what_ran(config):
    origins = {}
    for made in config.image_sets():
        for path in layout.image_shard(config, made, 0).parent.glob("*-3.png.json"):
            origins[made.variant] = read_json(path)["provenance"]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    for origin in origins.values():
        assert origin["device"] == "cpu" and origin["adapters"] == {}
        assert origin["files"][weights] == sha256(config.root.parents[1] / "model" / weights)
        assert {"model_index.json", "vae/config.json", "hires.json"} <= origin["files"].keys()
    ran = {"neighborhood_patch_attention": ["sdpa"], "qk_norm_rope": ["sdpa"]}
    assert origins["npa"]["attention"] == {"operations": ran, "launches": []}
    assert origins["direct"]["attention"] == {"operations": {}, "launches": []}


def test_large_files_of_the_hubs_cache_are_not_read_again(tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / ("ab" * 32)).write_bytes(b"not read")
    (blobs / ("cd" * 20)).write_bytes(b"small, named by git")
    snapshot = tmp_path / "snapshots/revision"
    snapshot.mkdir(parents=True)
    (snapshot / "weights.safetensors").symlink_to(blobs / ("ab" * 32))
    (snapshot / "config.json").symlink_to(blobs / ("cd" * 20))
    assert models.folder_digests(snapshot) == {
        "weights.safetensors": "ab" * 32,
        "config.json": sha256(blobs / ("cd" * 20)),
    }


def test_records_and_manifests_follow_the_schema(config):
    provenance.run(config)
    whole = Provenance.of(read_json(layout.provenance(config)), "whole")
    assert whole.images.seeds == [3] and whole.stages == VERSIONS and whole.models["flux"].files
    assert len(whole.runs) == 3  # base, direct, npa
    for made in config.image_sets():
        path = layout.image_shard(config, made, 0)
        manifest = Manifest.of(read_sealed(path), path)
        for entry in manifest.images:
            record = Record.of(read_sealed(path.parent / f"{entry.file}.json"), entry.file)
            assert record.provenance in manifest.provenance and record.provenance in whole.runs
            assert record.provenance.model == whole.models["flux"].model
            assert record.sha256 == entry.sha256 and record.peak_bytes > 0 and record.stages[-1].name == "decode"


@pytest.mark.parametrize(
    "change, told",
    [
        ({"tempo": 1}, "tempo: extra inputs are not permitted: hires 0.0.9 wrote it, this is 0.1.0"),
        ({"sha256": None}, "sha256: input should be a valid string"),
        ({"provenance": 1}, "provenance: input should be a valid dictionary or instance of Origin: another version of"),
    ],
)
def test_another_kind_of_record_is_told_in_a_line(config, change, told):
    path = sorted(config.root.glob("images/**/*.png.json"))[0]
    record = read_sealed(path)
    record["provenance"] = {**record["provenance"], "hires": "0.0.9"}
    with pytest.raises(HiresError, match=f"^{path}: {told}"):
        Record.of({**record, **change}, path)


def test_records_of_an_older_hires_are_read(config):
    """What came later has a default."""
    path = sorted(config.root.glob("images/**/*.png.json"))[0]
    record = read_sealed(path)
    for name in ("device", "files", "adapters", "attention"):
        del record["provenance"][name]
    assert Record.of(record, path).provenance.attention is None


def test_the_stored_schema_is_that_of_the_models():
    assert (Path(__file__).parents[1] / SCHEMA).read_text() == json_schema(), "run python -m hires.provenance.schema"


# --- adapters -------------------------------------------------------------------------------------------------------


def lora(pipe, name, seed, part="transformer", targets=("to_q", "to_v")):
    torch.manual_seed(seed)
    getattr(pipe, part).add_adapter(LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False), name)
    return pipe


def test_digests_tell_adapters_apart():
    pipe = build_pipeline("tiny-flux")
    assert adapter_digests(pipe) == {}
    one = adapter_digests(lora(build_pipeline("tiny-flux"), "style", 0))
    assert list(one) == ["style"] and len(one["style"]) == 64
    assert adapter_digests(lora(pipe, "style", 0)) == one
    assert adapter_digests(lora(build_pipeline("tiny-flux"), "style", 1)) != one
    assert adapter_digests(lora(build_pipeline("tiny-flux"), "style", 0, targets=("to_q",))) != one
    both = lora(build_pipeline("tiny-flux"), "style", 0)
    assert adapter_digests(lora(both, "style", 0, "text_encoder", ("q_proj",))) != one
    pipe.set_adapters(["style"], [0.5])
    assert adapter_digests(pipe) != one
    pipe.set_adapters(["style"], [1.0])
    assert adapter_digests(pipe) == one


def test_only_what_acts_is_recorded():
    pipe = lora(build_pipeline("tiny-flux"), "style", 0)
    style = adapter_digests(pipe)
    lora(pipe, "scale-dit", 1)
    pipe.set_adapters(["style", "scale-dit"])
    assert adapter_digests(pipe) == style  # variants without it switch it off
    assert adapter_digests(pipe, "scale-dit").keys() == {"style", "scale-dit"}
    pipe.disable_lora()
    assert adapter_digests(pipe) == {}
    assert adapter_digests(pipe, "scale-dit").keys() == {"scale-dit"}


def test_offloaded_weights_give_the_same_digest():
    pipe = lora(build_pipeline("tiny-flux"), "style", 0)
    resident = adapter_digests(pipe)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert any(x.is_meta for x in pipe.transformer.parameters())
    assert adapter_digests(pipe) == resident


def test_a_copy_without_its_history_is_told_its_commit(tmp_path):
    copied = shutil.copytree(Path(hires.__path__[0]), tmp_path / "hires", ignore=shutil.ignore_patterns("assets"))
    code = "from hires import provenance; facts = provenance.machine(); print(facts['commit'], facts['dirty'])"
    told = {}
    for commit in ("", "a1" * 20):
        environment = os.environ | {"PYTHONPATH": f"{copied.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        environment |= {"HIRES_COMMIT": commit} if commit else {}
        command = [sys.executable, "-c", code]
        told[commit] = subprocess.check_output(command, env=environment, cwd=tmp_path, text=True).split()
    assert told == {"": ["None", "None"], "a1" * 20: ["a1" * 20, "None"]}
