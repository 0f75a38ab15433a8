"""`hires speed`: parts and their files, steps by the real cascade, FLOP, images composed of parts, promotion."""

import json
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from hires import load
from hires.attention import use_attention
from hires.cli import main
from hires.config import load_config
from hires.errors import HiresError
from hires.execution.compilation import COMPILED
from hires.execution.graphs import Graphs
from hires.figures.speed import against_size
from hires.files.storage import read_json, write_json
from hires.speed import flop, parts, settings, steps, summary
from hires.speed.free import without_attention
from hires.speed.steps import CONTENDERS
from hires.stages.arithmetic import ARCHITECTURES, step_flop

ROOT = Path(__file__).parents[1]
CONFIG = """
repeats: 1
models: {flux-dev: &m {dtype: bfloat16, sizes: [1024, 2048], contenders: [scalediff], check: 2048}}
without_gpu:
  tiny-flux:
    dtype: float32
    sizes: [128, 256]
    contenders: [scalediff, multidiffusion, dense, scale-dit, attention-free]
    check: 256
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with every part of one tiny model."""
    folder = tmp_path_factory.mktemp("speed")
    (folder / "speed.yaml").write_text(CONFIG)
    assert main(["speed", "--device", "cpu", "--config", str(folder / "speed.yaml"), "--out", str(folder)]) == 0
    return folder / "cpu"


def test_every_part_has_a_file_and_every_contender_a_step(measured):
    names = {"tiny-flux-128", "tiny-flux-256", "tiny-flux-text", "tiny-flux-image", "tiny-flux-options"}
    assert {path.stem for path in (measured / "parts").glob("*.json")} == names
    part = read_json(measured / "parts" / "tiny-flux-256.json")
    assert part["complete"] and part["machine"]["gpu"] is None
    assert not [row for row in part["rows"] if "reason" in row]
    timed = {row["contender"]: row for row in part["rows"] if row["what"] == "step"}
    assert set(timed) == {"scalediff", "multidiffusion", "dense", "scale-dit", "attention-free"}
    assert timed["multidiffusion"]["view_batch"] in (1, 3)  # of 9 views
    assert timed["multidiffusion"]["flop"] > timed["dense"]["flop"] > timed["attention-free"]["flop"]
    for name in ("steps.md", "images.csv", "ratios.md", "flop.md", "check.md"):
        assert (measured / "tables" / name).is_file()
    assert "tiny architectures on a CPU" in (measured / "tables" / "ratios.md").read_text()
    assert {path.name for path in (measured / "figures").glob("*.png")} == {
        "speed-steps.png", "speed-images.png", "speed-flop.png", "speed-tokens.png"
    }  # fmt: skip


def test_finished_parts_are_not_measured_again(measured):
    speed = settings.load_speed(measured.parent / "speed.yaml")
    model, part = speed.without_gpu["tiny-flux"], settings.Part("tiny-flux-128", "tiny-flux", "steps", 128)
    assert parts.finished(measured, part, parts.settings_key(part, speed, model))
    more = speed.model_copy(update={"repeats": 2})
    assert not parts.finished(measured, part, parts.settings_key(part, more, model))
    cut, place = settings.Part("cut", "tiny-flux", "steps", 128), measured / "parts" / "cut.json"
    write_json(place, read_json(measured / "parts" / "tiny-flux-128.json") | {"complete": False})
    assert not parts.finished(measured, cut, parts.settings_key(part, speed, model))
    place.unlink()


