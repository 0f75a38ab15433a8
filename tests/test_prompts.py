"""Drawing prompts: what decides the choice, what is filtered, what is refused."""

import json
import subprocess
import sys
from itertools import pairwise

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hires import shards
from hires.cli import main
from hires.config import Prompts, load_config
from hires.data.prompts import draw_prompts, freeze, read_counts, read_prompts
from hires.data.sources import parquet_files
from hires.errors import HiresError


def rows(n, start=0):
    return [
        {
            "URL": f"http://x/{i}",
            "TEXT": f"a picture of number {i}",
            "WIDTH": 400 + i,
            "HEIGHT": 900 - i,
            "similarity": 0.2 + i / 1000,
            "punsafe": i / 100,
            "pwatermark": 1 - i / 100,
            "AESTHETIC_SCORE": 4 + i / 50,
            "hash": i * 7919,
        }
        for i in range(start, start + n)
    ]


def write(path, data, **options):
    pq.write_table(pa.Table.from_pylist(data) if isinstance(data, list) else data, path, **options)
    return path


def draw(folder, source, **prompts):
    counts = draw_prompts(Prompts(**prompts), source, folder / "out" / "prompts.parquet")
    drawn = read_prompts(folder / "out" / "prompts.parquet")
    assert read_counts(folder / "out" / "prompts.parquet") == counts
    return drawn, counts


def refused(folder, source, **prompts):
    with pytest.raises(HiresError) as error:
        draw(folder, source, **prompts)
    assert "\n" not in str(error.value)
    return str(error.value)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(40)),
    cuts=st.sets(st.integers(1, 39), max_size=3),
    group=st.integers(1, 50),
    n=st.integers(1, 40),
)
def test_the_choice_depends_on_the_rows_alone(tmp_path_factory, order, cuts, group, n):
    folder = tmp_path_factory.mktemp("prompts")
    data = rows(40)
    whole, _ = draw(folder, write(folder / "whole.parquet", data), n=40)
    shuffled = [data[i] for i in order]
    edges = [0, *sorted(cuts), 40]
    (folder / "parts").mkdir()
    for k, (a, b) in enumerate(pairwise(edges)):
        write(folder / "parts" / f"{k}.parquet", shuffled[a:b], row_group_size=group)
    drawn, _ = draw(folder, folder / "parts", n=n)
    assert drawn == whole[:n]


def test_another_seed_draws_another_list_and_every_row_is_as_likely(tmp_path):
    source = write(tmp_path / "a.parquet", rows(40))
    times = np.zeros(40)
    for seed in range(200):
        drawn, _ = draw(tmp_path, source, n=10, seed=seed)
        for prompt in drawn:
            times[int(prompt.prompt.split()[-1])] += 1
    # a binomial of mean 50 and standard deviation 6.1 for each row
    assert times.min() > 50 - 5 * 6.1 and times.max() < 50 + 5 * 6.1
    assert np.mean((times - 50) ** 2) == pytest.approx(200 * 0.25 * 0.75, rel=0.6)


def test_what_is_stored(tmp_path):
    drawn, _ = draw(tmp_path, write(tmp_path / "a.parquet", rows(3)), n=3)
    assert [p.index for p in drawn] == [0, 1, 2]
    by_url = {p.url: p for p in drawn}
    second = by_url["http://x/1"]
    assert (second.prompt, second.hash, second.width, second.height) == ("a picture of number 1", "7919", 401, 899)
    assert all(len(p.id) == 16 and int(p.id, 16) >= 0 for p in drawn)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["prompts.parquet"]


def test_the_id_is_the_rows_own_key_or_its_address_and_caption(tmp_path):
    data = rows(3)
    keyed, _ = draw(tmp_path, write(tmp_path / "a.parquet", data), n=3)
    moved = [{**row, "URL": "elsewhere", "TEXT": f"{row['TEXT']}!"} for row in data]
    assert {p.id for p in draw(tmp_path, write(tmp_path / "b.parquet", moved), n=3)[0]} == {p.id for p in keyed}
    plain = [{k: v for k, v in row.items() if k != "hash"} for row in data]
    unkeyed, _ = draw(tmp_path, write(tmp_path / "c.parquet", plain), n=3)
    assert {p.hash for p in unkeyed} == {None} and not {p.id for p in unkeyed} & {p.id for p in keyed}
    assert draw(tmp_path, tmp_path / "a.parquet", n=3, columns={"hash": None})[0] == unkeyed


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"min_side": 410}, range(10, 50)),
        ({"max_punsafe": 0.105}, range(11)),
        ({"max_pwatermark": 0.605}, range(40, 50)),
        ({"min_aesthetic": 4.59}, range(30, 50)),
        ({"min_similarity": 0.2445}, range(45, 50)),
        ({"min_characters": 22}, range(10, 50)),
        ({"max_characters": 21}, range(10)),
        ({"min_side": 410, "max_punsafe": 0.2}, range(10, 21)),
    ],
)
def test_filters(tmp_path, filters, kept):
    source = write(tmp_path / "a.parquet", rows(50))
    drawn, counts = draw(tmp_path, source, n=len(kept), filters=filters)
    assert {int(p.prompt.split()[-1]) for p in drawn} == set(kept)
    assert counts["rows"] == 50 and counts["kept"] == len(kept)
    assert sum(counts["dropped"].values()) == 50 - len(kept)


