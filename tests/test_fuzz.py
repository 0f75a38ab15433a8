"""Malformed input of every kind ends in one clear line: a HiresError, a KernelError, or argparse's exit code 2.

FUZZ is the number of inputs, 200 by default; `make fuzz` tries 10,000. The inputs are the same in every run.
"""

import copy
import io
import json
import os
import re
import shutil
import struct
from pathlib import Path

import hires_kernels
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hires_kernels.errors import KernelError
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image
from results_tree import build
from safetensors.torch import save

from hires import layout
from hires.additions.lora import load_lora
from hires.analysis.results import Results
from hires.attention import use_attention
from hires.backbones.loading import check_folder, load, revision
from hires.cli import COMMANDS, main
from hires.config import Config, Prompts, load_config
from hires.data.prompts import draw_prompts, read_prompts
from hires.errors import HiresError
from hires.files.untrusted import read_hints, read_picture
from hires.models import ASSETS
from hires.provenance import records
from hires.scenes import parse
from hires.settings import Sampling
from hires.shards import Item
from hires.sizes import check_multiple, nearest_sizes, parse_size, stage_sizes
from hires.stages.images import encode
from hires.stages.plan import describe
from hires.training.captioned import open_source
from hires.training.scale_dit.recipe import Recipe
from hires.variants import VARIANTS

ROOT = Path(__file__).parents[1]
FUZZ = int(os.environ.get("FUZZ", 200))
pytestmark = pytest.mark.filterwarnings("ignore")


def inputs(percent):
    """A share of the inputs, drawn alike in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=max(1, FUZZ * percent // 100), derandomize=True, deadline=None, suppress_health_check=slow
    )


def told(run, *arguments, **options):
    """Run; a refusal must be one clear line."""
    try:
        value = run(*arguments, **options)
    except (HiresError, KernelError) as error:
        text = str(error)
        assert text and text.isprintable() and len(text) < 2100
        event("refused")
        return None
    event("taken")
    return value


NASTY = [
    "",
    " ",
    "\0",
    "a\0b",
    "../../x",
    "/etc/passwd",
    "x" * 5000,
    "\ud800",
    "\u202e",
    "é" * 200,
    "{}",
    "[1]",
    "~",
    "-1",
    "1e999",
    "9" * 5000,
    "NaN",
    "null",
    "none",
    "512x512",
    "0x0",
    "=1+1",
    "hf_" + "a" * 30,
    "$x$",
    "%s%n",
    "{name}",
    "scene://-1",
    "http://[",
    "tiny-flux",
    "scale-dit",
    "default",
    "auto",
    "\n",
    "cuda:99999999999",
    "١٢",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, -(10**400)]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(NASTY),
)
JUNK = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3))


@st.composite
def edited(draw, value):
    """A JSON-like value with one to three places replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        node = value
        while True:
            if not isinstance(node, dict | list) or not node:
                break
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
                node = node[key]
                continue
            action = draw(st.integers(0, 5))
            if action == 0:
                del node[key]
            elif action == 1 and isinstance(node, dict):
                node[draw(st.text(max_size=8) | st.sampled_from(NASTY))] = draw(JUNK)
            else:
                node[key] = draw(JUNK)
            break
    return value


