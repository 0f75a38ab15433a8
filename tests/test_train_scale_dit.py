"""Training of Scale-DiT adapters: the loss and where its gradient flows, data by number, exact resumption, files."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss

from hires.additions.adapters import SCALE_DIT_ADAPTER as ADAPTER
from hires.additions.adapters import adapter_switched
from hires.additions.lora import WEIGHTS, load_lora, save_lora
from hires.attention import low_resolution_pass, use_attention
from hires.backbones import load
from hires.backbones.flux import pack
from hires.backbones.loading import revision
from hires.cli import main
from hires.errors import HiresError
from hires.models import ASSETS
from hires.training.captioned import open_source
from hires.training.data import draw_views
from hires.training.scale_dit.data import Passes, times
from hires.training.scale_dit.loss import Batch, add_adapter, checkpointed, velocity_loss
from hires.training.scale_dit.recipe import ATTENTION_TARGETS, Lora, Optimizer, Recipe, Timestep
from hires.training.scale_dit.trainer import CHECKPOINT, VALIDATION, Trainer, build_optimizer, rate, train

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PUBLISHED = [*ATTENTION_TARGETS, "x_embedder", "norm1.linear", "ff.net.2", "norm.linear", "proj_mlp", "proj_out"]
SHARES = {"whole": 0.5, "close_up": 0.3, "careless": 0.1}
SMALL = {
    "model": "tiny-flux",
    "weights": "random",
    "size": 128,
    "sampling": {"lr_ratio": 4, "local_radius": 2},
    "steps": 4,
    "batch": 2,
    "log_every": 3,
    "checkpoint_every": 2,
}


def recipe(**keys):
    return Recipe.model_validate(SMALL | keys)


@pytest.fixture
def backbone():
    return load("tiny-flux", CPU, weights="random")


def with_lora(backbone, targets=PUBLISHED, rank=4, alpha=8.0, seed=0):
    """The backbone with a LoRA whose product isn't zero, and its parameters."""
    parameters = add_adapter(backbone, Lora(rank=rank, alpha=alpha, targets=targets), seed)
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return parameters


def batch_of(n=2, side=16, low=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(n, *shape, generator=generator)

    t = torch.rand(n, generator=generator)
    return Batch(draw(16, side, side), draw(16, low, low), draw(16, side, side), t, draw(6, 128), draw(128))


# The loss


def test_the_loss_is_that_of_the_velocity_which_inference_predicts(backbone):
    """The stage loop's own calls, one image at a time, at the same noise."""
    with_lora(backbone)
    batch, sampling = batch_of(), recipe().sampling.over(backbone.defaults)
    terms = []
    for i in range(2):
        z, low, noise, t, embeds, pooled = (x[i : i + 1] for x in batch)
        text = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        with adapter_switched(backbone.model, ADAPTER, on=True):
            guidance = backbone.low_resolution_guidance(low, (16, 16), text, sampling)
        schedule = SimpleNamespace(timesteps=t * 1000)
        told = sampling.model_copy(update={"guidance_scale": 1.0})
        with (
            torch.no_grad(),
            adapter_switched(backbone.model, ADAPTER, on=False),
            use_attention(backbone.model, "scale_dit", (16, 16), (16, 16), radius=2, guidance=guidance),
        ):
            velocity = backbone.predict((1 - t) * z + t * noise, schedule, 0, text, told, (128, 128))
        terms.append(mse_loss(velocity, noise - z))
    torch.testing.assert_close(velocity_loss(backbone.model, batch, sampling), sum(terms) / 2)


def test_the_gradient_reaches_the_adapter_through_low_resolution_keys_and_values_only(backbone):
    parameters = with_lora(backbone)
    model, batch, sampling = backbone.model, batch_of(), recipe().sampling
    given = torch.autograd.grad(velocity_loss(model, batch, sampling), parameters, allow_unused=True)
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if ADAPTER not in n)

    with adapter_switched(model, ADAPTER, on=True):
        options = {"low_size": (4, 4), "size": (16, 16), "radius": 2}
        low = low_resolution_pass(model, pack(batch.low), batch.pooled, **options)
    flat = [x for pair in low.layers for x in pair]
    leaves = [x.detach().requires_grad_() for x in flat]
    low.layers = list(zip(leaves[::2], leaves[1::2]))
    noisy = torch.lerp(batch.latents, batch.noise, batch.t[:, None, None, None])
    with (
        adapter_switched(model, ADAPTER, on=False),
        use_attention(model, "scale_dit", (16, 16), (16, 16), radius=2, guidance=low),
    ):
        rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        places = torch.stack([torch.zeros(64), rows.flatten(), columns.flatten()], 1)
        output = model(
            pack(noisy), batch.prompt_embeds, batch.pooled, batch.t, places, torch.zeros(6, 3), torch.ones(2),
            return_dict=False,
        )[0]  # fmt: skip
    arriving = torch.autograd.grad(mse_loss(output, pack(batch.noise - batch.latents)), leaves)
    expected = torch.autograd.grad(flat, parameters, arriving, allow_unused=True)
    for ours, theirs in zip(given, expected):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    names = [n for n, _ in model.named_parameters() if ADAPTER in n]
    unused = {name for name, g in zip(names, given) if g is None}
    assert unused and all(name.startswith(("single_transformer_blocks.4", "proj_out")) for name in unused)


