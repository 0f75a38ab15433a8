"""Shards: the unit that a job makes, and how an interrupted one goes on.

Beside each finished file lies its record, `<file>.json`: the digest of everything the file depends on, its SHA-256 and
what was measured. The file comes first, the record second, the manifest of the shard last. So whatever ends a run, the
next one keeps exactly the files whose record fits, and Snakemake may delete a manifest without loss: it is put together
again, byte for byte, from the records.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hires import layout
from hires.config import Config
from hires.errors import HiresError
from hires.prompts import Prompt, read_prompts
from hires.provenance import distinct
from hires.storage import (
    Damaged,
    digest,
    read_sealed,
    remade,
    sealed,
    sha256,
    write_bytes,
    write_changed_json,
    write_json,
)


@dataclass(frozen=True)
class Item:
    """One file to make: a prompt and a seed, where it goes, and the digest of all it depends on."""

    prompt: Prompt
    seed: int
    file: Path
    key: str

    @property
    def record(self) -> Path:
        return self.file.with_name(f"{self.file.name}.json")

    def checked(self) -> dict[str, Any]:
        """The record; `Damaged` unless the file is there, whole, and made from what `key` stands for."""
        if not (self.file.exists() and self.record.exists()):
            raise Damaged(f"{self.file} or its record is missing")
        record = read_sealed(self.record)
        if record.get("key") != self.key:
            raise Damaged(f"{self.file} was made from something else")
        if record.get("sha256") != sha256(self.file):
            raise Damaged(f"{self.file} is damaged: it is not what was written")
        return record

    def finished(self) -> bool:
        """Whether the file is there, whole, and made from what `key` stands for; one that can't be read is not."""
        try:
            self.checked()
        except HiresError:
            return False
        return True

    def finish(self, data: bytes, **measured: Any) -> None:
        """Write the file, then its record; `measured` holds at least its `provenance`."""
        write_bytes(self.file, data)
        write_json(self.record, sealed({"key": self.key, "sha256": sha256(self.file), **measured}))


def items(
    config: Config, n: int, seeds: Sequence[int], shard: int, file: Callable[[str, int], Path], **depends: Any
) -> list[Item]:
    """The items of one shard of the first `n` prompts, all seeds of a prompt together.

    `file`: path from (prompt id, seed). `depends`: what shapes each file beside prompt and seed.
    """
    prompts = drawn(config)
    return [
        Item(prompt, seed, file(prompt.id, seed), digest({"prompt": prompt.prompt, "seed": seed, **depends}))
        for prompt in (prompts[index] for index in layout.shard_rows(config, n, shard))
        for seed in seeds
    ]


def drawn(config: Config) -> list[Prompt]:
    """The prompts of a configuration."""
    path = layout.prompts(config)
    with remade("prompts", path):
        return _read(path, path.stat().st_mtime_ns) if path.is_file() else read_prompts(path)


@lru_cache(maxsize=1)
def _read(path: Path, changed: int) -> list[Prompt]:
    """Read once: one process makes many shards."""
    return read_prompts(path)


Batch = tuple[Sequence[Item], list[bool]]  # some items, and which of them are to be made


def batches(items: Sequence[Item], size: int) -> list[Batch]:
    """The batches that hold an unfinished item.

    Batches are cut alike whatever was finished before, as the size of a batch may move the last bits of its images.
    """
    cut = [items[start : start + size] for start in range(0, len(items), size)]
    missing = [(batch, [not item.finished() for item in batch]) for batch in cut]
    return [(batch, todo) for batch, todo in missing if any(todo)]


def write_manifest(path: Path, head: dict[str, Any], name: str, items: Iterable[Item]) -> None:
    """Write a shard's manifest: `head`, the sampling, one entry per item under `name`, the provenance of them all.

    The same records give the same bytes, and an unchanged manifest is left alone.
    """
    shared: dict[str, Any] = {}
    entries, origins = [], []
    for item in items:
        record = read_sealed(item.record)
        del record["key"]
        origins.append(record.pop("provenance"))
        if "sampling" in record:
            shared["sampling"] = record.pop("sampling")
        entries.append({"id": item.prompt.id, "seed": item.seed, "file": item.file.name, **record})
    write_changed_json(path, sealed({**head, **shared, name: entries, "provenance": distinct(origins)}))


def read_manifest(path: Path, stage: str) -> dict[str, Any]:
    """The manifest of a shard that `stage` made."""
    if not path.is_file():
        raise HiresError(f"{path} does not exist: make the images first (hires {stage}, or hires run)")
    with remade(stage, path):
        return read_sealed(path)


@contextmanager
def told(what: str, total: int) -> Iterator[list[int]]:
    """One line on stderr when the block ends well: `what`, how many of `total` were made and in what time.

    The block appends to the list that it gets the number of files it made.
    """
    made: list[int] = []
    started = time.monotonic()
    yield made
    kept = f", {total - sum(made)} kept" if sum(made) < total else ""
    print(f"{what}: {sum(made)} of {total} made{kept}, {time.monotonic() - started:.1f} s", file=sys.stderr)
