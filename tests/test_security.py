"""What comes from elsewhere (files, pictures, addresses, captions) runs nothing, reaches nowhere and stays small."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from results_tree import build

from hires import report
from hires.additions import lora
from hires.analysis import tables
from hires.analysis.results import Results
from hires.backbones.loading import check_folder, load
from hires.cli import main
from hires.config import Prompts, load_config
from hires.data import download, prompts
from hires.data.pictures import Missing, contents
from hires.data.prompts import Prompt, draw_prompts, read_prompts
from hires.errors import LONGEST, HiresError, redacted
from hires.files.storage import write_bytes
from hires.files.untrusted import member, read_picture, read_yaml
from hires.stages import references
from hires.training.captioned import open_source

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7"

# --- nothing is run ---------------------------------------------------------------------------------------------------

FORBIDDEN = (
    r"\bpickle\b|\bdill\b|cloudpickle|joblib|\bshelve\b|\bmarshal\b",
    r"torch\.load\(",
    r"allow_pickle",
    r"(?<![\w.])(eval|exec|compile)\(",
    r"yaml\.(unsafe_|full_)?load(_all)?\(",
    r"shell\s*=\s*True|os\.system|os\.popen",
    r"trust_remote_code",
    r"Image\.open\((?!.*formats)",
    r"urlopen|urlretrieve|requests\.",
    r"from_pretrained\((?!.*use_safetensors)",
    r"extractall|(?<!\.str)\.extract\(",
)
ALLOWED = {  # file, what the line holds -> why
    ("src/hires/training/scale_dit/trainer.py", "import pickle"): "the name of an error",
    ("src/hires/training/scale_dit/trainer.py", "pickle.UnpicklingError"): "the name of an error",
    ("src/hires/training/scale_dit/trainer.py", "weights_only=True"): "a run's own checkpoint, read without code",
    ("src/hires/analysis/results.py", "Image.open(path)"): "images of this run, found by their manifests",
    ("src/hires/backbones/loading.py", "known.from_pretrained(part)"): "tokenizers and schedulers: JSON",
    ("src/hires/backbones/loading.py", "known.from_pretrained(ASSETS"): "an embedded tokenizer",
    ("src/hires/backbones/loading.py", "config_class.from_pretrained(part)"): "a configuration: JSON",
    ("src/hires/metrics/networks.py", "CLIPTokenizer.from_pretrained(place)"): "JSON",
}


def source_lines():
    for folder in ("src", "kernels", "rules", "notebooks", "config"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".smk", ".ipynb", ".yaml"):
                for line in path.read_text().splitlines():
                    yield path.relative_to(ROOT).as_posix(), line


def test_the_source_runs_nothing_that_it_reads():
    found = [(file, line.strip()) for file, line in source_lines() if any(re.search(rule, line) for rule in FORBIDDEN)]
    reasons = [[key for key in ALLOWED if key[0] == file and key[1] in line] for file, line in found]
    assert [hit for hit, reason in zip(found, reasons) if not reason] == []
    assert {key for reason in reasons for key in reason} == set(ALLOWED), "exceptions that nothing needs"


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_never_opened(tmp_path):
    import shutil

    from hires.models import ASSETS

    model = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny-flux", model, ignore=shutil.ignore_patterns("adapters"))
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": Trap(tmp_path / "ran")}, model / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(HiresError, match=r"no \*\.safetensors weights; other formats are not read"):
        load(model)
    torch.save({"x": Trap(tmp_path / "ran")}, tmp_path / "lora.safetensors")
    with pytest.raises(HiresError, match="no safetensors file"):
        lora.load_lora(load("tiny-flux", weights="random").pipe, tmp_path / "lora.safetensors", "x")
    torch.save({"x": Trap(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    from hires.metrics import load_clip

    with pytest.raises(HiresError):
        load_clip(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("part", "value"),
    [("transformer", ["evil", "Class"]), ("vae", ["diffusers", "logging"]), ("../vae", ["diffusers", "AutoencoderKL"])],
)
def test_a_model_folder_brings_no_code_and_stays_inside(tmp_path, part, value):
    (tmp_path / "vae").mkdir()
    (tmp_path / "transformer").mkdir()
    index = {"_class_name": "FluxPipeline", part: value}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "evil.py").write_text("raise SystemExit")
    with pytest.raises(HiresError, match=r"other code is not run|must be a name"):
        check_folder(tmp_path)


def test_shards_of_weights_lie_beside_their_index(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    place = tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    for shard in ("../../secret.safetensors", "/etc/passwd", "", 3):
        place.write_text(json.dumps({"weight_map": {"x": shard}}))
        with pytest.raises(HiresError, match="is not the name of a file in"):
            check_folder(tmp_path)


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with (tmp_path / "vae" / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 4 << 30))
        file.truncate(5 << 30)  # sparse
    with pytest.raises(HiresError, match=r"a header of 4294967296 bytes, at most 100000000"):
        check_folder(tmp_path)


# --- YAML -------------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "unfold to more than"),
        ("a: &a [*a]", "into themselves"),
        ("a: &a {<<: *a}", "into themselves"),
        ("[" * 1500, "nested too deep"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: 2001-99-99", "month must be in"),
        ("a: !!int ''", "not YAML"),
        (f"a: {'9' * 5000}", "4300 digits"),
        ("a: " + "x" * (1 << 20), "more than 1 MiB"),
    ],
)
def test_yaml_is_data_and_bounded(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(HiresError, match=message):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(HiresError, match=message):
        load_config(tmp_path / "x.yaml")
    assert time.process_time() - started < 5


def test_aliases_of_honest_files_work(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


# --- paths ------------------------------------------------------------------------------------------------------------

PATHS = ("../x", "/etc/passwd", "..", ".", "", "a/b", "a\0b", "x/../../y", None, 3)
ODD = (*PATHS[:4], "a\0b", "CON", "nul.png", "x" * 5000, "‮gnp.exe", "e\u0301", "ﬁ", "a\nb", "~root", "$(id)", "x:y")


@pytest.mark.parametrize("name", PATHS)
def test_manifests_name_files_of_their_own_folder(tmp_path, name):
    with pytest.raises(HiresError, match="not the name of a file"):
        member(tmp_path, name)
    root = build(tmp_path / "r", backbones=("tiny-flux",), variants=("npa",), taus=())
    manifest = next(root.glob("images/*/*/*/*/*/shard-000.json"))
    record = json.loads(manifest.read_text())
    record["images"][0]["file"] = name
    from hires.files.storage import sealed

    manifest.write_text(json.dumps(sealed({k: v for k, v in record.items() if k != "digest"})))
    with pytest.raises(HiresError):
        _ = Results.open(root).images


def test_rows_of_a_parquet_name_no_files(tmp_path):
    texts = [f"caption {i}" for i in range(len(ODD))]
    keys = [str(name) for name in ODD]
    pq.write_table(pa.table({"URL": keys, "TEXT": texts, "hash": keys}), tmp_path / "s.parquet")
    draw_prompts(Prompts(n=len(ODD)), tmp_path / "s.parquet", tmp_path / "p.parquet")
    assert all(re.fullmatch("[0-9a-f]{16}", prompt.id) for prompt in read_prompts(tmp_path / "p.parquet"))


@pytest.mark.parametrize("identity", ["../../x", "/x", "", "A", "0" * 65])
def test_a_stored_list_of_prompts_with_other_ids_is_refused(tmp_path, identity):
    pq.write_table(pa.table({"URL": ["u"], "TEXT": ["a"]}), tmp_path / "s.parquet")
    draw_prompts(Prompts(n=1), tmp_path / "s.parquet", tmp_path / "p.parquet")
    table = pq.read_table(tmp_path / "p.parquet")
    table = table.set_column(table.schema.get_field_index("id"), "id", pa.array([identity]))
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "p.parquet")
    with pytest.raises(HiresError, match=r"p\.parquet is damaged"):
        read_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize("name", [name for name in ODD if name not in ("CON", "nul.png")])
def test_names_of_a_configuration_are_plain(tmp_path, name):
    def refused(**edit):
        data = {"extends": str(ROOT / "config/smoke.yaml"), **edit}
        (tmp_path / "c.yaml").write_text(json.dumps(data))
        with pytest.raises(HiresError) as error:
            load_config(tmp_path / "c.yaml")
        assert len(str(error.value).splitlines()) == 1

    refused(name=name)
    refused(studies={name: {"backbones": ["tiny-flux"], "variants": ["npa"], "sizes": {"256x256": 1}}})
    refused(notebooks={name: {}})


def test_a_configuration_does_not_say_where_notebooks_write(tmp_path):
    (tmp_path / "c.yaml").write_text(
        json.dumps({"extends": str(ROOT / "config/smoke.yaml"), "notebooks": {"02_ablation": {"output": "/etc"}}})
    )
    with pytest.raises(HiresError, match=r"notebooks\.02_ablation\.output: .* leave it out"):
        load_config(tmp_path / "c.yaml")


def test_notebook_parameters_are_values_not_code():
    from papermill.translators import PythonTranslator

    values = {"a": '"; import os; os.abort() #', "b": ["\\", "'", "\n", "\x00", "{x}"], "c": {'"]': '"""'}, "d": None}
    space = {}
    exec(PythonTranslator.codify(values), space)
    assert {name: space[name] for name in values} == values