def test_gradient_checkpointing_changes_no_gradient(backbone):
    parameters = with_lora(backbone)
    model, batch, sampling = backbone.model, batch_of(), recipe().sampling
    runs = []
    model.single_transformer_blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        runs.clear()
        return torch.autograd.grad(velocity_loss(model, batch, sampling), parameters, allow_unused=True)

    plain, plain_runs = gradients(), len(runs)
    model.enable_gradient_checkpointing(checkpointed)
    again, again_runs = gradients(), len(runs)
    assert (plain_runs, again_runs) == (2, 4)
    for a, b in zip(plain, again):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    former = {type(module.processor).__name__ for module in model.modules() if hasattr(module, "processor")}
    assert former == {"FluxAttnProcessor"}
    low = low_resolution_pass(model, pack(batch.low), batch.pooled, low_size=(4, 4), size=(16, 16), radius=2)
    torch.autograd.grad(low.layers[-1][0].sum(), parameters, allow_unused=True)
    assert len(low.layers) == 7  # the second run adds none


def test_the_loss_falls_on_one_batch():
    backbone = load("tiny-flux", CPU)
    parameters = add_adapter(backbone, Lora(), seed=0)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    batch, losses = batch_of(n=1)._replace(t=torch.tensor([0.6])), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = velocity_loss(backbone.model, batch, recipe().sampling)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_the_adapter_begins_without_effect_and_knows_its_targets(backbone):
    parameters = add_adapter(backbone, Lora(rank=3, targets=PUBLISHED), seed=5)
    names = [n for n, _ in backbone.model.named_parameters() if ADAPTER in n]
    assert all((p == 0).all() == ("lora_B" in name) for name, p in zip(names, parameters))
    a = torch.cat([p.flatten() for name, p in zip(names, parameters) if "lora_A" in name])
    assert abs(a.std().item() - 1 / 3) < 0.02  # Gaussian with deviation 1 / rank, as diffusers' trainers have it
    assert any("x_embedder" in name for name in names) and not any("context" in name for name in names)
    with pytest.raises(HiresError, match="did you mean 'to_q'"):
        add_adapter(load("tiny-flux", CPU, weights="random"), Lora(targets=["to_qq"]), 0)


# Draws and data


def test_times_are_shifted_logit_normals():
    normal = torch.linspace(-3, 3, 7)
    x = np.exp(0.5 + 2 * normal.numpy())
    np.testing.assert_allclose(times(normal, Timestep(mean=0.5, std=2.0)).numpy(), x / (1 + x), rtol=1e-5)
    t = 1 / (1 + np.exp(-normal.numpy()))
    shifted = 3 * t / (1 + 2 * t)
    np.testing.assert_allclose(times(normal, Timestep(shift=3.0)).numpy(), shifted, rtol=1e-5)