def test_rows_without_caption_or_without_the_value_asked_about_are_dropped_and_counted(tmp_path):
    data = rows(10)
    data[0]["TEXT"] = None
    data[1]["TEXT"] = "  "
    data[2]["punsafe"] = None
    data[3]["punsafe"] = float("nan")
    _, counts = draw(tmp_path, write(tmp_path / "a.parquet", data), n=6, filters={"max_punsafe": 1})
    assert counts["dropped"] == {"null_caption": 1, "min_characters": 1, "max_punsafe": 2, "duplicate": 0}


def test_of_equal_captions_one_is_kept(tmp_path):
    data = rows(10) + [{**row, "TEXT": f" {row['TEXT'].upper()}\t", "hash": row["hash"] + 1} for row in rows(4)]
    drawn, counts = draw(tmp_path, write(tmp_path / "a.parquet", data), n=10)
    assert counts["dropped"]["duplicate"] == 4
    assert len({" ".join(p.prompt.lower().split()) for p in drawn}) == 10
    assert drawn == draw(tmp_path, write(tmp_path / "b.parquet", data[::-1]), n=10)[0]
    everything, counts = draw(tmp_path, tmp_path / "a.parquet", n=14, filters={"drop_duplicates": False})
    assert counts["dropped"]["duplicate"] == 0 and len(everything) == 14


def test_equal_rows_are_never_drawn_twice(tmp_path):
    source = write(tmp_path / "a.parquet", rows(5) * 2)
    assert "only 5 of 10 rows" in refused(tmp_path, source, n=6, filters={"drop_duplicates": False})


def test_long_captions_are_kept_and_counted(tmp_path):
    data = rows(3)
    data[0]["TEXT"] = "x" * 10_000
    drawn, counts = draw(tmp_path, write(tmp_path / "a.parquet", data), n=3)
    assert counts["over_300_characters"] == 1 and max(len(p.prompt) for p in drawn) == 10_000


def test_columns_differ_in_case_between_files(tmp_path):
    write(tmp_path / "1.parquet", rows(5))
    write(tmp_path / "2.parquet", [{k.lower(): v for k, v in row.items()} for row in rows(5, 5)])
    assert len(draw(tmp_path, str(tmp_path / "*.parquet"), n=10, filters={"min_side": 100})[0]) == 10


def test_columns_of_other_types_and_names(tmp_path):
    table = pa.table(
        {
            "caption": pa.array(["one", "two"], pa.large_string()).dictionary_encode(),
            "url": ["u1", "u2"],
            "w": pa.array([640.0, None]),
            "h": ["480", "300"],
        }
    )
    source = write(tmp_path / "a.parquet", table)
    drawn, _ = draw(tmp_path, source, n=2, columns={"text": "caption", "width": "w", "height": "h"})
    assert sorted((p.prompt, p.width, p.height) for p in drawn) == [("one", 640, 480), ("two", None, 300)]


def test_sources_that_cannot_be_read(tmp_path):
    assert "does not exist" in refused(tmp_path, tmp_path / "no.parquet")
    (tmp_path / "empty").mkdir()
    assert "no parquet file there" in refused(tmp_path, tmp_path / "empty")
    assert "no parquet file there" in refused(tmp_path, str(tmp_path / "x*.parquet"))
    for name, content in (("text.parquet", b"a,b\n1,2\n"), ("zero.parquet", b"")):
        (tmp_path / name).write_bytes(content)
        assert f"{name}: not a readable parquet file" in refused(tmp_path, tmp_path / name)
    whole = write(tmp_path / "a.parquet", rows(1000), row_group_size=10).read_bytes()
    damaged = bytearray(whole)
    damaged[200:4000] = bytes(3800)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    assert "not a readable parquet file" in refused(tmp_path, tmp_path / "damaged.parquet")
    assert not (tmp_path / "out").exists()


