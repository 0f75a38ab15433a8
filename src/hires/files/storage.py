"""Files that are either whole or absent, and the digests that tell whether a finished one still fits.

Everything a stage writes goes to a temporary name in the same folder and is renamed: a killed run leaves only whole
files. One run at a time writes to a results folder (`claim`), one process at a time to a file (`replacing`). What a
stage reads back carries a digest of its content, so that a damaged file is told from a good one (`Damaged`).
"""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from hires.errors import HiresError
from hires.files.untrusted import parse_json


class Damaged(HiresError):
    """A file that no longer holds what was written: cut short, emptied, changed."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write; it becomes `path` when the block ends well, and is removed when it does not.

    Creates the folder. HiresError when the file system refuses (no space left, a quota, no permission), and while
    another process writes the same file.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "ab", opener=_no_link) as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = os.path.samestat(os.fstat(held.fileno()), temporary.stat())
            except (BlockingIOError, FileNotFoundError):
                ours = False
            if not ours:  # locked by another process, or renamed by it since we opened it
                raise HiresError(f"another process is writing {path}: wait for it, or end it first")
            try:
                yield temporary
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise HiresError(f"cannot write {path}: {_reason(error)}; finished work is kept: {_mend(error)}") from error


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _mend(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space and run it again"
    return "let this user write there, then run it again"


@contextmanager
def remade(stage: str, *outputs: Path) -> Iterator[None]:
    """Where the block finds a file `Damaged`, remove the outputs of the stage that vouch for it, and say so.

    Without them the next run makes what is damaged again, and keeps everything else.
    """
    try:
        yield
    except Damaged as error:
        for path in outputs:
            path.unlink(missing_ok=True)
        raise HiresError(f"{error}: the next snakemake or hires run makes it again, or hires {stage}") from None


def claim(folder: Path) -> AcquireReturnProxy:
    """Lock a results folder against a second run, until the block or the process ends, however it ends.

    Snakemake's own lock would outlive a killed run and stop the next one. HiresError when another process has it.
    """
    file = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(file).acquire(timeout=0)
        file.write_text(str(os.getpid()))
        return held
    except Timeout:
        raise HiresError(f"another run is writing to {folder} ({holder(file)}): wait for it, or end it first") from None
    except OSError as error:
        raise HiresError(f"cannot write to the results folder {folder}: {_reason(error)}: {_mend(error)}") from None


def holder(lock: Path) -> str:
    """The process that holds a lock, which it writes into the lock's file."""
    try:
        return f"process {lock.read_text()}"
    except OSError:  # released this moment
        return "a process that just ended"


def not_ahead(paths: Iterable[Path]) -> None:
    """Give files of the future the time of now: left by a clock that went back, they would never count as old."""
    for path in paths:
        if path.stat().st_mtime > time.time():
            path.touch()


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
    try:
        same = path.read_bytes() == text.encode()
    except OSError:  # missing, or unreadable: written anew
        same = False
    if not same:
        write_text(path, text)


def write_changed_json(path: Path, value: Any) -> None:
    """`write_json` that leaves an unchanged file alone."""
    write_changed(path, _json(value))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_bytes(path: Path) -> bytes:
    """The content of a file; HiresError when the file system refuses it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> Any:
    """The value of a JSON file; `Damaged` where it is none."""
    data = read_bytes(path)
    try:
        return parse_json(data)
    except ValueError as error:
        raise Damaged(f"{path} is damaged: no JSON ({error})") from None


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """`value` with the digest of itself as its last key."""
    return {**value, "digest": digest(value)}


def read_sealed(path: Path) -> dict[str, Any]:
    """What was written to a JSON file through `sealed`; `Damaged` where it changed since."""
    value = read_json(path)
    try:
        same = isinstance(value, dict) and value.pop("digest", None) in (None, digest(value))
    except ValueError:  # NaN, half a character
        same = False
    if not same:
        raise Damaged(f"{path} is damaged: it is not what was written")
    return value


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> HiresError:
    return HiresError(f"cannot read {path}: {_reason(error)}: mend the disk or the permission, or move it away")


def digest(value: Any) -> str:
    """16 hex digits that change whenever a JSON-like `value` does; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