def test_a_sample_depends_on_its_number_alone():
    source = open_source("scenes", 128, 1, SHARES)
    one = Passes(recipe(batch=1), source, (16, 16, 16), (4, 4), 0)
    two = Passes(recipe(batch=2), source, (16, 16, 16), (4, 4), 0)
    (pictures, draws), alone = two[1], [one[2], one[3]]
    assert pictures.captions == [p.captions[0] for p, _ in alone]
    assert pictures.scenes == [p.scenes[0] for p, _ in alone]
    for whole, *parts in zip(draws, *(d for _, d in alone)):
        assert torch.equal(whole, torch.cat(parts))
    _, other = Passes(recipe(batch=2), source, (16, 16, 16), (4, 4), VALIDATION)[1]
    assert not torch.equal(draws.noise, other.noise)
    _, many = Passes(recipe(batch=2000, caption_drop=0.1), None, (1, 1, 1), (1, 1), 0)[0]
    assert 0.07 < many.drop.float().mean() < 0.13
    assert abs(many.noise.mean()) < 0.1 and abs(many.t.mean() - 0.5) < 0.03


def test_scenes_follow_the_shares():
    views = open_source("scenes", 64, 3, SHARES).pictures(range(300))
    assert views.scenes[7] == open_source("scenes", 64, 3, SHARES).pictures([7]).scenes[0]
    whole = np.mean([camera.zoom == 1 for camera in views.cameras])
    reference = np.mean([camera.zoom == 1 for camera in draw_views(300, 0, **SHARES).cameras])
    assert abs(whole - reference) < 0.12