@st.composite
def damaged(draw, data):
    """Bytes of a file with some changed, removed, repeated or cut off."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        action = draw(st.integers(0, 4))
        if action == 0:
            del data[at:]
        elif action == 1:
            del data[at : at + draw(st.integers(1, 64))]
        elif action == 2:
            data[at:at] = draw(st.binary(max_size=16))
        else:
            data[at] ^= draw(st.integers(1, 255))
    return bytes(data)


def as_json(value):
    return json.dumps(value)


# --- configurations ---------------------------------------------------------------------------------------------------

SMOKE = load_config(ROOT / "config/smoke.yaml").model_dump(mode="json", by_alias=True, exclude_unset=True)
RECIPE = yaml.safe_load((ROOT / "config/training/scale-dit.yaml").read_text())


def use(config: Config):
    """What every stage asks of a configuration before it works."""
    layout.references(config)
    layout.wildcards(config)
    for images in config.image_sets():
        layout.base_of(config, images)
        layout.image_shard(config, images, 0)
    return describe(config)


@inputs(11)
@given(value=edited(SMOKE))
def test_configurations(value, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(as_json(value))
    config = told(load_config, path)
    if config is not None:
        told(use, config)


WORDS = st.sampled_from(
    [
        "a: ",
        "- ",
        "\n",
        "  ",
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!binary ",
        "!x ",
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        "|\n",
        ">\n",
        "? ",
        ": ",
        "#",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
        "\t",
        "name",
        "1:2:3",
        "0x",
        "2001-13-01",
        ".inf",
        "~",
        "\\u",
        "\x07",
        "=",
        "`",
        "@",
    ]
)
TEXT = (ROOT / "config/smoke.yaml").read_text()


@inputs(9)
@given(
    words=st.lists(WORDS | st.text(max_size=4), max_size=30), at=st.integers(0, len(TEXT)), raw=st.binary(max_size=4)
)
def test_texts_of_configurations(words, at, raw, tmp_path):
    path = tmp_path / "c.yaml"
    text = "".join(words)
    for data in (text.encode(errors="surrogatepass"), (TEXT[:at] + text + TEXT[at:]).encode(), raw):
        path.write_bytes(data)
        told(load_config, path)


@inputs(7)
@given(value=edited(RECIPE))
def test_recipes(value, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(as_json(value))
    told(Recipe.load, path, steps=3, optimizer={"lr": 1.0})


@inputs(3)
@given(fields=st.dictionaries(st.sampled_from([*Sampling.model_fields, "x", "tua"]), JUNK, max_size=4))
def test_settings(fields):
    given_settings = told(Sampling.of, **fields)
    if given_settings is not None:
        told(given_settings.stage_steps)


# --- prompts ----------------------------------------------------------------------------------------------------------

COLUMNS = {"TEXT", "URL", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE", "hash"}
KINDS = {
    pa.string(): st.text(max_size=30) | st.sampled_from([n for n in NASTY if n.isprintable()]),
    pa.large_string(): st.text(max_size=5),
    pa.binary(): st.binary(max_size=12),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.null(): st.none(),
    pa.list_(pa.string()): st.lists(st.text(max_size=4), max_size=2),
    pa.struct([("a", pa.string())]): st.fixed_dictionaries({"a": st.text(max_size=4)}),
    pa.timestamp("us"): st.integers(-(2**40), 2**40),
    pa.dictionary(pa.int32(), pa.string()): st.sampled_from(["a", "b", ""]),
    pa.decimal128(9, 2): st.decimals(-1000, 1000, places=2),
}


@st.composite
def tables(draw):
    rows = draw(st.integers(0, 4))
    names = draw(st.lists(st.sampled_from([*sorted(COLUMNS), "text", "Text", "x.y", ""]), max_size=6))
    names += [] if draw(st.integers(0, 5)) == 0 else ["TEXT", "URL"]
    columns = []
    for name in names:
        usual = pa.string() if name.upper() in ("TEXT", "URL") and draw(st.booleans()) else None
        kind = usual or draw(st.sampled_from(list(KINDS)))
        values = draw(st.lists(st.none() | KINDS[kind], min_size=rows, max_size=rows))
        columns.append(pa.array(values, kind))
    return pa.Table.from_arrays(columns, names)


FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "min_side": st.integers(1, 9),
        "max_punsafe": st.floats(0, 1),
        "min_similarity": st.floats(),
        "min_characters": st.none() | st.integers(1, 3),
        "drop_duplicates": st.booleans(),
    },
)


@inputs(8)
@given(table=tables(), filters=FILTERS, n=st.integers(1, 3))
def test_parquet_of_any_content(table, filters, n, tmp_path):
    pq.write_table(table, tmp_path / "s.parquet")
    if told(draw_prompts, Prompts(n=n, filters=filters), tmp_path / "s.parquet", tmp_path / "p.parquet"):
        assert len(read_prompts(tmp_path / "p.parquet")) == n


def parquet_bytes():
    data = io.BytesIO()
    pq.write_table(pa.table({"URL": ["u", "v"] * 9, "TEXT": [f"caption {i}" for i in range(18)]}), data)
    return data.getvalue()


@inputs(5)
@given(data=damaged(parquet_bytes()))
def test_damaged_parquet(data, tmp_path):
    (tmp_path / "s.parquet").write_bytes(data)
    told(draw_prompts, Prompts(n=1), tmp_path / "s.parquet", tmp_path / "p.parquet")
    told(read_prompts, tmp_path / "s.parquet")


# --- sizes, attention, kernels, parser --------------------------------------------------------------------------------

SIDES = st.integers(-2, 2000) | st.sampled_from([0, 1, 7, 64, 4096, 99999, 999999])


@inputs(7)
@given(
    text=st.text(max_size=12) | st.sampled_from(NASTY),
    height=SIDES,
    width=SIDES,
    base=st.integers(1, 512),
    multiple=st.sampled_from([1, 8, 16, 32, 64, 1000]),
    stages=st.sampled_from(["doubling", "single"]),
)
def test_sizes(text, height, width, base, multiple, stages):
    told(parse_size, text)
    told(check_multiple, height, width, multiple)
    multiple = multiple if base < 64 else max(multiple, 8)
    if height > 0 and width > 0:
        sizes = told(stage_sizes, height, width, base, multiple, stages)
        assert sizes is None or sizes[-1] == (height, width)
        near = told(nearest_sizes, height, width, base, multiple)
        for size in near or ():
            assert stage_sizes(*size, base, multiple)


@pytest.fixture(scope="module")
def flux():
    return load("tiny-flux", weights="random")


@inputs(3)
@given(
    kind=st.sampled_from(["dense", "npa", "scale_dit", "nap", ""]),
    size=st.tuples(*[st.integers(-2, 70)] * 2),
    base=st.tuples(*[st.integers(-2, 40)] * 2),
    options=st.dictionaries(
        st.sampled_from(["text_rows", "backend", "shifts", "radius", "window", "neighbours", "order", "x"]),
        st.sampled_from([None, 0, -1, 3, 99, "row", "all", "patch", "hilbert", "auto", "x"]),
        max_size=3,
    ),
)
def test_geometry_of_attention(flux, kind, size, base, options):
    def enter():
        with use_attention(flux.model, kind, size, base, **options):
            pass

    former = {name: type(processor) for name, processor in flux.model.attn_processors.items()}
    told(enter)
    assert {name: type(processor) for name, processor in flux.model.attn_processors.items()} == former


@st.composite
def tensors(draw, batch, tokens):
    shape = draw(
        st.sampled_from(
            [(batch, tokens, 2, 8)] * 6
            + [
                (batch, tokens, 2),
                (tokens, 2, 8),
                (batch, tokens + 1, 2, 8),
                (batch + 1, tokens, 2, 8),
                (0, tokens, 2, 8),
                (batch, tokens, 1, 16),
            ]
        )
    )
    dtype = draw(st.sampled_from([torch.float32] * 6 + [torch.float64, torch.float16, torch.int64, torch.bool]))
    return torch.zeros(shape, dtype=dtype)


@inputs(8)
@given(data=st.data())
def test_arguments_of_the_kernels(data):
    draw = data.draw
    grid = draw(st.tuples(st.integers(-1, 8), st.integers(-1, 8)) | st.sampled_from([(4, 4), (6, 4)]))
    tokens, batch = max(0, grid[0] * grid[1]), draw(st.integers(1, 2))
    query = draw(tensors(batch, tokens))
    key, value = [query if draw(st.integers(0, 4)) else draw(tensors(batch, tokens)) for _ in range(2)]
    text = draw(st.none() | st.tuples(*[tensors(batch, 3)] * 3) | st.just((query[:, :3],) * 3))
    number = st.sampled_from([None, 0, -3, 1, 2, 4, 100])
    window = draw(number | st.tuples(st.integers(-1, 9), st.integers(-1, 9)))
    backend = draw(st.sampled_from(["auto", "sdpa", "reference", "x", ""]))
    if window is not None:
        shift = draw(st.none() | st.just(torch.zeros(batch, 2, dtype=torch.long)) | st.just(torch.ones(3)))
        rope = draw(st.none() | st.just((torch.ones(tokens, 8),) * 2) | st.just((torch.ones(tokens + 1, 8),) * 2))
        told(
            hires_kernels.neighborhood_patch_attention,
            query,
            key,
            value,
            grid=grid,
            window=window,
            text=text,
            rope=rope,
            shift=shift,
            text_rows=draw(st.sampled_from(["patch", "global", "x"])),
            backend=backend,
        )
    guidance = draw(st.none() | st.just((torch.zeros(batch, 4, 2, 8),) * 2) | st.tuples(*[tensors(batch, 4)] * 2))
    told(
        hires_kernels.local_attention,
        query,
        key,
        value,
        grid=grid,
        radius=draw(number),
        window=draw(number),
        text=text,
        guidance=guidance,
        guidance_grid=draw(st.sampled_from([None, (2, 2), (1, 4), (0, 0), (-2, -2)])),
        guidance_neighbours=draw(st.sampled_from(["row", "all", "x"])),
        order=draw(st.sampled_from(["hilbert", "morton", "window", "raster", "x"])),
        backend=backend,
    )


@inputs(4)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    fill=st.floats() | st.integers(0, 255),
    kind=st.sampled_from([torch.float32, torch.uint8, torch.float16]),
)
def test_pictures_that_are_parsed(shape, fill, kind):
    if shape[0] > 3 and len(shape) == 3:
        shape[0] = 3
    array = torch.full(
        shape,
        fill if kind.is_floating_point else int(abs(fill)) % 256 if fill == fill and abs(fill) < 1e9 else 0,
        dtype=torch.float64,
    ).to(kind)
    told(parse, array)


# --- records ----------------------------------------------------------------------------------------------------------

RECORD = {
    "model": "tiny-flux",
    "revision": "random",
    "dtype": "float32",
    "prompt": "x",
    "seed": 0,
    "variant": "npa",
    "variant_fields": VARIANTS["npa"].model_dump(),
    "stage": "256x256",
    "height": 256,
    "width": 256,
    "strength": None,
    "image": None,
    "sampling": Sampling().model_dump(),
    "versions": {"hires": "0.1.0"},
}
FROM_STAGE = {
    "prompt": "x",
    "seed": 0,
    "study": "smoke",
    "setting": "default",
    "backbone": "tiny-flux",
    "variant": "npa",
    "height": 256,
    "width": 256,
    "model": "tiny-flux",
    "revision": "x",
    "sampling": {},
}
CONFIG = load_config(ROOT / "config/smoke.yaml")


@inputs(6)
@given(value=edited(RECORD) | edited(FROM_STAGE) | JUNK, image_format=st.sampled_from(["png", "tiff"]))
def test_records_of_pictures(value, image_format, tmp_path):
    path = tmp_path / f"a.{image_format}"
    path.write_bytes(encode(Image.new("RGB", (8, 8)), image_format, value))
    record = told(records.read, path)
    if record is not None:
        told(records.describe, record).encode()
        told(records.recipe, record, CONFIG)


PICTURES = [encode(Image.new("RGB", (24, 16), "red"), kind, RECORD) for kind in ("png", "tiff")]
for kind in ("JPEG", "WEBP", "BMP"):
    PICTURES.append(io.BytesIO())
    Image.effect_noise((24, 16), 50).convert("RGB").save(PICTURES[-1], kind)
    PICTURES[-1] = PICTURES[-1].getvalue()


@inputs(6)
@given(data=st.one_of(*map(damaged, PICTURES)))
def test_damaged_pictures(data, tmp_path, capsys):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    told(read_picture, path, path)
    assert main(["show", str(path)]) in (0, 2)
    told(lambda: records.describe(records.read(path)))
    path.with_suffix(".txt").write_text("a caption")
    told(lambda: open_source(str(tmp_path), 8, 0, {}).pictures([0, 1]))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return build(tmp_path_factory.mktemp("results"), backbones=("tiny-flux",), variants=("npa",), taus=())


@inputs(4)
@given(data=st.data())
def test_manifests_and_records(results, data, tmp_path):
    manifest = next(results.glob("images/*/*/*/*/*/shard-000.json"))
    whole = manifest.read_bytes()
    value = json.loads(whole)
    fresh = json.dumps(data.draw(edited(value))).encode() if data.draw(st.booleans()) else data.draw(damaged(whole))
    try:
        manifest.write_bytes(fresh)
        told(lambda: Results.open(results).images)
    finally:
        manifest.write_bytes(whole)
    item = Item(None, 0, tmp_path / "x.png", "key", 1)
    item.file.write_bytes(b"x")
    record = {"key": "key", "sha256": "0", "version": 1}
    item.record.write_text(as_json(data.draw(edited(record) | JUNK)))
    assert told(item.checked) is None


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """tiny-flux without what isn't looked at."""
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(ASSETS / "tiny-flux", folder, ignore=shutil.ignore_patterns("adapters", "training.json"))
    return folder


