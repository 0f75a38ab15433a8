"""Parquet files that lie here, or anywhere that fsspec reaches: hf://datasets/…, s3://…, https://…"""

from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hires.errors import HiresError

Place = Path | str  # a local file, or an address


def is_address(source: str | Path) -> bool:
    """Whether a source lies elsewhere than in a local folder."""
    return "://" in str(source)


def parquet_files(source: str | Path) -> list[Place]:
    """The parquet files of a file name or an address, a folder (searched to any depth) or a glob.

    HiresError: nothing there, a protocol that fsspec doesn't know or lacks a package for, no access.
    """
    files = _remote(str(source)) if is_address(source) else _local(source)
    if not files:
        raise HiresError(f"prompts.source {str(source)!r}: no parquet file there")
    return files


def _local(source: str | Path) -> list[Place]:
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(path.rglob("*.parquet"))
    if path.exists():
        return [path]
    if has_magic(str(path)):
        return sorted(map(Path, glob(str(path), recursive=True)))
    raise HiresError(
        f"prompts.source {str(source)!r} does not exist: put parquet files there, or name your own file, folder or "
        "glob: snakemake --config 'prompts={source: PATH}', or a configuration that extends this one"
    )


def _remote(address: str) -> list[Place]:
    import fsspec

    with _reading(address):
        system, path = fsspec.core.url_to_fs(address)
        if not has_magic(path) and system.isfile(path):
            return [address]
        found = system.glob(path) if has_magic(path) else system.find(path)
        return sorted(system.unstrip_protocol(name) for name in found if name.endswith(".parquet"))


@contextmanager
def opened(place: Place, **options: Any) -> Iterator[pq.ParquetFile]:
    """A parquet file to read from; of a remote one only the columns and row groups asked for are fetched."""
    if isinstance(place, Path):
        with pq.ParquetFile(place, buffer_size=1 << 20, **options) as file:
            yield file
    else:
        import fsspec

        with _reading(place), fsspec.open(place, "rb") as stream, pq.ParquetFile(stream, **options) as file:
            yield file


@contextmanager
def _reading(address: str) -> Iterator[None]:
    """Turn what file systems raise into one line."""
    if address.startswith("hf://"):
        from hires.hub import explained

        repository = "/".join(address.removeprefix("hf://").split("/")[:3])
        with explained(repository, f"prompts.source {address!r}", "no file there, or none that can be read"):
            yield
        return
    try:
        yield
    except (HiresError, pa.ArrowException):
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HiresError(f"prompts.source {address!r} can't be read: {reason}") from None
