"""Paths of every output, and what the plan counts from them."""

import re
from pathlib import Path

import pytest
import yaml

from hires import layout
from hires.config import load_config
from hires.errors import HiresError
from hires.stages.plan import describe, jobs, plan

CONFIG = Path(__file__).parents[1] / "config"
TINY = {"base_resolution": 128, "size_multiple": 32}


def config_of(folder, studies, n=20, shard_size=8, **backbone):
    data = {
        "name": "c",
        "prompts": {"n": n},
        "backbones": {"a": {"model": "tiny-flux", **TINY, **backbone}, "b": {"model": "tiny-sdxl", **TINY}},
        "studies": studies,
        "compute": {"shard_size": shard_size},
        "notebooks": {"02_ablation": {"study": "main"}},
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return load_config(path)


def study(variants=("npa",), sizes=None, backbones=("a",), **more):
    return {"backbones": list(backbones), "variants": list(variants), "sizes": sizes or {"256x256": 20}, **more}


def test_paths_of_one_image_set(tmp_path):
    config = config_of(tmp_path, {"main": study(["npa+lfm"], {"256x512": 3})})
    (images,) = config.image_sets()
    folder = "main/default/a/npa+lfm/256x512"
    assert layout.image(config, images, "00ff", 7) == Path(f"results/c/images/{folder}/00ff-7.png")
    assert layout.image_shard(config, images, 2) == Path(f"results/c/images/{folder}/shard-002.json")
    assert layout.features(config, images) == Path(f"results/c/features/{folder}.safetensors")
    assert layout.scores(config, images) == Path(f"results/c/scores/{folder}.parquet")
    assert layout.image_scores(config, images) == Path(f"results/c/scores/{folder}.images.parquet")
    assert layout.reference(config, 256, 512, "00ff") == Path("results/c/references/256x512/00ff.png")


def test_no_two_outputs_share_a_path():
    config = load_config(CONFIG / "config.yaml")
    paths = [layout.prompts(config), layout.scenes(config), layout.metrics(config), layout.paired(config)]
    paths += [layout.report(config), layout.provenance(config), *(layout.notebook(config, n) for n in config.notebooks)]
    for images in config.image_sets():
        paths += [*layout.image_shards(config, images), layout.features(config, images)]
        paths += [layout.scores(config, images), layout.image_scores(config, images)]
    for height, width, _ in layout.references(config):
        paths += [layout.reference_manifest(config, height, width), layout.reference_features(config, height, width)]
    for base in layout.base_sets(config):
        paths += layout.base_shards(config, base)
    assert len(paths) == len(set(paths))
    assert all(path.is_relative_to("results/embedded") for path in paths)


def test_patterns_with_their_wildcards_match_exactly_the_paths(tmp_path):
    config = config_of(tmp_path, {"main": study(["npa", "npa+lfm"]), "m": study(["direct"], backbones=["b"])})
    constraints = layout.wildcards(config)

    def expression(output):
        parts = re.split(r"\{(\w+)\}", layout.pattern(config, output))
        seen = set()
        text = ""
        for i, part in enumerate(parts):
            if i % 2 == 0:
                text += re.escape(part)
            else:
                text += f"(?P={part})" if part in seen else f"(?P<{part}>{constraints[part]})"
                seen.add(part)
        return re.compile(text)

    for images in config.image_sets():
        match = expression("image_shard").fullmatch(str(layout.image_shard(config, images, 1)))
        assert match["variant"] == images.variant and match["study"] == images.study and match["shard"] == "001"
    for base in layout.base_sets(config):
        match = expression("base_shard").fullmatch(str(layout.base_shard(config, base, 0)))
        assert match["key"] == base.key
    wrong = str(layout.image_shard(config, config.image_sets()[0], 0)).replace("/npa/", "/npaa/")
    assert not expression("image_shard").fullmatch(wrong)


@pytest.mark.parametrize(("n", "size"), [(1, 8), (8, 8), (9, 8), (20, 8), (5, 1)])
def test_shards_cover_every_prompt_once(tmp_path, n, size):
    config = config_of(tmp_path, {"main": study(sizes={"256x256": n})}, shard_size=size)
    rows = [row for k in layout.shards(config, n) for row in layout.shard_rows(config, n, k)]
    assert rows == list(range(n))
    with pytest.raises(HiresError, match=f"{n} prompts make shards 0 to"):
        layout.shard_rows(config, n, len(layout.shards(config, n)))


def test_base_latents_are_shared_by_variants_sizes_and_tau(tmp_path):
    config = config_of(
        tmp_path,
        {
            "main": study(["npa", "scalediff", "upsample", "direct"], {"256x256": 20, "512x512": 4}, seeds=[0]),
            "tau": study(["npa"], {"256x256": 8}, seeds=[0, 1], settings={"x": {"tau": 300}, "y": {"tau": 600}}),
        },
    )
    (base,) = layout.base_sets(config)
    assert (base.height, base.width, base.n, base.seeds) == (128, 128, 20, (0, 1))
    assert layout.base_set(config, "a", base.name) == base
    names = {layout.base_of(config, images).name for images in config.image_sets() if images.variant != "direct"}
    assert names == {base.name}
    assert {layout.base_of(config, s) for s in config.image_sets() if s.variant == "direct"} == {None}


@pytest.mark.parametrize(
    "setting",
    [
        {"num_inference_steps": 5},
        {"guidance_scale": 1},
        {"true_cfg_scale": 2},
        {"negative_prompt": "x"},
        {"prompt_suffix": "x"},
    ],
)
def test_what_shapes_a_base_image_changes_its_key(tmp_path, setting):
    config = config_of(tmp_path, {"main": study(settings={"default": {}, "other": setting})})
    keys = {base.key for base in layout.base_sets(config)}
    assert len(keys) == 2


def test_another_model_under_the_same_name_changes_the_key(tmp_path):
    keys = {
        layout.base_sets(config_of(tmp_path, {"main": study()}, weights=w))[0].key for w in ("pretrained", "random")
    }
    assert len(keys) == 2


def test_references_hold_the_most_prompts_of_each_size(tmp_path):
    studies = {"x": study(sizes={"256x256": 4, "512x256": 2}), "y": study(sizes={"256x256": 9})}
    assert layout.references(config_of(tmp_path, studies)) == [(256, 256, 9), (512, 256, 2)]


def test_unknown_names_are_refused(tmp_path):
    config = config_of(tmp_path, {"main": study()})
    with pytest.raises(HiresError, match="did you mean '02_ablation'"):
        layout.notebook(config, "02_ablaton")
    with pytest.raises(HiresError, match="unknown variant of study 'main' 'npaa'"):
        config.image_set("main", "default", "a", "npaa", 256, 256)
    with pytest.raises(HiresError, match="unknown base latents of a"):
        layout.base_set(config, "a", "128x128-00000000")


# plan


def test_the_plan_counts_steps_images_and_views(tmp_path):
    variants = ["upsample", "direct", "scalediff", "multidiffusion+lfm+sg"]
    settings = {"default": {"num_inference_steps": 14, "tau": 340}}
    config = config_of(tmp_path, {"main": study(variants, {"512x512": 4}, seeds=[0, 1], settings=settings)})
    rows = {row.variant: row for row in plan(config)}
    assert rows["base"].stages == "128x128: 14"
    assert rows["direct"].stages == "512x512: 14"
    assert rows["scalediff"].stages == "256x256: 5, 512x512: 5"
    assert {row.images for row in rows.values()} == {8}
    extra = rows["multidiffusion+lfm+sg"].seconds - rows["scalediff"].seconds
    assert extra == pytest.approx(8 * 5 * ((9 + 49) * 0.012 - 0.045 - 0.23))
    assert "14 steps, τ 340 → 5 of 14 (0.357)" in describe(config)
    assert jobs(config) == 5  # base latents, images, features, scores, features of the references


def test_views_of_a_wide_target_have_the_shape_of_its_base(tmp_path):
    """128x1024 grows from 32x256, and no square of 128 px, the model's own, fits into the stage between."""
    settings = {"default": {"num_inference_steps": 14, "tau": 340}}
    config = config_of(tmp_path, {"main": study(["multidiffusion+lfm+sg"], {"128x1024": 1}, settings=settings)})
    base, images = plan(config)
    assert (base.size, images.stages) == ("32x256", "64x512: 5, 128x1024: 5")
    views = 5 * (9 + 49) * 0.012
    assert views < images.seconds < views + 2


def test_the_default_is_planned_for_minutes():
    config = load_config(CONFIG / "config.yaml", {"backbones": _with_tau()})
    assert sum(row.seconds for row in plan(config)) / 2 < 12 * 60


def _with_tau():
    data = yaml.safe_load((CONFIG / "config.yaml").read_text())["backbones"]
    for entry in data.values():
        entry["sampling"]["tau"] = 340
    return data


def test_models_of_unknown_cost_are_counted_without_an_estimate(tmp_path):
    config = config_of(tmp_path, {"main": study()}, model="some/model")
    assert all(row.seconds is None for row in plan(config))
    assert "no estimate" in describe(config)
