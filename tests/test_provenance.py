"""What leads from an image to all that made it."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig

from hires import layout
from hires.adapters import adapter_digests
from hires.config import load_config
from hires.models import HINTS, build_pipeline
from hires.stages import base, images, models, prompts
from hires.storage import read_json, sha256, write_json

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