JSONS = [
    "model_index.json",
    "hires.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
]


@inputs(5)
@given(data=st.data(), name=st.sampled_from(JSONS))
def test_json_of_model_folders(model, data, name):
    path = model / name
    whole = path.read_bytes()
    value = json.loads(whole)
    fresh = json.dumps(data.draw(edited(value))).encode() if data.draw(st.booleans()) else data.draw(damaged(whole))
    try:
        path.write_bytes(fresh)
        told(check_folder, model)
        told(read_hints, model)
        told(revision, model)
        if data.draw(st.integers(0, 3)) == 0:
            told(load, model)
    finally:
        path.write_bytes(whole)


HEADER = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"format": "pt"}}


@inputs(2)
@given(
    header=st.one_of(edited(HEADER).map(as_json), JUNK.map(as_json), st.just("[" * 9999)),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_headers_of_weights(model, header, length):
    text = header.encode()
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 4)
        told(check_folder, model)
    finally:
        path.write_bytes(whole)


LAYER = "transformer.transformer_blocks.0.attn.to_q"


@inputs(3)
@given(data=st.data())
def test_adapters(flux, data, tmp_path):
    width = flux.model.transformer_blocks[0].attn.to_q.in_features
    keys = st.sampled_from(
        [
            f"{LAYER}.lora_A.weight",
            f"{LAYER}.lora_B.weight",
            f"{LAYER}.alpha",
            "x",
            "",
            "lora_unet_x.lora_down.weight",
            f"{LAYER.replace('0', '99')}.lora_A.weight",
            "double_blocks.0.processor.qkv_lora1.down.weight",
            "base_model.model.x.lora_A.weight",
            f"{LAYER}.lora_A.default.weight",
        ]
    )
    shapes = st.sampled_from([(2, width), (width, 2), (3, width), (width, 3), (), (0,), (1, 1, 1), (width, width)])
    kinds = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.int64, torch.bool])
    drawn = data.draw(st.dictionaries(keys, st.tuples(shapes, kinds), max_size=4))
    right = {f"{LAYER}.lora_A.weight": torch.zeros(2, width), f"{LAYER}.lora_B.weight": torch.zeros(width, 2)}
    weights = (right if data.draw(st.booleans()) else {}) | {k: torch.zeros(s, dtype=d) for k, (s, d) in drawn.items()}
    note = data.draw(
        st.none() | st.sampled_from(["", "{", "[]", '{"transformer": 3}', '{"transformer.r": -1}', "null"])
    )
    file = save(weights, None if note is None else {"lora_adapter_metadata": note})
    if data.draw(st.integers(0, 3)) == 0:
        file = data.draw(damaged(file))
    (tmp_path / "a.safetensors").write_bytes(file)
    before = set(getattr(flux.model, "peft_config", {}))
    told(load_lora, flux.pipe, tmp_path / "a.safetensors", "fuzz")
    if "fuzz" in getattr(flux.model, "peft_config", {}):
        flux.pipe.delete_adapters("fuzz")
    assert set(getattr(flux.model, "peft_config", {})) == before