def test_missing_columns_say_what_there_is_and_how_to_map(tmp_path):
    source = write(tmp_path / "a.parquet", pa.table({"caption": ["x"], "url": ["u"], "Text": ["y"], "tExt": ["z"]}))
    message = refused(tmp_path, source, n=1, columns={"text": "title"})
    assert "no column 'title'" in message
    assert "caption, url, Text, tExt" in message and "prompts.columns.text" in message
    assert "fits Text, tExt" in refused(tmp_path, source, n=1)
    named = {"text": "caption"}
    message = refused(tmp_path, source, n=1, columns=named, filters={"min_aesthetic": 5})
    assert "AESTHETIC_SCORE" in message and "prompts.filters.min_aesthetic to null" in message
    assert "prompts.columns.url" in refused(tmp_path, source, n=1, columns=named | {"url": "link"})
    assert draw(tmp_path, source, n=1, columns=named | {"url": None})[0][0].url is None
    message = refused(tmp_path, source, n=1, columns=named | {"width": "url"}, filters={"min_side": 3})
    assert "no column 'HEIGHT'" in message
    message = refused(tmp_path, source, n=1, columns=named | {"width": "url"})
    assert "column 'url' (prompts.columns.width) can't be read as int64" in message


def test_too_few_rows_say_what_each_filter_dropped(tmp_path):
    source = write(tmp_path / "a.parquet", rows(50))
    message = refused(tmp_path, source, n=30, filters={"min_side": 410, "max_punsafe": 0.2})
    assert "only 11 of 50 rows are left" in message
    assert "min_side 10" in message and "max_punsafe 29" in message
    nothing = write(tmp_path / "0.parquet", pa.Table.from_pylist(rows(1)).slice(0, 0))
    assert "only 0 of 0 rows" in refused(tmp_path, nothing, n=1)


def test_a_key_that_is_none_is_refused(tmp_path):
    source = write(tmp_path / "a.parquet", [{**row, "hash": 5} for row in rows(4)])
    message = refused(tmp_path, source, n=4)
    assert "prompts.columns.hash = 'hash'" in message and "'5' stands for several captions" in message


def test_folders_are_searched_to_any_depth(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    deep = write(tmp_path / "a" / "b" / "1.parquet", rows(1))
    assert parquet_files(tmp_path) == [deep]


def test_the_embedded_source_is_drawn_by_the_same_path(tmp_path, monkeypatch):
    from hires.config import load_config
    from hires.scenes import caption, scene, scene_of_url, split
    from hires.stages import prompts

    config = tmp_path / "c.yaml"
    config.write_text(
        "name: c\nprompts: {n: 5, scenes: {pool: 20}}\n"
        "backbones: {a: {model: tiny-flux, base_resolution: 128, size_multiple: 32}}\n"
        "studies: {main: {backbones: [a], variants: [npa], sizes: {256x256: 5}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    path = prompts.run(load_config(config))
    first = path.read_bytes()
    for prompt in read_prompts(path):
        scene_id = scene_of_url(prompt.url)
        assert split(scene_id) == "held-out" and caption(scene(scene_id)) == prompt.prompt
        assert (prompt.width, prompt.height) == (512, 512)
    assert prompts.run(load_config(config)).read_bytes() == first


# VmHWM, since ru_maxrss of a child starts at its parent's.
MEASURE = """
import sys
from hires.config import Prompts
from hires.data.prompts import draw_prompts
draw_prompts(Prompts(n=1000), sys.argv[1], sys.argv[2])
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)
"""


def test_a_million_rows_in_one_row_group_need_little_memory(tmp_path):
    """Ten times the rows may cost 24 bytes for each, far from the 1 GiB that 10 million rows may take."""

    def peak(n):
        number = pa.array(np.arange(n)).cast(pa.string())
        text = pa.compute.binary_join_element_wise("a caption of the usual length, this one has number", number, " ")
        table = pa.table({"URL": pa.compute.binary_join_element_wise("http://x/", number, ""), "TEXT": text})
        source = write(tmp_path / f"{n}.parquet", table, row_group_size=n)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, source, tmp_path / "o.parquet"], capture_output=True, check=True
        )
        return json.loads(done.stdout)

    few, many = peak(100_000), peak(1_000_000)
    assert many - few < 100 * 2**20
    assert many + 9e6 * 24 < 2**30


# --- elsewhere than in a local folder


