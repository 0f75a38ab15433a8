"""The configuration: what is read, what is refused and how it is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hires.config import Config, ImageSet, load_config
from hires.config.keys import json_schema, with_key_table
from hires.errors import HiresError
from hires.variants import VARIANTS

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "config"

SMALL = {
    "name": "small",
    "prompts": {"n": 4},
    "backbones": {
        "tiny-flux": {
            "model": "tiny-flux",
            "base_resolution": 128,
            "size_multiple": 32,
            "sampling": {"num_inference_steps": 14, "guidance_scale": 2.0},
        }
    },
    "studies": {"main": {"backbones": ["tiny-flux"], "variants": ["npa"], "sizes": {"256x256": 4}}},
}


def write(folder, data, name="c.yaml"):
    path = folder / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
    return path


def edited(*place_and_value):
    """SMALL with one key set: edited("prompts", "n", 3)."""
    *place, value = place_and_value
    data = json.loads(json.dumps(SMALL))
    here = data
    for key in place[:-1]:
        here = here.setdefault(key, {})
    here[place[-1]] = value
    return data


def refused(folder, data):
    with pytest.raises(HiresError) as error:
        load_config(write(folder, data))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_shipped_configuration_loads():
    other = {CONFIG / name for name in ("claims.yaml", "memory.yaml", "speed.yaml")}  # of another kind
    for path in set(CONFIG.glob("*.yaml")) - other:
        assert load_config(path).image_sets(), path.name


def test_the_default_covers_every_variant_of_the_papers_on_both_backbones():
    config = load_config(CONFIG / "config.yaml")
    own = [name for name, variant in VARIANTS.items() if variant.adapter is None and name != "diffusehigh"]
    made = {(s.backbone, s.variant, s.size) for s in config.image_sets() if s.study == "main"}
    assert made == {(b, v, s) for b in ("tiny-flux", "tiny-sdxl") for v in own for s in ("256x256", "512x512")}
    assert len({s.setting for s in config.image_sets() if s.study == "tau"}) == 6
    adapted = {name for name, variant in VARIANTS.items() if variant.adapter}
    assert adapted < {s.variant for s in config.image_sets() if s.study == "scale-dit" and s.backbone == "tiny-flux"}


def test_image_sets_are_the_product_of_a_study(tmp_path):
    data = edited("studies", "main", "settings", {"a": {"tau": 300}, "b": {"tau": 600}})
    data["studies"]["main"] |= {"variants": ["npa", "npa+lfm"], "sizes": {"256x512": 2, "256x256": 4}, "seeds": [3, 1]}
    sets = load_config(write(tmp_path, data)).image_sets()
    assert len(sets) == len(set(sets)) == 2 * 2 * 2
    assert sets[0] == ImageSet("main", "a", "tiny-flux", "npa", 256, 512, 2, (3, 1))


def test_settings_lie_over_the_backbone(tmp_path):
    config = load_config(
        write(tmp_path, edited("studies", "main", "settings", {"x": {"guidance_scale": 3, "tau": 500}}))
    )
    sampling = config.sampling("main", "x", "tiny-flux")
    assert (sampling.num_inference_steps, sampling.guidance_scale, sampling.tau) == (14, 3, 500)
    with pytest.raises(HiresError, match=r"unknown setting 'y'.*allowed: x"):
        config.sampling("main", "y", "tiny-flux")


def test_own_variants_join_the_built_in_ones(tmp_path):
    data = edited("variants", {"npa-jump": {"attention": "npa", "stages": "single"}})
    data["studies"]["main"]["variants"] = ["npa-jump", "scalediff"]
    config = load_config(write(tmp_path, data))
    assert config.variants()["npa-jump"].stages == "single"
    assert set(config.variants()) == {*VARIANTS, "npa-jump"}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (("studies", "main", "varients", ["npa"]), ("studies.main.varients", "did you mean 'variants'?")),
        (("prompt", {}), ("prompt:", "did you mean 'prompts'?")),
        (("compute", "shard", 3), ("compute.shard", "did you mean 'shard_size'?")),
        (("studies", "main", "variants", ["scaledif"]), ("studies.main.variants", "did you mean 'scalediff'?")),
        (("studies", "main", "backbones", ["tiny-flu"]), ("studies.main.backbones", "did you mean 'tiny-flux'?")),
        (("studies", "main", "variants", ["npa", "npa"]), ("studies.main.variants", "named twice: npa")),
        (("studies", "main", "sizes", {"256": 4}), ("studies.main.sizes.256", "height x width in pixels")),
        (("studies", "main", "sizes", {"256x256": 5}), ("studies.main.sizes.256x256 = 5", "prompts.n = 4")),
        (("studies", "main", "sizes", {"300x300": 4}), ("studies.main.sizes.300x300", "288x288")),
        (("studies", "main", "settings", {"a": {"taw": 3}}), ("settings.a.taw", "did you mean 'tau'?")),
        (
            ("studies", "main", "settings", {"a": {"tau": 1001}}),
            ("settings.a.tau = 1001", "less than or equal to 1000"),
        ),
        (("studies", "main", "settings", {"a/b": {}}), ("settings.a/b", "letters, digits")),
        (("studies", "main", "settings", {"mean": {}}), ("settings.mean", "choose another")),
        (("studies", "main", "settings", {"between": {}}), ("settings.between", "choose another")),
        (("studies", "main", "settings", {300: {}}), ("settings.300", "quote it: '300'")),
        (("studies", "main", 3), ("studies.main = 3", "must be a mapping")),
        (("studies", "main", "seeds", [-1]), ("studies.main.seeds.0 = -1", "greater than or equal to 0")),
        (("backbones", "tiny-flux", "weights", "pretraind"), ("tiny-flux.weights", "did you mean 'pretrained'?")),
        (("backbones", "tiny-flux", {}), ("backbones.tiny-flux.model", "missing", "tiny-sdxl")),
        (("compute", "device", "gpu"), ("compute.device = 'gpu'", "cuda:N")),
        (("metrics", "scores", ["fidd"]), ("metrics.scores.0 = 'fidd'", "did you mean 'fid'?")),
        (("metrics", "patch", {"size": 512}), ("metrics.patch.size = 512", "256")),
        (("variants", {"npa": {}}), ("variants.npa", "built-in")),
        (("variants", {"new": {"attention": "dens"}}), ("variants.new.attention", "did you mean 'dense'?")),
        (("name", "reference"), ("name = 'reference'", "choose another")),
        (
            ("studies", "main", "settings", {"a": {"tau": 20, "num_inference_steps": 5}}),
            ("settings.a (tiny-", "no step"),
        ),
        (("notebooks", {"02_ablation": ["study"]}), ("notebooks.02_ablation", "must be a mapping")),
        (("prompts", "scenes", {"pool": 3}), ("prompts.scenes.pool = 3", "prompts.n = 4")),
        (("studies", {}), ("studies: must not be empty",)),
        (("studies", "main", None), ("studies.main = null", "must be a mapping")),
        (("prompts", "n", "many"), ("prompts.n = 'many'", "integer", "number of prompts")),
    ],
)
def test_a_mistake_is_one_line_with_place_and_remedy(tmp_path, place, said):
    message = refused(tmp_path, edited(*place))
    for part in said:
        assert part in message


def test_sizes_without_a_base_are_right_for_variants_that_start_from_noise(tmp_path):
    data = edited("studies", "main", "sizes", {"96x2048": 1})
    assert "has no base" in refused(tmp_path, data)
    data["studies"]["main"]["variants"] = ["npa-direct"]
    data["metrics"] = {"patch": {"size": 64}}
    assert load_config(write(tmp_path, data)).image_sets()[0].width == 2048


def test_several_mistakes_are_counted(tmp_path):
    data = edited("compute", "shards", 3)
    data["compute"]["thread"] = 1
    assert "and 1 more mistake)" in refused(tmp_path, data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "but it is empty"),
        ("- a\n- b\n", "but it is a list"),
        ("name: [1,\n", "must be YAML"),
        ("name: a\nprompts: {}\nname: b\n", "line 3: key 'name' is given twice"),
        ("name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, said):
    assert said in refused(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path):
    write(tmp_path, SMALL, "mine.yaml")
    with pytest.raises(HiresError, match=r"does not exist; .* holds: mine\.yaml"):
        load_config(tmp_path / "main.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(HiresError, match="can't be read"):
        load_config(tmp_path / "latin.yaml")


def test_extends_edits_sections_by_key_and_tables_as_a_whole(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, edited("prompts", "filters", {"min_side": 256, "max_punsafe": 0.1}), "base.yaml")
    edit = {
        "extends": "../base.yaml",
        "name": "other",
        "prompts": {"seed": 5, "filters": {"min_side": None}},
        "studies": {"b": {"backbones": ["tiny-flux"], "variants": ["npa"], "sizes": {"512x512": 1}}},
    }
    config = load_config(write(tmp_path, edit, "sub/edit.yaml"))
    assert (config.name, config.prompts.n, config.prompts.seed) == ("other", 4, 5)
    assert (config.prompts.filters.min_side, config.prompts.filters.max_punsafe) == (None, 0.1)
    assert list(config.studies) == ["b"]


def test_extending_in_a_circle_is_refused(tmp_path):
    write(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    with pytest.raises(HiresError, match=r"b\.yaml \(named by extends in a\.yaml\) does not exist"):
        load_config(tmp_path / "a.yaml")
    write(tmp_path, {"extends": "a.yaml"}, "b.yaml")
    with pytest.raises(HiresError, match="extends itself"):
        load_config(tmp_path / "a.yaml")


def test_overrides_are_merged_and_checked(tmp_path):
    path = write(tmp_path, SMALL)
    config = load_config(path, {"compute": {"threads": 2}, "name": "mine"})
    assert (config.compute.threads, config.compute.shard_size, config.root) == (2, 8, Path("results/mine"))
    with pytest.raises(HiresError, match=r"compute\.theads.*did you mean 'threads'"):
        load_config(path, {"compute": {"theads": 2}})


def test_a_configuration_survives_a_round_trip():
    config = load_config(CONFIG / "config.yaml")
    assert Config.model_validate(config.model_dump(mode="json", by_alias=True)) == config


def test_schema_and_table_of_keys_are_up_to_date():
    """`python -m hires.config` writes both."""
    assert (CONFIG / "schema.json").read_text() == json_schema()
    readme = (CONFIG / "README.md").read_text()
    assert readme == with_key_table(readme)


def test_every_key_is_described():
    def walk(node):
        for name, field in node.get("properties", {}).items():
            assert field.get("description"), name

    schema = json.loads(json_schema())
    walk(schema)
    for section in schema["$defs"].values():
        walk(section)


def test_reading_a_configuration_imports_no_torch():
    code = "import sys, hires.config, hires.layout, hires.data.prompts, hires.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_line_answers_a_mistake_with_one_line_and_code_2(tmp_path):
    path = write(tmp_path, edited("compute", "shards", 3))
    done = subprocess.run([sys.executable, "-m", "hires.cli", "plan", "--config", path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "compute.shards" in done.stderr