def test_writing_replaces_a_link_and_never_follows_one(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "a.txt").symlink_to(outside)
    write_bytes(tmp_path / "a.txt", b"new")
    assert outside.read_text() == "mine" and not (tmp_path / "a.txt").is_symlink()
    (tmp_path / ".b.txt.part").symlink_to(outside)
    with pytest.raises(HiresError, match="cannot write"):
        write_bytes(tmp_path / "b.txt", b"new")
    assert outside.read_text() == "mine"


# --- report, tables ---------------------------------------------------------------------------------------------------

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--<script>",
    "{{ 7 * 7 }} ]]> &lt;b&gt;",
    "a\u2028b\u2029c \\u003cscript>",
    "costs $5 and $x_{ $",
)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.data = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += data


def test_the_report_shows_captions_as_text(tmp_path):
    root = build(tmp_path, sizes=((64, len(HOSTILE)),), backbones=("tiny-flux",), variants=("npa",), taus=(),
                 prompts=HOSTILE)  # fmt: skip
    (root / "tables").mkdir()
    frame = pd.DataFrame({"variant": list(HOSTILE), "=1+1": ["x"] * len(HOSTILE)})
    tables.write(root, "mine", frame, frame)
    record = json.loads((root / "provenance.json").read_text())
    record |= {"configuration": {"x": list(HOSTILE)}, "commit": HOSTILE[0]}
    (root / "provenance.json").write_text(json.dumps(record))
    report.write(Results.open(root), tmp_path / "r.html", HOSTILE[1])
    text = (tmp_path / "r.html").read_text()
    page = Tags(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert json.loads(page.data)["prompts"] == list(HOSTILE)
    assert "default-src 'none'" in text and "49" not in re.findall(r"<td>(.*?)</td>", text)
    assert not any(value.startswith("http") for tag, attributes in page.tags if tag != "a"
                   for name, value in attributes.items() if name in ("src", "href"))  # fmt: skip


def test_a_caption_with_dollars_is_drawn_as_it_is():
    from hires.figures.pictures import comparison

    rows = [(caption, {"npa": Image.new("RGB", (32, 32))}) for caption in HOSTILE]
    comparison(rows, ["npa"]).savefig(io.BytesIO(), dpi=30)


def test_tables_hold_no_formulas_html_or_links(tmp_path):
    cells = ["=cmd|' /C calc'!A0", "+1", "-x", "@SUM(1)", "<img src=x>", "[a](javascript:alert(1))", "a|b\nc", "npa"]
    frame = pd.DataFrame({"variant": cells, "value": [-1.5] * len(cells)})
    text = tables.write(tmp_path, "t", frame, frame)
    stored = pd.read_csv(tmp_path / "tables" / "t.csv")
    assert list(stored["variant"])[:4] == ["'" + cell for cell in cells[:4]] and set(stored["value"]) == {-1.5}
    assert stored["variant"].iloc[-1] == "npa"
    assert "<" not in text and "](" not in text and len(text.splitlines()) == len(cells) + 2
    header, rows = report.read_table(text)
    assert header == ["variant", "value"]
    assert [row[0] for row in rows] == [*cells[:6], "a|b c", "npa"]


def test_records_do_not_steer_the_terminal(tmp_path, capsys):
    info = PngInfo()
    info.add_text("parameters", json.dumps({"\x1b[2Jkey": "\x9b31m", "b\ud800": {"‮c": ["\x07"]}}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    for options in ([], ["--json"]):
        assert main(["show", str(tmp_path / "a.png"), *options]) == 0
        shown = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in shown) and "key" in shown


# --- tokens -----------------------------------------------------------------------------------------------------------

SECRETS = {
    TOKEN: "",
    f"https://hub/{TOKEN}/x": "https://hub/",
    "https://user:secretpw@host.org/x.png": "@host.org/x.png",
    "ftp://secretpw@host": "@host",
    "https://b.s3.amazonaws.com/k?X-Amz-Signature=secretpw&x=1": "&x=1",
    "https://host/?access_token=secretpw": "https://host/",
    "Authorization: Bearer secretpw": "Authorization: Bearer ",
    "mine-is-secretpw-indeed": "",
}


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_left_out(text, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "mine-is-secretpw-indeed")
    assert "secretpw" not in redacted(text) and TOKEN not in redacted(text)
    assert SECRETS[text] in redacted(text)
    assert "secretpw" not in str(HiresError(f"it was {text!r}"))


def test_plain_addresses_stay_as_they_are():
    for text in ("https://host.org/a@b.png?width=3&keyword=x#t", "a@b.org", "hf_config", "scene://42", "x?tokens=5"):
        assert redacted(text) == text


def test_errors_are_one_short_line():
    text = str(HiresError("a\nb\x1b[2J\u2028" + "x" * 10**6))
    assert text.startswith("a b\\x1b[2J\\u2028x") and len(text) < LONGEST + 10


def test_a_token_in_a_configuration_is_refused(tmp_path, capsys):
    data = {"extends": str(ROOT / "config/smoke.yaml"), "prompts": {"source": f"https://me:{TOKEN}@host/x.parquet"}}
    (tmp_path / "c.yaml").write_text(json.dumps(data))
    assert main(["plan", "--config", str(tmp_path / "c.yaml")]) == 2
    said = capsys.readouterr().err
    assert "no place in a configuration" in said and TOKEN not in said


def test_no_output_of_a_run_holds_a_token(tmp_path, monkeypatch, capfd):
    """A token in the environment, on the command line and in an address; then every byte that was written or said."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    table = pa.table({"URL": [f"http://me:{TOKEN}@127.0.0.1:9/x.png", "scene://1"], "TEXT": ["one red disc", "x"]})
    pq.write_table(table, tmp_path / "s.parquet")
    config = {
        "name": "t",
        "prompts": {"source": "s.parquet", "n": 2},
        "backbones": {"f": {"model": "tiny-flux", "weights": "random", "base_resolution": 128, "size_multiple": 32}},
        "studies": {"main": {"backbones": ["f"], "variants": ["upsample"], "sizes": {"256x256": 2}}},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["prompts", "--config", "c.yaml"]) == 0
    assert main(["references", "--config", "c.yaml", "--size", "256x256"]) == 0
    assert main(["generate", "--prompt", "x", "--model", f"https://me:{TOKEN}@hub/x"]) == 2
    main(["doctor"])
    with pytest.raises(SystemExit):
        main(["plan", "--token", TOKEN])

    def fail(_):
        raise KeyError(TOKEN)

    monkeypatch.setattr("hires.stages.prompts.run", fail)
    assert main(["prompts", "--config", "c.yaml"]) == 1
    said = "".join(capfd.readouterr())
    assert "KeyError" in said and "unrecognized arguments" in said and TOKEN not in said
    made = [path for path in tmp_path.rglob("results/**/*") if path.is_file()]
    assert any(path.name == "manifest.json" for path in made)
    # the drawn rows are the data themselves: an address stands there as the source has it
    assert [path.name for path in made if TOKEN.encode() in path.read_bytes()] == ["prompts.parquet"]


# --- pictures, archives, parquet --------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


BOMBS = {
    "pixels": png(60000, 60000, chunk(b"IDAT", zlib.compress(b"\0" * 1000))),
    "text": png(8, 8, chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b" " * (1 << 26), 9))),
    "cut": png(64, 64, chunk(b"IDAT", zlib.compress(b"\0" * 100)))[:-20],
    "other": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_pictures_are_bounded_and_of_few_formats(tmp_path, kind, capsys):
    path = tmp_path / "bomb.png"
    path.write_bytes(BOMBS[kind])
    with pytest.raises(HiresError, match=r"bomb\.png"):
        read_picture(path, path)
    for command in (["show", str(path)], ["generate", "--prompt", "x", "--image", str(path), "--out", "/dev/null.png"]):
        assert main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "bomb.txt").write_text("caption")
    with pytest.raises(HiresError):
        open_source(str(tmp_path), 8, 0, {}).pictures([0])


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png", "a"))[..., 1], grey >> 8)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(HiresError, match="32 bits"):
        read_picture(tmp_path / "f.tiff", "f")


def add(archive, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def picture_bytes():
    data = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(data, "PNG")
    return data.getvalue()


def test_shards_are_read_in_place(tmp_path):
    """Members with paths are never written, links and devices are passed over."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "../../evil/x.png", picture_bytes())
        add(archive, "../../evil/x.txt", b"a red square")
        add(archive, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "hard.png", type=tarfile.LNKTYPE, linkname="../../evil/x.png")
        add(archive, "device.png", type=tarfile.CHRTYPE)
        add(archive, "pipe.png", type=tarfile.FIFOTYPE)
    source = open_source(str(tmp_path / "a.tar"), 8, 0, {})
    assert [entry.caption for entry in source.entries] == ["a red square"]
    assert source.pictures([0]).images.shape == (1, 3, 8, 8)
    assert os.listdir(tmp_path) == ["a.tar"] and not (tmp_path.parents[1] / "evil").exists()


def test_bombs_in_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        add(archive, "x.png", picture_bytes())
    with pytest.raises(HiresError, match="can't be read"):
        open_source(str(tmp_path / "z.tar"), 8, 0, {})
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        add(archive, "x.png", picture_bytes())
        add(archive, "x.txt", b"x" * 100_000)
    with pytest.raises(HiresError, match="100000 bytes are no caption"):
        open_source(str(tmp_path / "t.tar"), 8, 0, {})
    header = tarfile.TarInfo("x.png")
    header.size = 1 << 40
    (tmp_path / "s.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"\0" * 2048)
    with pytest.raises(HiresError, match=r"at most 268435456|can't be read"):
        open_source(str(tmp_path / "s.tar"), 8, 0, {})


@pytest.mark.parametrize("name", ["../secret.png", "/etc/x.png", "a/../../x.png"])
def test_a_table_of_captions_names_images_of_its_folder(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(picture_bytes())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.csv").write_text(f"file_name,text\n{name},a\n")
    with pytest.raises(HiresError, match="not a file name inside"):
        open_source(str(tmp_path / "data"), 8, 0, {})


DRAW = """
import sys
from hires.config import Prompts
from hires.errors import HiresError
from hires.data.prompts import draw_prompts
try:
    draw_prompts(Prompts(n=1), sys.argv[1], sys.argv[2])
except HiresError as error:
    print(error, file=sys.stderr)
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024)
"""


def test_a_small_parquet_does_not_fill_the_memory(tmp_path):
    """5,000 captions of 1 MiB in a file of 50 kB: 5 GiB if a batch of them were decoded at once."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(5000, np.int32)), ["x" * (1 << 20)])
    pq.write_table(pa.table({"URL": column, "TEXT": column}), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 200_000
    done = subprocess.run(
        [sys.executable, "-c", DRAW, tmp_path / "bomb.parquet", tmp_path / "p.parquet"], capture_output=True, text=True
    )
    assert "too_long 5000" in done.stderr and int(done.stdout) < 1024


def test_a_row_group_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    table = pa.table({"URL": ["u"] * 70, "TEXT": ["x" * (1 << 20)] * 70})
    pq.write_table(table, tmp_path / "z.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "z.parquet").stat().st_size < 1 << 16
    monkeypatch.setattr(prompts, "UNPACKED", 64 << 20)
    with pytest.raises(HiresError, match="row group 0 unpacks to 70 MiB, at most 64"):
        draw_prompts(Prompts(n=1), tmp_path / "z.parquet", tmp_path / "p.parquet")


def test_sizes_that_are_no_numbers_are_none(tmp_path):
    widths = [float("nan"), float("inf"), 1e30, -5.0, 512.0]
    table = pa.table({"URL": list("abcde"), "TEXT": list("vwxyz"), "WIDTH": widths, "HEIGHT": widths})
    pq.write_table(table, tmp_path / "s.parquet")
    draw_prompts(Prompts(n=5), tmp_path / "s.parquet", tmp_path / "p.parquet")
    found = {prompt.prompt: prompt.width for prompt in read_prompts(tmp_path / "p.parquet")}
    assert found == {"v": None, "w": None, "x": None, "y": None, "z": 512}


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path):
    """A server on this machine, its address, and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            to = {"/file": "file:///etc/passwd", "/ftp": "ftp://127.0.0.1/x", "/data": "data:,x", "/loop": "/loop"}
            self.send_response(302 if self.path in to else 200)
            if self.path in to:
                self.send_header("Location", to[self.path])
            self.end_headers()
            try:
                for _ in range(100 if self.path == "/endless" else 1):
                    self.wfile.write(picture_bytes() if self.path == "/a.png" else b"x" * (1 << 20))
            except OSError:
                pass

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http.server_port, asked
        http.shutdown()
        thread.join()


def test_only_the_web_is_asked_and_only_in_public(web, tmp_path):
    port, asked = web
    (tmp_path / "a.png").write_bytes(picture_bytes())
    for url in (
        f"http://127.0.0.1:{port}/a.png",
        f"http://localhost:{port}/a.png",
        f"http://[::ffff:7f00:1]:{port}/a.png",
    ):
        assert download.fetch(url) is None
    assert asked == []
    assert download.fetch(f"http://127.0.0.1:{port}/a.png", private=True) == picture_bytes()
    for url in (f"file://{tmp_path}/a.png", "ftp://127.0.0.1/x", "data:image/png;base64,AA==", "//x", "http://a\nb", "http://",
                "http://127.0.0.1:99999/", "http://[", "gopher://x", "javascript:1"):  # fmt: skip
        assert download.fetch(url, private=True) is None


def test_redirects_and_endless_answers_are_given_up(web, monkeypatch):
    port, _ = web
    for path in ("/file", "/ftp", "/data", "/loop", "/endless"):
        assert download.fetch(f"http://127.0.0.1:{port}{path}", private=True) is None
    monkeypatch.setattr(download, "SECONDS", -1)
    assert download.fetch(f"http://127.0.0.1:{port}/a.png", private=True) is None


def test_what_is_no_picture_is_no_reference(web):
    port, _ = web

    def made(name, private):
        prompt = Prompt(0, "00", "a picture", f"http://127.0.0.1:{port}/{name}", None, None, None)
        return references.reference(prompt, 16, 16, contents(None, private))[0]

    assert made("a.png", private=True).size == (16, 16)
    for name, private in (("text", True), ("a.png", False)):
        with pytest.raises(Missing):
            made(name, private)
