"""The examples of README.md, docs/kernels.md and results/README.md, run as they stand, or in their tiny form."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from extended import controlnet, image_encoder, ip_adapter, picture
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from hires import figures
from hires.additions.lora import WEIGHTS, save_lora
from hires.analysis.results import where
from hires.files.storage import write_json
from hires.models import build_pipeline

ROOT = Path(__file__).parents[1]
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


def blocks(page, section):
    text = (ROOT / page).read_text().split(section)[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


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
    for code in blocks("README.md", "## On your own pipeline"):
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


def test_the_kernels_example_runs(capsys):
    (code,) = blocks("docs/kernels.md", "# Kernels")
    exec(code, names := {})
    assert names["image"].shape == (1, 64 * 96, 4, 64) and names["text_rows"].shape == (1, 77, 4, 64)
    assert "'local_attention': ['" in capsys.readouterr().out


def test_a_reference_figure_is_redrawn_as_told(tmp_path, monkeypatch):
    """And the rows that are told apart are those that the README quotes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(figures.LOOKS, "scalediff", figures.LOOKS["scalediff"])  # all put back afterwards
    monkeypatch.setitem(figures.RC, "font.size", figures.RC["font.size"])
    monkeypatch.setitem(figures.RC, "font.family", "sans-serif")
    (code,) = blocks("results/README.md", "## Redraw")
    exec(code.replace("results/mine", str(tmp_path)), names := {})
    assert (tmp_path / "figures" / "three.png").stat().st_size > 10_000
    rows = where(names["pairs"], study="variants", setting="default", metric="kid_patch", a="upsample")
    quoted = [f"−{row.difference:.2f} [−{row.high:.2f}, −{row.low:.2f}]" for row in rows.itertuples()]
    assert len(quoted) == 2 and " | ".join(quoted) in (ROOT / "README.md").read_text()