# --- command line -----------------------------------------------------------------------------------------------------

OPTIONS = [
    "--config",
    "--size",
    "--shard",
    "--study",
    "--backbone",
    "--variant",
    "--setting",
    "--set",
    "--seed",
    "--model",
    "--image",
    "--strength",
    "--out",
    "--again",
    "--from",
    "--name",
    "--json",
    "--results",
    "--references",
    "--steps",
    "--x",
    "-h-",
    "--",
]
VALUES = st.sampled_from(
    [v for v in NASTY if "\0" not in v and v != "\ud800"] + [str(ROOT / "config/smoke.yaml"), ".", "folder", "a.png"]
)
SAFE = {  # last options: no command begins its work
    "generate": ["--out", "nowhere/a.png"],
    "train": ["--device", "nowhere"],
    "speed": ["models", "--device", "nowhere"],
    "promote": ["--from", "nowhere"],
    "run": ["--config", "nowhere"],
    "notebook": ["--name", "nowhere"],
}


@inputs(9)
@given(command=st.sampled_from([c for c in COMMANDS if c != "doctor"]) | VALUES, data=st.data())
def test_the_command_line(command, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir(exist_ok=True)
    words = st.tuples(st.sampled_from(OPTIONS), VALUES).map(list) | VALUES.map(lambda value: [value])
    argv = [
        command,
        *(word for part in data.draw(st.lists(words, max_size=4)) for word in part),
        *SAFE.get(command, []),
    ]
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    event(f"exit code {code}")
    assert code in (0, 1, 2) and "Traceback" not in said.err
    assert code == 0 or said.err.strip() or command == "verify"


def test_the_shares_make_a_whole():
    shares = [int(share) for share in re.findall(r"^@inputs\((\d+)\)", Path(__file__).read_text(), re.MULTILINE)]
    assert sum(shares) == 100
