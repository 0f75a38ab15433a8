"""Shards: the unit that a job makes, and how an interrupted one goes on.

Beside each finished file lies its record, `<file>.json`: the digest of everything the file depends on, its SHA-256 and
what was measured. The file comes first, the record second, the manifest of the shard last. So whatever ends a run, the
next one keeps exactly the files whose record fits, and Snakemake may delete a manifest without loss: it is put together
again, byte for byte, from the records.
"""

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hires import __version__, layout
from hires.config import Config
from hires.data.prompts import Prompt, read_prompts
from hires.errors import HiresError
from hires.files.storage import (
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
from hires.provenance import distinct
from hires.provenance.schema import writer
from hires.stages import VERSIONS


class Newer(HiresError):
    """A file that a newer hires made: nothing to be replaced."""


@dataclass(frozen=True)
class Item:
    """One file to make: a prompt and the seed of its trial, where it goes, the digest of all it depends on, and the
    stage's version.

    The version is in the key as well, where it can't be read.
    """

    prompt: Prompt
    seed: int
    file: Path
    key: str
    version: int

    @property
    def noise_seed(self) -> int:
        """The seed of the generator that draws all its random numbers; every variant, setting and size has the same."""
        return noise_seed(self.prompt.prompt, self.seed)

    @property
    def record(self) -> Path:
        return self.file.with_name(f"{self.file.name}.json")

    def checked(self) -> dict[str, Any]:
        """The record; `Damaged` unless the file is there, whole, and made from what `key` stands for, else `Newer`."""
        if not self.file.exists():
            raise Damaged(f"{self.file} is missing")
        if not self.record.exists():
            raise Damaged(f"{self.file} has no record")
        record = read_sealed(self.record)
        version = record.get("version", 1)  # what came before this field
        if not isinstance(version, int):
            raise Damaged(f"{self.record} is damaged: version {version!r} is none")
        if version > self.version:
            raise Newer(
                f"{self.file} was made by version {version} of its stage and this hires has version {self.version}: "
                f"hires {writer(record)} made it, this is {__version__}: use that one, or give the configuration "
                "another name"
            )
        if version < self.version:
            raise Damaged(f"{self.file} was made by version {version} of its stage, which is at {self.version} now")
        if record.get("key") != self.key:
            raise Damaged(f"{self.file} was made from other settings, prompts or models")
        if record.get("sha256") != sha256(self.file):
            raise Damaged(f"{self.file} is damaged: it is not what was written")
        return record

    def finished(self) -> bool:
        """Whether the file is there, whole, and made from what `key` stands for; one that can't be read is not."""
        return self.lack() is None

    def lack(self) -> str | None:
        """Why the file is to be made, in words that follow its name; None for a finished one. `Newer` is raised."""
        try:
            self.checked()
        except Newer:
            raise
        except HiresError as error:
            return str(error).removeprefix(f"{self.file} ").replace(str(self.record), "its record")
        return None

    def finish(self, data: bytes, **measured: Any) -> None:
        """Write the file, then its record; `measured` holds at least its `provenance`."""
        write_bytes(self.file, data)
        write_json(
            self.record, sealed({"version": self.version, "key": self.key, "sha256": sha256(self.file), **measured})
        )


def noise_seed(prompt: str, trial: int) -> int:
    """The seed of an image, of its prompt and the trial's seed: so no two prompts of a trial share their noise, and an
    interval over prompts is one over noise too.

    Of the prompt's words, not its id, as an image is a function of words and seed. 32 bits: PyTorch's generator on the
    CPU takes in no more.
    """
    return int.from_bytes(hashlib.sha256(f"{trial} {prompt}".encode()).digest()[:4])


def items(
    config: Config,
    n: int,
    seeds: Sequence[int],
    shard: int,
    file: Callable[[str, int], Path],
    stage: str,
    **depends: Any,
) -> list[Item]:
    """The items of one shard of the first `n` prompts, all seeds of a prompt together.

    `file`: path from (prompt id, seed). `depends`: what shapes each file beside prompt and seed.
    """
    rows = layout.shard_rows(config, n, shard)  # a replayed list may have lost the last ones

    def key(prompt: Prompt, seed: int) -> str:
        return digest({"prompt": prompt.prompt, "seed": seed, **depends})

    return [
        Item(prompt, seed, file(prompt.id, seed), key(prompt, seed), VERSIONS[stage])
        for prompt in drawn(config)[rows.start : rows.stop]
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
    todo = {*unfinished(items)}
    missing = [(batch, [item in todo for item in batch]) for batch in cut]
    return [(batch, wanted) for batch, wanted in missing if any(wanted)]


def unfinished(items: Sequence[Item]) -> list[Item]:
    """The items that are to be made. Why there is one that was made before is said on stderr, once for each reason."""
    lacks = {item: lack for item in items if (lack := item.lack()) is not None}
    for lack, n in Counter(lack for lack in lacks.values() if lack != "is missing").items():
        folder = items[0].file.parent
        print(f"{folder}: {n} of {len(items)} made again: each {lack}", file=sys.stderr)
    return list(lacks)


def write_manifest(path: Path, head: dict[str, Any], name: str, items: Iterable[Item]) -> None:
    """Write a shard's manifest: `head`, the sampling, one entry per item under `name`, the provenance of them all.

    The same records give the same bytes, and an unchanged manifest is left alone.
    """
    shared: dict[str, Any] = {}
    entries, origins = [], []
    for item in items:
        record = read_sealed(item.record)
        del record["key"]
        record.pop("version", None)
        origins.append(record.pop("provenance"))
        if "sampling" in record:
            shared["sampling"] = record.pop("sampling")
        entries.append({"id": item.prompt.id, "seed": item.seed, "file": item.file.name, **record})
    write_changed_json(path, sealed({**head, **shared, name: entries, "provenance": distinct(origins)}))


def read_manifest(path: Path, stage: str) -> dict[str, Any]:
    """The manifest of a shard that `stage` made."""
    if not path.exists():
        raise HiresError(f"{path} does not exist: make the images first (hires {stage}, or hires run)")
    with remade(stage, path):
        return read_sealed(path)


@contextmanager
def counted(what: str, total: int) -> Iterator[list[int]]:
    """One line on stderr when the block ends well: `what`, how many of `total` were made and in what time.

    The block appends to the list that it gets the number of files it made.
    """
    made: list[int] = []
    started = time.monotonic()
    yield made
    kept = f", {total - sum(made)} kept" if sum(made) < total else ""
    print(f"{what}: {sum(made)} of {total} made{kept}, {time.monotonic() - started:.1f} s", file=sys.stderr)


@dataclass
class Clock:
    """Says when it is time to stop: before a job that would take as long as the last of its kind, and then be late.

    `seconds`: how many there are; None: no end.
    """

    seconds: float | None
    started: float = field(default_factory=time.monotonic)
    last: dict[Any, float] = field(default_factory=dict)

    def over(self, kind: Any) -> bool:
        expected = time.monotonic() - self.started + self.last.get(kind, 0.0)
        return self.seconds is not None and expected > self.seconds

    @contextmanager
    def timed(self, kind: Any) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.last[kind] = time.monotonic() - started