def test_addresses_draw_as_folders_do(tmp_path):
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    write(source / "a.parquet", rows(20))
    write(source / "b" / "c.parquet", rows(20, 20))
    here, _ = draw(tmp_path, source, n=5)
    memory = fsspec.filesystem("memory")
    for name in ("a.parquet", "b/c.parquet"):
        memory.pipe(f"/laion/{name}", (source / name).read_bytes())
    memory.pipe("/laion/readme.txt", b"")
    for address in ("memory://laion", "memory://laion/**/*.parquet", f"file://{source}"):
        assert draw(tmp_path, address, n=5)[0] == here
    assert len(parquet_files("memory://laion/a.parquet")) == 1


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("memory://nowhere", "no parquet file there"),
        ("memory://laion-2/text", "not a readable parquet file"),
        ("gopher://x/y", "can't be read"),
        ("abfs://x/y", "can't be read: Install adlfs"),
    ],
)
def test_an_address_that_gives_nothing(tmp_path, address, told):
    fsspec.filesystem("memory").pipe("/laion-2/text", b"no parquet")
    assert told in refused(tmp_path, address, n=1)


# --- frozen lists


def frozen(folder, **prompts):
    drawn, _ = draw(folder, folder / "all.parquet", **prompts)
    assert freeze(folder / "out" / "prompts.parquet", folder / "list.json") == len(drawn)
    return drawn, str(folder / "list.json")


def test_a_frozen_list_is_replayed_from_more_or_fewer_rows(tmp_path):
    write(tmp_path / "all.parquet", rows(40))
    drawn, path = frozen(tmp_path, n=10, seed=3)
    assert all(prompt.prompt not in (tmp_path / "list.json").read_text() for prompt in drawn)
    write(tmp_path / "more.parquet", rows(400))
    again, counts = draw(tmp_path, tmp_path / "more.parquet", n=10, frozen=path)
    assert again == drawn and counts["missing"] == counts["changed"] == 0
    assert draw(tmp_path, tmp_path / "more.parquet", n=4, frozen=path)[0] == drawn[:4]

    left = [row for row in rows(40) if row["TEXT"] not in (drawn[0].prompt, drawn[4].prompt)]
    left = [row | {"TEXT": "another"} if row["TEXT"] == drawn[7].prompt else row for row in left]
    write(tmp_path / "fewer.parquet", left)
    again, counts = draw(tmp_path, tmp_path / "fewer.parquet", n=10, frozen=path)
    assert (counts["frozen"], counts["drawn"], counts["missing"], counts["changed"]) == (10, 7, 2, 1)
    assert [p.id for p in again] == [p.id for i, p in enumerate(drawn) if i not in (0, 4, 7)]
    assert [p.index for p in again] == list(range(7))


def test_a_bad_frozen_list_is_one_line(tmp_path):
    write(tmp_path / "all.parquet", rows(10))
    _, path = frozen(tmp_path, n=5)
    assert "holds 5; lower n" in refused(tmp_path, tmp_path / "all.parquet", n=6, frozen=path)
    write(tmp_path / "others.parquet", rows(10, 50))
    assert "none of its 5 prompts" in refused(tmp_path, tmp_path / "others.parquet", n=5, frozen=path)
    assert "does not exist" in refused(tmp_path, tmp_path / "all.parquet", n=5, frozen="nowhere.json")
    (tmp_path / "list.json").write_text('{"version": 2, "source": "", "seed": 0, "prompts": []}')
    assert "is no frozen list: version" in refused(tmp_path, tmp_path / "all.parquet", n=5, frozen=path)


def test_the_command_freezes_and_says_what_a_replay_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "all.parquet", rows(40))
    common = "name: t\nbackbones: {f: {model: tiny-flux, base_resolution: 128, size_multiple: 32}}\n"
    common += "studies: {s: {backbones: [f], variants: [npa], sizes: {256x256: 5}}}\n"
    (tmp_path / "c.yaml").write_text(common + "prompts: {source: all.parquet, n: 5}\n")
    assert main(["prompts", "--config", "c.yaml", "--freeze", "list.json"]) == 0
    assert "list.json: 5 prompts, frozen" in capsys.readouterr().out
    first = read_prompts("results/t/prompts.parquet")[0]
    write(tmp_path / "all.parquet", [row for row in rows(40) if row["TEXT"] != first.prompt])
    (tmp_path / "c.yaml").write_text(common + "prompts: {source: all.parquet, n: 5, frozen: list.json}\n")
    assert main(["prompts", "--config", "c.yaml"]) == 0
    assert "4 of 5 frozen prompts (1 gone from the source, 0 with another caption)" in capsys.readouterr().out
    config = load_config(tmp_path / "c.yaml")
    assert len(shards.items(config, 5, [0], 0, lambda name, seed: tmp_path / name, "images")) == 4