def test_the_plan_needs_no_gpu_and_says_how_long(capsys):
    assert main(["speed", "--plan", "--config", str(ROOT / "config" / "speed.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["flux-dev-1024", "about", "36", "s", "on", "an", "H200"]
    assert lines[-1].startswith("flux-dev-gpus") and lines[-1].endswith("on two H200s")
    assert {line.split()[0] for line in lines} >= {"flux-dev-8192", "sdxl-4096", "sdxl-text", "flux-dev-image"}


def test_a_step_is_timed_after_the_first_and_once_where_it_is_slow():
    watch = steps.Watch(torch.device("cpu"), repeats=2, patience=10)
    for step in (1, 2):
        watch("stage-1", step, 5, torch.zeros(1))
        time.sleep(0.02)
    with pytest.raises(steps.Enough):
        watch("stage-1", 3, 5, torch.zeros(1))
    assert len(watch.times) == 2 and watch.times[1] > 0.019
    slow = steps.Watch(torch.device("cpu"), repeats=2, patience=0.01)
    slow("stage-1", 1, 5, torch.zeros(1))
    time.sleep(0.02)
    with pytest.raises(steps.Enough):
        slow("stage-1", 2, 5, torch.zeros(1))


def test_steps_that_make_a_graph_ready_are_not_timed(monkeypatch):
    watch = steps.Watch(torch.device("cpu"), repeats=1, patience=10)
    for step in (1, 2, 3):
        monkeypatch.setattr(Graphs, "prepared", Graphs.prepared + 1)
        watch("stage-1", step, 5, torch.zeros(1))
    monkeypatch.setattr(Graphs, "replayed", Graphs.replayed + 1)
    with pytest.raises(steps.Enough):
        watch("stage-1", 4, 5, torch.zeros(1))
    assert len(watch.times) == 1 and watch.graph


@pytest.mark.gpu
def test_a_short_step_is_a_replay():
    backbone = load("tiny-sdxl", torch.device("cuda"), "bfloat16")
    COMPILED.add(backbone.model)
    step = steps.timed_step(backbone, steps.CONTENDERS["scalediff"], 256, repeats=3, patience=10)
    assert step["graph"] and len(step["times"]) == 3 and 0.01 < step["busy"] < 1


@pytest.mark.gpu
def test_how_busy_a_gpu_is():
    """Small kernels wait for the host; a step that is slower than the patience isn't profiled."""
    backbone = load("tiny-flux", torch.device("cuda"))
    step = steps.timed_step(backbone, steps.CONTENDERS["scalediff"], 256, repeats=3, patience=10)
    assert 0.01 < step["busy"] < 1 and len(step["times"]) == 3 and not step["graph"]
    assert steps.timed_step(backbone, steps.CONTENDERS["scalediff"], 256, repeats=3, patience=0)["busy"] is None


@pytest.mark.parametrize("model", ["flux-dev", "sdxl"])
def test_counted_flop_of_the_full_models(model):
    """Against an independent count from the architectures' numbers (`hires.stages.arithmetic`)."""
    backbone = load(model, "meta", "bfloat16", weights="random")
    backbone.schedule = load(f"tiny-{model.split('-')[0]}", "cpu", weights="random").schedule  # with numbers in it
    texts = {"flux-dev": ((512, 4096), (768,)), "sdxl": ((77, 2048), (1280,))}[model]
    tensors = dict(
        zip(
            ("prompt_embeds", "pooled_prompt_embeds"), (torch.empty(1, *shape, dtype=torch.bfloat16) for shape in texts)
        )
    )
    negative = {f"negative_{name}": x for name, x in tensors.items()} if model == "sdxl" else {}
    backbone.encode_prompt = lambda prompts, sampling: {**tensors, **negative}
    names = ["scalediff", "multidiffusion", "dense"] + ["scale-dit"] * (model == "flux-dev")
    for name in names:
        contender = CONTENDERS[name]
        counted = flop.step(backbone, contender, 2048)["flop"]
        expected = step_flop(
            ARCHITECTURES[model], (2048, 2048), (1024, 1024), contender.variant, backbone.defaults
        )  # fmt: skip
        assert counted == pytest.approx(expected, rel=0.01)
    flop._twin.cache_clear()


def test_the_papers_formula():
    """ScaleDiff's table at s = 4, a base pass of 10 of which attention 4."""
    found = {name: flop.by_formula(name, 10, 4, 4) for name in ("dense", "multidiffusion", "scalediff", "scale-dit")}
    assert found == {"dense": 6 * 16 + 4 * 256, "multidiffusion": 10 * 49, "scalediff": 160, "scale-dit": None}


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sdxl"])
def test_attention_left_out_is_the_value_and_comes_back(model):
    backbone = load(model, "cpu", weights="random")
    layer = "transformer_blocks.0.attn" if model == "tiny-flux" else "mid_block.attentions.0.transformer_blocks.0.attn1"
    attention = backbone.model.get_submodule(layer)
    former = attention.processor
    x = torch.randn(1, 6, attention.to_q.in_features)
    text = (torch.randn(1, 2, attention.to_q.in_features),) if model == "tiny-flux" else ()
    with torch.no_grad(), without_attention(backbone.model), use_attention(backbone.model, "dense", (4, 4), (4, 4)):
        found = attention(x, *text)
        expected = attention.to_out[0](attention.to_v(x))
    torch.testing.assert_close(found[0] if text else found, expected)
    assert attention.processor is former


def write_part(folder, kind, size, rows, gpu="NVIDIA H200"):
    name = f"flux-dev-{size or kind}"
    machine = {"gpu": gpu, "cpu": "CPU", "packages": {"torch": "2", "triton": "3"}, "commit": "abc", "dirty": False}
    part = {
        "part": name, "model": "flux-dev", "kind": kind, "size": size, "base": 1024, "dtype": "bfloat16", "key": "",
        "compiled": True, "complete": True, "time": "", "machine": machine,
        "rows": [{"contender": c, "what": w, "seconds": s, "times": [s], "flop": 1} for c, w, s in rows],
    }  # fmt: skip
    write_json(folder / "parts" / f"{name}.json", part)


@pytest.fixture
def on_gpu(tmp_path):
    """Parts as a GPU would leave them, with round numbers."""
    write_part(tmp_path, "text", 0, [("CLIP-L", "text", 0.25), ("T5-XXL", "text", 0.75)])
    write_part(tmp_path, "steps", 1024, [("base", "step", 0.1), ("", "encode", 0.2), ("", "decode", 0.3)])
    for size, own, other in ((2048, 0.5, 1), (4096, 2, 6)):
        steps_of = [("scalediff", "step", own), ("multidiffusion", "step", other), ("dense", "step", other)]
        low = [("scale-dit", "step", own), ("scale-dit", "low-resolution pass", 0.5)]
        write_part(tmp_path, "steps", size, [*steps_of, *low, ("", "encode", size / 1024), ("", "decode", size / 512)])
    return tmp_path


def test_images_are_sums_of_their_parts(on_gpu):
    rows = summary.measurements(on_gpu)
    images = summary.composed(rows).set_index(["setting", "contender", "size"])["seconds"]
    common = 1 + 30 * 0.1 + (0.3 + 2) + (4 + 4) + 8  # text, base, VAE of both stages, the last decode
    assert images["equal steps", "scalediff", 4096] == pytest.approx(common + 18 * 0.5 + 18 * 2)
    assert images["equal steps", "multidiffusion", 4096] == pytest.approx(common + 18 * 1 + 18 * 6)
    jump = 1 + 30 * 0.1 + 0.3 + 4 + 8
    assert images["equal steps", "scale-dit", 4096] == pytest.approx(jump + 0.5 + 18 * 2)
    assert images["equal steps", "dense-jump", 4096] == pytest.approx(jump + 18 * 6)
    assert images["the papers' own", "scale-dit", 4096] == pytest.approx(jump - 0.2 + 0.5 + 18 * 2)
    assert images["the papers' own", "dense-direct, 28 steps", 4096] == pytest.approx(1 + 28 * 6 + 8)
    found = summary.ratios(rows, summary.composed(rows)).set_index(["size", "figure"])
    assert found.loc[(4096, "scalediff step, multidiffusion ÷ scalediff"), "factor"] == "3"
    assert found.loc[(4096, "scale-dit step, dense ÷ scale-dit"), "published"] == "2.29"


def test_a_part_that_was_cut_is_named(on_gpu):
    path = on_gpu / "parts" / "flux-dev-4096.json"
    assert "cut" not in summary.footnote(summary.measurements(on_gpu))
    write_json(path, read_json(path) | {"complete": False})
    assert summary.footnote(summary.measurements(on_gpu)).endswith("random weights; cut short: flux-dev-4096")


def test_an_image_without_all_its_parts_has_no_row(on_gpu):
    (on_gpu / "parts" / "flux-dev-2048.json").unlink()
    images = summary.composed(summary.measurements(on_gpu))
    assert "scalediff" not in set(images["contender"])
    assert "scale-dit" in set(images["contender"])


def test_promotion_takes_a_gpus_parts_and_writes_the_readme(on_gpu, tmp_path):
    target, readme = tmp_path / "reference", tmp_path / "README.md"
    readme.write_text("before\n<!-- speed: … -->\nold\n<!-- /speed -->\nafter\n")
    summary.promote(on_gpu, target, readme)
    assert (target / "parts" / "flux-dev-4096.json").is_file() and (target / "tables" / "ratios.md").is_file()
    text = readme.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "multidiffusion ÷ scalediff" in text and "NVIDIA H200" in text
    write_part(on_gpu, "text", 0, [("all", "text", 1.0)], gpu=None)
    with pytest.raises(HiresError, match="without a GPU"):
        summary.promote(on_gpu, target, readme)


@pytest.mark.parametrize("values", [[33.7, 44.8], [1.35, 6.5], [0.1, 60.0]])
def test_an_axis_has_figures_however_short_it_is(values):
    table = pd.DataFrame({"model": "flux-dev", "contender": ["dense", "scalediff"], "size": 4096, "value": values})
    (place,) = against_size(table, "seconds").axes
    low, high = place.get_ylim()
    figures = [label.get_text() for label in place.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert len(figures) >= 3 and all(float(figure) > 0 for figure in figures)


@pytest.mark.parametrize("pair", [("dense", "scalediff"), ("scalediff-fp8", "scalediff-fast"), ("base-fp8", "base")])
def test_lines_that_fall_together_are_both_seen(pair):
    table = pd.DataFrame({"model": "flux-dev", "contender": pair, "size": 4096, "value": 1.0})
    (place,) = against_size(table, "seconds").axes
    below, above = sorted(place.lines, key=lambda line: line.get_zorder())
    assert below.get_linewidth() > above.get_linewidth() and below.get_markersize() > above.get_markersize()


def test_the_readme_says_what_was_promoted():
    text = (ROOT / "README.md").read_text()
    assert summary.in_readme(text, ROOT / "results" / "reference" / "speed") == text


def test_the_notebook_runs_on_the_parts(measured, tmp_path, monkeypatch):
    import papermill  # which a machine for GPU tests may lack

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    papermill.execute_notebook(
        ROOT / "notebooks" / "06_speed.ipynb",
        tmp_path / "06_speed.ipynb",
        {"results": str(measured)},
        kernel_name="python3",
        cwd=ROOT,
        progress_bar=False,
    )
    cells = json.loads((tmp_path / "06_speed.ipynb").read_text())["cells"]
    assert any("multidiffusion ÷ scalediff" in str(cell.get("outputs")) for cell in cells)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "tiny-flux-tex"], "unknown part 'tiny-flux-tex': did you mean 'tiny-flux-text'"),
        (["--config", "nowhere.yaml"], "configuration nowhere.yaml does not exist"),
        (["--device", "tpu"], "--device tpu: allowed: cuda, cpu"),
        (["tables", "--out", "nowhere"], "no measured part: run `hires speed`"),
        (["tune", "--shapes", "sdxl1"], "--shapes means nothing to hires speed tune: allowed: --device, --kernels"),
        (["kernels", "--plan"], "--plan means nothing to hires speed kernels"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["speed", *(["--device", "cpu"] if "--device" not in arguments else []), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {}\nwithout_gpu: {}\nrepeat: 3\n", "unknown key 'repeat': did you mean 'repeats'"),
        ("- a\n", "must be a mapping of keys"),
        (CONFIG.replace("repeats: 1", "repeats: 0"), "repeats = 0: input should be greater"),
    ],
)
def test_a_bad_file_is_one_line(text, message, tmp_path):
    (tmp_path / "speed.yaml").write_text(text)
    with pytest.raises(HiresError, match=message):
        settings.load_speed(tmp_path / "speed.yaml")


def test_the_default_configuration_is_not_that_of_speed():
    assert "06_speed" not in load_config(ROOT / "config" / "config.yaml").notebooks