def picture(seed, width=96, height=80):
    """Colour says the place: red is the column, green the row, blue the image."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, seed)], axis=-1))


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "images"
    (where / "b").mkdir(parents=True)
    for i, name in enumerate(("one.png", "two.webp", "b/three.png")):
        picture(i).save(where / name, lossless=True)
        (where / name).with_suffix(".txt").write_text(f"number {i}\n")
    return where


def check_crops(source, n):
    """Every epoch holds each image once; a crop is a native cut, at another place each time."""
    crops = source.pictures(range(4 * n))
    corners = []
    for image, caption in zip(crops.images, crops.captions):
        assert caption == f"number {image[2, 0, 0]}"
        left, top = int(image[0, 0, 0]), int(image[1, 0, 0])
        rows, columns = np.mgrid[top : top + 64, left : left + 64]
        assert (image[0].numpy() == columns).all() and (image[1].numpy() == rows).all()
        corners.append((left, top))
    for epoch in range(4):
        assert len(set(crops.captions[epoch * n : (epoch + 1) * n])) == n
    assert len(set(corners)) > n
    assert torch.equal(source.pictures([5]).images[0], crops.images[5])
    pixels = crops.render(64, "cpu")
    assert pixels.shape == (4 * n, 3, 64, 64) and pixels.min() >= -1 and pixels.max() <= 1


def test_image_folders(folder):
    check_crops(open_source(str(folder), 64, 0, SHARES), 3)
    with (folder / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["file_name", "text"], ["one.png", "number 0"], ["b/three.png", "number 2"]])
    check_crops(open_source(str(folder), 64, 0, SHARES), 2)


def shard(path, images, captions=True):
    with tarfile.open(path, "w") as archive:
        for i in images:
            data = io.BytesIO()
            picture(i).save(data, "png")
            parts = {f"{i:05d}.png": data.getvalue(), f"{i:05d}.json": b"{}"}
            if captions:
                parts[f"{i:05d}.txt"] = f"number {i}".encode()
            for name, content in parts.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_tar_shards(tmp_path):
    shard(tmp_path / "a-0.tar", [0, 1])
    shard(tmp_path / "a-1.tar", [2])
    check_crops(open_source(str(tmp_path), 64, 0, SHARES), 3)
    check_crops(open_source(str(tmp_path / "a-*.tar"), 64, 0, SHARES), 3)
    check_crops(open_source(str(tmp_path / "a-0.tar"), 64, 0, SHARES), 2)
    shard(tmp_path / "b.tar", [3], captions=False)
    with pytest.raises(HiresError, match=re.escape("00003 needs a .txt member")):
        open_source(str(tmp_path / "b.tar"), 64, 0, SHARES)
    whole = (tmp_path / "a-0.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:3000])
    with pytest.raises(HiresError, match="can't be read"):
        open_source(str(tmp_path / "b.tar"), 64, 0, SHARES)


def test_images_that_do_not_serve(folder):
    def refused(words, size=64, source=None):
        with pytest.raises(HiresError, match=re.escape(words)) as error:
            open_source(str(source or folder), size, 0, SHARES).pictures(range(3))
        assert "\n" not in str(error.value)

    refused("is 96x80: smaller than the crops of 88", size=88)
    (folder / "two.txt").write_bytes("café".encode("latin-1"))
    refused("two.txt is not UTF-8")
    (folder / "two.txt").unlink()
    refused("two.webp has no caption: write two.txt")
    (folder / "metadata.csv").write_text("file,text\none.png,number 0\n")
    refused("needs the columns file_name and text, has file, text")
    (folder / "metadata.csv").write_text("file_name,text\none.png,number 0\ntwo.png,number 1\n")
    refused("two.png is not in")
    (folder / "metadata.csv").write_text("file_name,text\none.png,number 0\n")
    data = (folder / "one.png").read_bytes()
    (folder / "one.png").write_bytes(data[: len(data) // 2])
    refused("one.png can't be read")
    refused("nothing of it there", source=folder / "none")
    (folder / "c").mkdir()
    refused("holds no images", source=folder / "c")


# Runs


def test_only_the_adapter_changes(tmp_path):
    trainer = Trainer(recipe(steps=2, accumulation=2, optimizer={"lr": 1e-2}), tmp_path, CPU)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train(float("inf"), None)
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert all(ADAPTER in name for name in changed)
    assert any("lora_B" in name for name in changed) and any("lora_A" in name for name in changed)


def test_accumulated_passes_are_one_larger_batch(tmp_path):
    halves, whole = (
        Trainer(recipe(batch=n, accumulation=2 // n, lora={"targets": PUBLISHED}), tmp_path, CPU) for n in (1, 2)
    )
    for trainer in (halves, whole):
        for place in range(trainer.recipe.accumulation):
            trainer.run_pass(trainer.encoder.batch(*trainer.passes[place], None))
    assert sum(p.grad.norm() for p in whole.parameters) > 0
    for a, b in zip(halves.parameters, whole.parameters):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(halves.run_pass.total / 2, whole.run_pass.total)


class Interrupted(Exception):
    pass


def interrupt(step):
    if step == 3:
        raise Interrupted


@pytest.mark.parametrize(
    "keys",
    [
        {"ema": 0.9, "accumulation": 2, "validation": {"every": 2, "samples": 2}, "gradient_checkpointing": True},
        {"optimizer": {"name": "prodigy", "warmup": 2, "decay_from": 0.5, "clip": 0.1}, "data": {"pool": 5}},
    ],
    ids=["AdamW", "Prodigy"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, keys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe(**keys), whole, device=CPU)
    with pytest.raises(Interrupted):
        train(recipe(**keys), parts, device=CPU, callback=interrupt)
    assert not (parts / WEIGHTS).exists()
    train(recipe(**keys), parts, device=CPU, resume=parts)
    torch.testing.assert_close(load_file(whole / WEIGHTS), load_file(parts / WEIGHTS), rtol=0, atol=0)
    states = [torch.load(folder / CHECKPOINT) for folder in (whole, parts)]
    assert states[0]["step"] == 4
    for key in ("parameters", "optimizer", "ema", "total", "validation"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    logs = [[(row["step"], row["loss"], row["lr"]) for row in state["log"]] for state in states]
    assert logs[0] == logs[1] and [row[0] for row in logs[0]] == [3, 4]


def test_two_processes_are_one_with_twice_the_accumulation(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(SMALL | {"steps": 2, "batch": 1, "optimizer": {"lr": 1e-3}}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "hires.cli"]
    arguments = ["train", "scale-dit", "--config", str(path), "--device", "cpu", "--out", str(tmp_path / "two")]
    subprocess.run([*command, *arguments], check=True, timeout=120, capture_output=True)
    train(recipe(steps=2, batch=1, accumulation=2, optimizer={"lr": 1e-3}), tmp_path / "one", device=CPU)
    two, one = (load_file(tmp_path / name / WEIGHTS) for name in ("two", "one"))
    assert json.loads((tmp_path / "two" / "training.json").read_text())["processes"] == 2
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_rises_holds_and_falls():
    options = Optimizer(lr=2.0, warmup=4, decay_from=0.5)
    assert [rate(options, step, step / 10) for step in (0, 1, 3, 5)] == [0.5, 1.0, 2.0, 2.0]
    assert rate(options, 9, 0.9) == pytest.approx(0.4)
    assert rate(Optimizer(), 5, 0.99) == 1e-4 and rate(Optimizer(name="prodigy"), 5, 0.99) == 1.0
    parameters = [torch.zeros(2, requires_grad=True)]
    prodigy = build_optimizer(Optimizer(name="prodigy"), parameters).param_groups[0]
    published = {"lr": 1.0, "weight_decay": 0.01, "use_bias_correction": True, "safeguard_warmup": True}
    assert {key: prodigy[key] for key in published} == published


# LoRA files


def outputs(pipe):
    batch = batch_of(n=1)
    with torch.no_grad():
        return pipe.transformer(
            pack(batch.latents), batch.prompt_embeds, batch.pooled, batch.t, torch.zeros(64, 3), torch.zeros(6, 3),
            torch.ones(1), return_dict=False,
        )[0]  # fmt: skip


def test_a_saved_adapter_loads_into_the_stock_pipeline(tmp_path, backbone):
    plain = outputs(backbone.pipe)
    with_lora(backbone, rank=4, alpha=6.0)
    save_lora(backbone.pipe, tmp_path, ADAPTER)
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHTS]
    fresh = load("tiny-flux", CPU, weights="random").pipe
    assert type(fresh) is FluxPipeline
    fresh.load_lora_weights(tmp_path, adapter_name=ADAPTER)
    torch.testing.assert_close(outputs(fresh), outputs(backbone.pipe))
    assert not torch.allclose(outputs(fresh), plain)
    again = load("tiny-flux", CPU, weights="random")
    parameters = add_adapter(again, Lora(init=str(tmp_path)), seed=3)
    torch.testing.assert_close(outputs(again.pipe), outputs(fresh))
    assert parameters and all(p.requires_grad and p.dtype == torch.float32 for p in parameters)


def product(pipe, name):
    """What the loaded LoRA adds to the weight of a layer."""
    layer = pipe.transformer.get_submodule(name)
    return layer.get_delta_weight(ADAPTER)


def test_kohya_and_peft_names_load(tmp_path, backbone):
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 192, generator=generator), torch.randn(192, 3, generator=generator)
    qkv = torch.randn(3 * 192, 3, generator=generator)
    kohya = "lora_unet_double_blocks_1_img_attn"
    save_file(
        {
            f"{kohya}_proj.lora_down.weight": down,
            f"{kohya}_proj.lora_up.weight": up,
            f"{kohya}_proj.alpha": torch.tensor(1.5),
            f"{kohya}_qkv.lora_down.weight": down.clone(),
            f"{kohya}_qkv.lora_up.weight": qkv,
            f"{kohya}_qkv.alpha": torch.tensor(3.0),
        },
        tmp_path / "kohya.safetensors",
    )
    load_lora(backbone.pipe, tmp_path / "kohya.safetensors", ADAPTER)
    block = "transformer_blocks.1.attn"
    torch.testing.assert_close(product(backbone.pipe, f"{block}.to_out.0"), up @ down / 2)
    for name, part in zip(("to_q", "to_k", "to_v"), qkv.split(192)):
        torch.testing.assert_close(product(backbone.pipe, f"{block}.{name}"), part @ down)

    other = load("tiny-flux", CPU, weights="random").pipe
    layer = "transformer.single_transformer_blocks.4.attn.to_k"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, tmp_path / "peft.safetensors")
    load_lora(other, tmp_path / "peft.safetensors", ADAPTER)
    torch.testing.assert_close(product(other, layer.removeprefix("transformer.")), up @ down)


def test_loras_that_do_not_fit(tmp_path, backbone):
    file = tmp_path / WEIGHTS

    def refused(words, **weights):
        if weights:
            save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in weights.items()}, file)
        with pytest.raises(HiresError, match=re.escape(words)) as error:
            load_lora(backbone.pipe, tmp_path, ADAPTER)
        assert "\n" not in str(error.value)
        assert not getattr(backbone.model, "peft_config", None)

    refused("there is no pytorch_lora_weights.safetensors")
    block = "transformer__transformer_blocks__7__attn__to_k__lora_"
    refused(
        "no layer 'transformer_blocks.7.attn.to_k'", **{f"{block}A__weight": (4, 192), f"{block}B__weight": (192, 4)}
    )
    layer = "transformer__transformer_blocks__0__attn__to_k__lora_"
    wide = {f"{layer}A__weight": (4, 3072), f"{layer}B__weight": (3072, 4)}
    refused("transformer_blocks.0.attn.to_k is 192 wide here, 3072 there", **wide)
    single = "lora_unet_single_blocks_0_linear1__lora_"
    refused("diffusers cannot convert it", **{f"{single}down__weight": (4, 192), f"{single}up__weight": (999, 4)})
    refused("'unet.weight' is no LoRA matrix", **{"unet__weight": (4, 192)})
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - 100])
    refused("cut short")


# The recipe and the command line


def test_the_recipe_names_its_mistakes(tmp_path):
    shipped = Recipe.load(ROOT / "config" / "training" / "scale-dit.yaml")
    assert shipped.size == 4 * 128 and shipped.sampling.lr_ratio == 4

    def refused(text, words):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(HiresError, match=re.escape(words)) as error:
            Recipe.load(tmp_path / "r.yaml")
        assert "\n" not in str(error.value)

    refused("stepz: 3", "unknown key 'stepz': did you mean 'steps'?")
    refused("optimizer: {rl: 3}", "optimizer.rl: unknown key 'rl': did you mean 'lr'?")
    refused("sampling: {local_radiuss: 3}", "unknown key 'local_radiuss': did you mean 'local_radius'?")
    refused("batch: 0", "batch = 0: input should be greater than or equal to 1")
    refused("sampling: {lr_keys: false}", "sampling.lr_keys = false")
    refused("a: [", "must be YAML")
    refused("- 1", "must be a mapping of keys (model,")
    refused("extends: other.yaml", "unknown key 'extends'")
    with pytest.raises(HiresError, match=r"none.yaml does not exist; .* holds: r.yaml"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_text("optimizer: {clip: 0.1}")
    assert Recipe.load(tmp_path / "r.yaml", optimizer={"lr": 3.0}, steps=7).model_dump(
        include={"steps": True, "optimizer": {"clip", "lr"}}
    ) == {"steps": 7, "optimizer": {"clip": 0.1, "lr": 3.0}}


def test_every_key_is_documented():
    text = (ROOT / "docs" / "training.md").read_text()

    def check(model, prefix):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields") and name != "sampling":
                check(field.annotation, f"{prefix}{name}.")
            else:
                assert f"| `{prefix}{name}` |" in text and field.description in text, name

    check(Recipe, "")


def test_the_command_line(tmp_path, capsys):
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"

    def run(*arguments, **keys):
        path.write_text(json.dumps(SMALL | {"steps": 2} | keys))
        return main(["train", "scale-dit", "--config", str(path), "--out", str(out), "--device", "cpu", *arguments])

    def refused(words, *arguments, **keys):
        assert run(*arguments, **keys) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1

    look = {"every": 2, "samples": 2, "prompts": ["a red disc", "a blue star"]}
    sampling = SMALL["sampling"] | {"num_inference_steps": 2, "tau": 500, "lr_ratio": 4}
    assert run("--steps", "1", "--lr", "0.01", size=256, batch=1, validation=look, sampling=sampling) == 0
    images = sorted((out / "validation").iterdir())
    assert [image.name for image in images] == ["000000.png", "000001.png"]
    assert Image.open(images[0]).size == (2 * 258, 258)
    record = json.loads((out / "training.json").read_text())
    assert record["recipe"]["steps"] == 1 and record["recipe"]["optimizer"]["lr"] == 0.01
    assert [row["step"] for row in record["log"]] == [1]
    assert [row["step"] for row in record["validation"]] == [0, 1]

    refused("no checkpoint.pt there", "--resume", str(tmp_path))
    refused("was made with optimizer.lr = 0.01, not None", "--resume", str(out), size=256, batch=1, sampling=sampling)
    data = (out / CHECKPOINT).read_bytes()
    (out / CHECKPOINT).write_bytes(data[: len(data) // 2])
    refused("is cut short", "--resume", str(out))
    torch.save({"step": 3}, out / CHECKPOINT)
    refused("none of ours", "--resume", str(out))
    refused("size 120 and lr_ratio 4", size=120)
    refused("is a UNet2DConditionModel: scale-dit trains FLUX models", model="tiny-sdxl")
    refused("unknown key 'stepz'", stepz=3)


def test_promotion(tmp_path, capsys, monkeypatch):
    model = tmp_path / "assets" / "tiny-flux"
    shutil.copytree(ROOT / "src" / "hires" / "assets" / "tiny-flux", model)
    monkeypatch.setattr("hires.models.ASSETS", model.parent)
    source = tmp_path / "adapter"
    trained = load(model, CPU)
    with_lora(trained)
    save_lora(trained.pipe, source, ADAPTER)
    (source / "training.json").write_text(json.dumps({"revision": "another"}))
    assert main(["promote", "scale-dit", "--from", str(source)]) == 2
    assert "was trained on other weights" in capsys.readouterr().err
    (source / "training.json").write_text("{}")  # another model's
    assert main(["promote", "scale-dit", "--from", str(source)]) == 2
    assert "was trained on other weights" in capsys.readouterr().err
    (source / "training.json").write_text(json.dumps({"revision": trained.revision}))
    assert main(["promote", "scale-dit", "--from", str(source)]) == 0
    target = model / "adapters" / "scale-dit"
    assert sorted(p.name for p in target.iterdir()) == [WEIGHTS, "training.json"]
    assert {x.dtype for x in load_file(target / WEIGHTS).values()} == {torch.float16}
    again = load(model, CPU)
    again.require_adapter(ADAPTER)
    with adapter_switched(again.model, ADAPTER, on=True):
        torch.testing.assert_close(outputs(again.pipe), outputs(trained.pipe), rtol=0.02, atol=0.02)


# the embedded adapter


def test_the_embedded_adapter_was_made_by_its_recipe_for_these_weights():
    model = ASSETS / "tiny-flux"
    folder = model / "adapters" / ADAPTER
    record = json.loads((folder / "training.json").read_text())
    assert record["revision"] == revision(model)
    assert record["recipe"] == Recipe.load(ROOT / "config/training/scale-dit.yaml").record()
    assert (folder / WEIGHTS).stat().st_size <= 2 * 2**20


def test_the_embedded_adapter_lowers_the_loss_of_unseen_views(tmp_path):
    own = Recipe.load(ROOT / "config/training/scale-dit.yaml", seed=99, batch=4, ema=None).model_copy(
        update={"data": Recipe().data, "validation": Recipe(validation={"every": 1, "samples": 4}).validation}
    )
    place = str(ASSETS / "tiny-flux/adapters" / ADAPTER)
    losses = []
    for init in (None, place):
        trainer = Trainer(own.model_copy(update={"lora": Lora(init=init)}), tmp_path, CPU)
        trainer.look()
        losses += [trainer.validation[-1]["loss"]]
    assert losses[1] < 0.95 * losses[0]
