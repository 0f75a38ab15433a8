"""The README's examples on a user's own pipeline, run as they stand, in their tiny form."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from extended import controlnet, image_encoder, ip_adapter, picture
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from hires.additions.lora import WEIGHTS, save_lora
from hires.files.storage import write_json
from hires.models import build_pipeline

README = Path(__file__).parents[1] / "README.md"
HINTS = {
    "base_resolution": 128,
    "size_multiple": 32,
    "sampling": {"num_inference_steps": 2, "tau": 500, "max_sequence_length": 40},
}
TINY = {"2048": "192", "1024": "128", "4096": "384"}  # sides in pixels
ON_A_CPU = {
    "enable_model_cpu_offload()": 'enable_model_cpu_offload(device="cpu")',
    "compile_repeated_blocks()": 'compile_repeated_blocks(backend="eager")',
}


def blocks():
    section = README.read_text().split("## On your own pipeline")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Everything that the examples name."""
    monkeypatch.chdir(tmp_path)
    pipe = build_pipeline("tiny-flux")
    transformer = pipe.transformer
    transformer.transformer_blocks = transformer.transformer_blocks[:1]
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[:1]
    transformer.register_to_config(num_layers=1, num_single_layers=1)
    pipe.save_pretrained("model")
    write_json(Path("model/hires.json"), HINTS)
    controlnet("tiny-flux", pipe).save_pretrained("controlnet")
    image_encoder().save_pretrained("clip")
    Path("ip-adapter").mkdir()
    parts = ip_adapter("tiny-flux", pipe).items()
    tensors = {f"{kind}.{name}": tensor for kind, part in parts for name, tensor in part.items()}
    save_file(tensors, "ip-adapter/ip_adapter.safetensors")
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "ink")
    save_lora(pipe, tmp_path, "ink")
    Path(WEIGHTS).rename("ink.safetensors")
    for name in ("photo", "style", "edges"):
        picture(150, 150).save(f"{name}.png")
    return tmp_path


def test_every_example_runs(folder, capsys):
    pipe = FluxPipeline.from_pretrained("model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names, made = {"pipe": pipe}, []
    for code in blocks():
        for old, new in (TINY | ON_A_CPU).items():
            code = code.replace(old, new)
        # Statement by statement, to see what each one makes.
        for part in code.split("\n\n"):
            exec(part, names)
            made += names.get("images", []) and [[image.size for image in names.pop("images", [])]]
    assert [len(sizes) for sizes in made] == [1, 4, 1, 1, 1, 1, 1, 1]
    assert made[0] == [(192, 192)] and made[6] == [(192, 192)]
    assert "noise 2 2" in capsys.readouterr().out
    assert Image.open("base.png").size == (64, 64)
