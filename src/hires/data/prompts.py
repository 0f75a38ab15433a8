"""Draw prompts from parquet files in LAION's schema, and read the list back.

Which rows are drawn depends on the seed and the rows alone, never on their order, the files, or the row groups they
lie in: every row has a rank, a hash of (seed, id), and the n smallest ranks win. A smaller n draws the first of the
same list. Files are read in batches, so memory stays flat but for 8 bytes a row, which find captions that stand twice.
A small file that unfolds to a huge one is read in smaller batches, or refused.
"""

import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hires.config import Columns, Filters, Prompts
from hires.data.frozen import Frozen, Row, caption_digest, load_frozen
from hires.data.sources import Place, opened, parquet_files
from hires.errors import HiresError
from hires.files import parquet
from hires.files.storage import Damaged, write_json

BATCH = 32768  # rows decoded at once
BUDGET = 64 << 20  # bytes that dictionary-encoded text may take in a batch
UNPACKED = 1 << 30  # bytes of a row group's columns after decompression
LONGEST = 1 << 16  # bytes of a caption, address or key; a row with a longer one is dropped
LONG = 300  # characters; CLIP's 77 tokens end about there
METADATA = b"hires"

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("url", pa.string()),
        ("hash", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Prompt:
    """One prompt. `id` is safe in file names; width and height (pixels) are those of the source's image, if it says."""

    index: int
    id: str
    prompt: str
    url: str | None
    hash: str | None
    width: int | None
    height: int | None


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts that `draw_prompts` wrote, in order."""
    if not Path(path).exists():
        raise HiresError(f"{path} does not exist: draw the prompts first (hires prompts)")
    rows = parquet.read(Path(path), SCHEMA.names).select(SCHEMA.names).to_pylist()
    for row in rows:  # ids become file names
        if not (isinstance(row["prompt"], str) and re.fullmatch("[0-9a-f]{1,64}", row["id"] or "")):
            raise Damaged(f"{path} is damaged: no id of ours is {row['id']!r}")
    return [Prompt(**row) for row in rows]


def read_counts(path: str | Path) -> dict[str, Any]:
    """What became of the source's rows: rows, dropped (by filter), kept, drawn, over_300_characters."""
    return json.loads(parquet.read(Path(path)).schema.metadata[METADATA])["counts"]


def draw_prompts(settings: Prompts, source: str | Path, path: str | Path) -> dict[str, Any]:
    """Draw `settings.n` prompts from `source` (see `data.sources`), or replay a frozen list, and write them to `path`.

    Returns the counts that are also stored in the file's metadata. HiresError: no such file, not parquet, a column that
    is needed and missing, fewer rows than n; of a frozen list, which may have lost rows: none left.
    """
    rows, counts = (_replay if settings.frozen else _draw)(settings, parquet_files(source))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    record = {"version": 1, "settings": settings.model_dump(mode="json"), "counts": counts}
    table = table.replace_schema_metadata({METADATA: json.dumps(record)})
    parquet.write(Path(path), table)
    return counts


def freeze(path: str | Path, target: Path) -> int:
    """Write the frozen list of the prompts in `path`, as `draw_prompts` wrote them, to `target`; how many they are."""
    settings = json.loads(parquet.read(Path(path)).schema.metadata[METADATA])["settings"]
    rows = [
        Row(id=prompt.id, hash=prompt.hash, caption_sha256=caption_digest(prompt.prompt))
        for prompt in read_prompts(path)
    ]
    write_json(target, Frozen(source=settings["source"], seed=settings["seed"], prompts=rows).model_dump())
    return len(rows)


def _replay(settings: Prompts, files: list[Place]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a frozen list that are still there with the same caption; filters were applied when it was drawn."""
    listed = load_frozen(settings.frozen or "").prompts
    if len(listed) < settings.n:
        raise HiresError(f"prompts.n = {settings.n}: the frozen list {settings.frozen!r} holds {len(listed)}; lower n")
    wanted = {row.id: row.caption_sha256 for row in listed[: settings.n]}
    found: dict[str, dict[str, Any]] = {}
    changed: set[str] = set()
    total = 0
    for batch in _batches(files, settings.model_copy(update={"filters": Filters(min_characters=None)})):
        total += batch.num_rows
        for row in zip(*(batch[name].to_pylist() for name in _WANTED)):
            text, url, key, width, height = row
            if text is None or (prompt_id := _id(text, url, key)) not in wanted:
                continue
            if caption_digest(text) == wanted[prompt_id]:
                found[prompt_id] = {"prompt": text, "url": url, "hash": key, "width": width, "height": height}
            else:
                changed.add(prompt_id)
    if not found:
        raise HiresError(
            f"prompts.frozen {settings.frozen!r}: none of its {len(wanted)} prompts is among the {total} rows of "
            "prompts.source: is it the source that the list was drawn from?"
        )
    there = [prompt_id for prompt_id in wanted if prompt_id in found]
    rows = [{"index": i, "id": prompt_id, **found[prompt_id]} for i, prompt_id in enumerate(there)]
    changed -= found.keys()
    counts = {"rows": total, "dropped": {}, "kept": len(rows), "frozen": len(wanted), "changed": len(changed)}
    counts |= {"missing": len(wanted) - len(rows) - len(changed), **_drawn(rows)}
    return rows, counts


def _draw(settings: Prompts, files: list[Place]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    dropped: Counter[str] = Counter({name: 0 for name in ("null_caption", *_active(settings.filters), "duplicate")})
    best: dict[int, tuple] = {}  # caption -> its row of smallest rank
    limit = 1 << 64
    captions = array("Q")
    total = 0
    for batch in _batches(files, settings):
        total += batch.num_rows
        batch = _filter(batch, settings.filters, dropped)
        for row in zip(*(batch[name].to_pylist() for name in _WANTED)):
            text, url, key, *_ = row
            prompt_id = _id(text, url, key)
            rank = int.from_bytes(_digest(f"{settings.seed}:{prompt_id}"))
            words = " ".join(text.casefold().split()) if settings.filters.drop_duplicates else f"{prompt_id}:{text}"
            caption = int.from_bytes(_digest(words), sys.byteorder)
            captions.append(caption)
            if rank > limit:
                continue
            order = (rank, url or "", text)
            if caption not in best or order < best[caption][0]:
                best[caption] = (order, prompt_id, row)
        if len(best) > 2 * settings.n:
            best = dict(sorted(best.items(), key=lambda item: item[1][0])[: settings.n])
            limit = max(entry[0][0] for entry in best.values())
    kept = _distinct(captions)
    dropped["duplicate"] = len(captions) - kept
    counts = {"rows": total, "dropped": dict(dropped), "kept": kept}
    if kept < settings.n:
        losses = ", ".join(f"{name} {k}" for name, k in dropped.items()) if total else "none"
        raise HiresError(
            f"prompts.n = {settings.n}: only {kept} of {total} rows are left (dropped: {losses}); "
            "ask for fewer, loosen prompts.filters, or add files to prompts.source"
        )
    rows = [
        {"index": i, "id": prompt_id, "prompt": text, "url": url, "hash": key, "width": width, "height": height}
        for i, (_, prompt_id, (text, url, key, width, height)) in enumerate(sorted(best.values())[: settings.n])
    ]
    twice = [name for name, k in Counter(row["id"] for row in rows).items() if k > 1]
    if twice:
        keys = sorted({row["hash"] for row in rows if row["id"] in twice})
        raise HiresError(
            f"prompts.columns.hash = {settings.columns.hash!r}: {keys[0]!r} stands for several captions; "
            "name a column that is different in every row, or null"
        )
    return rows, counts | _drawn(rows)


def _drawn(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {"drawn": len(rows), f"over_{LONG}_characters": sum(len(row["prompt"]) > LONG for row in rows)}


def _id(text: str, url: str | None, key: str | None) -> str:
    return _digest(key if key is not None else f"{url or ''}\n{text}").hex()


_WANTED = ("text", "url", "hash", "width", "height")


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def _distinct(values: array) -> int:
    if not values:
        return 0
    ordered = np.frombuffer(values, dtype=np.uint64)
    ordered.sort()
    return 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


# filter -> (the columns it reads, keep a row?)
_FILTERS: dict[str, tuple[tuple[str, ...], Any]] = {
    "min_characters": ((), lambda b, v: pc.greater_equal(pc.utf8_length(pc.utf8_trim_whitespace(b["text"])), v)),
    "max_characters": ((), lambda b, v: pc.less_equal(pc.utf8_length(b["text"]), v)),
    "min_side": (("width", "height"), lambda b, v: pc.and_(*(pc.greater_equal(b[c], v) for c in ("width", "height")))),
    "max_punsafe": (("punsafe",), lambda b, v: pc.less_equal(b["punsafe"], v)),
    "max_pwatermark": (("pwatermark",), lambda b, v: pc.less_equal(b["pwatermark"], v)),
    "min_aesthetic": (("aesthetic",), lambda b, v: pc.greater_equal(b["aesthetic"], v)),
    "min_similarity": (("similarity",), lambda b, v: pc.greater_equal(b["similarity"], v)),
}
_NUMBERS = {"width": pa.int64(), "height": pa.int64()} | dict.fromkeys(
    ("similarity", "punsafe", "pwatermark", "aesthetic"), pa.float64()
)


def _active(filters: Filters) -> list[str]:
    return [name for name in _FILTERS if getattr(filters, name) is not None]


def _filter(batch: pa.Table, filters: Filters, dropped: Counter[str]) -> pa.Table:
    """Rows that pass; a row that lacks the value a filter asks about does not."""
    before = batch.num_rows
    batch = batch.filter(pc.is_valid(batch["text"]))
    dropped["null_caption"] += before - batch.num_rows
    lengths = [pc.fill_null(pc.binary_length(batch[name]), 0) for name in ("text", "url", "hash")]
    short = batch.filter(pc.less_equal(pc.max_element_wise(*lengths), LONGEST))
    if short.num_rows < batch.num_rows:
        dropped["too_long"] += batch.num_rows - short.num_rows
        batch = short
    for name in _active(filters):
        before = batch.num_rows
        batch = batch.filter(_FILTERS[name][1](batch, getattr(filters, name)))
        dropped[name] += before - batch.num_rows
    return batch


def _batches(files: list[Place], settings: Prompts) -> Iterator[pa.Table]:
    """Batches of every file under our own column names; a column that isn't there and isn't needed is null."""
    for file in files:
        try:
            with opened(file) as source:
                columns = _resolve(file, source.schema_arrow.names, settings.columns, settings.filters)
                wanted = list(dict.fromkeys(columns.values()))
                for group in range(source.num_row_groups):
                    rows = _batch_size(file, source, group, wanted)
                    for batch in source.iter_batches(rows, row_groups=[group], columns=wanted):
                        yield _renamed(file, batch, columns)
        except (pa.ArrowException, OSError) as error:
            raise HiresError(f"{file}: not a readable parquet file ({' '.join(str(error).split())[:200]})") from None


def _batch_size(file: Place, source: pq.ParquetFile, group: int, columns: list[str]) -> int:
    """Rows of a row group that can be decoded at once: the largest entry of a dictionary may stand in each of them."""
    chunks = [source.metadata.row_group(group).column(i) for i in range(source.metadata.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema in columns]
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    if unpacked > UNPACKED:
        raise HiresError(
            f"{file}: row group {group} unpacks to {unpacked >> 20} MiB, at most {UNPACKED >> 20}: write the file with "
            "smaller row groups"
        )
    texts = [chunk.path_in_schema for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"]
    with opened(file, read_dictionary=texts) as encoded:
        first = next(encoded.iter_batches(1, row_groups=[group], columns=texts), None)
    entries = [column.dictionary for column in first.columns] if first else []
    longest = max((pc.max(pc.binary_length(entry)).as_py() or 0 for entry in entries), default=0)
    return max(1, min(BATCH, BUDGET // max(longest, 1)))


def _renamed(file: Place, batch: pa.RecordBatch, columns: dict[str, str]) -> pa.Table:
    out = {}
    for name in dict.fromkeys((*_WANTED, *columns)):
        kind = _NUMBERS.get(name, pa.string())
        if name not in columns:
            out[name] = pa.nulls(batch.num_rows, kind)
            continue
        try:
            out[name] = _cast(batch[columns[name]], kind)
        except pa.ArrowException as error:
            raise HiresError(
                f"{file}: column {columns[name]!r} (prompts.columns.{name}) can't be read as {kind}: "
                f"{' '.join(str(error).split())[:120]}"
            ) from None
    return pa.table(out)


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if kind == pa.int64():  # some subsets store sizes as floating point, with NaN where there is none
        sides = pc.floor(pc.cast(column, pa.float64()))
        sound = pc.and_(pc.greater_equal(sides, 0), pc.less(sides, 1 << 31))
        return pc.cast(pc.if_else(sound, sides, pa.scalar(None, pa.float64())), pa.int64())
    column = pc.cast(column, kind)
    column.validate(full=True)  # text is UTF-8
    return column


def _resolve(file: Place, names: list[str], columns: Columns, filters: Filters) -> dict[str, str]:
    """Our name -> the file's; names of LAION's subsets differ in case."""
    needed = {"text": "the prompt"} | ({"url": "the image's address"} if columns.url else {})
    for name in _active(filters):
        needed |= dict.fromkeys(_FILTERS[name][0], f"filters.{name}")
    found = {}
    for ours in dict.fromkeys((*needed, *_WANTED)):
        wanted = getattr(columns, ours)
        if wanted is None:
            continue
        same = [name for name in names if name == wanted]
        same = same or [name for name in names if name.casefold() == wanted.casefold()]
        if len(same) > 1:
            raise HiresError(f"{file}: prompts.columns.{ours} = {wanted!r} fits {', '.join(same)}; write one of them")
        if same:
            found[ours] = same[0]
        elif ours in needed:
            off = f", or set prompts.{needed[ours]} to null" if needed[ours].startswith("filters.") else ""
            off = ", or set it to null" if ours == "url" else off
            raise HiresError(
                f"{file}: no column {wanted!r} ({needed[ours]}); the file has {', '.join(names)}; "
                f"name the right one in prompts.columns.{ours}{off}"
            )
    return found
