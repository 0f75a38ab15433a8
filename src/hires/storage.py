"""Files that are either whole or absent, and the digests that tell whether a finished one still fits.

Everything a stage writes goes to a temporary name in the same folder and is renamed: a killed run leaves only whole
files. One run at a time writes to a results folder: `claim` sees to it.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from hires.errors import HiresError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write; it becomes `path` when the block ends well, and is removed when it does not.

    Creates the folder. HiresError when the file system refuses (no space left, a quota, no permission).
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise HiresError(
            f"cannot write {path}: {error.strerror or error}; finished work is kept, free some space and run it again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def claim(folder: Path) -> AcquireReturnProxy:
    """Lock a results folder against a second run, until the block or the process ends, however it ends.

    Snakemake's own lock would outlive a killed run and stop the next one. HiresError when another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise HiresError(f"another run is writing to {folder}: wait for it, or end it first") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; the same value gives the same bytes."""
    write_text(path, _json(value))


def write_changed(path: Path, text: str) -> None:
    """Write `text` to `path` unless it stands there already, so that the time of an unchanged file stays."""
    if not path.exists() or path.read_text() != text:
        write_text(path, text)


def write_changed_json(path: Path, value: Any) -> None:
    """`write_json` that leaves an unchanged file alone."""
    write_changed(path, _json(value))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text())


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """16 hex digits that change whenever a JSON-like `value` does; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
