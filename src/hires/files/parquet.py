"""Parquet files that notice damage: pages with checksums, and a digest over names, types and metadata."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from hires.errors import HiresError
from hires.files.storage import Damaged, digest, read_bytes, write_bytes

if TYPE_CHECKING:
    import pandas as pd

SEAL = b"hires.digest"


def write(path: Path, table: pa.Table) -> None:
    """Write a table, its metadata included, whole or not at all."""
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), SEAL: _seal(table.schema)})
    data = io.BytesIO()
    pq.write_table(table, data, write_page_checksum=True)
    write_bytes(path, data.getvalue())


def write_frame(path: Path, frame: "pd.DataFrame") -> None:
    """Write a frame without its index."""
    write(path, pa.Table.from_pandas(frame, preserve_index=False))


def read(path: Path, columns: Sequence[str] = ()) -> pa.Table:
    """The table of a parquet file, with at least these columns.

    `Damaged` where it is no parquet file, or not what `write` wrote; a file of another program has pages only to check.
    """
    data = read_bytes(path)
    try:
        # In memory of Arrow's own: one of its threads that lets go of Python's while Python ends aborts the process.
        memory = pa.allocate_buffer(len(data))
        pa.FixedSizeBufferWriter(memory).write(data)
        table = pq.ParquetFile(pa.BufferReader(memory), page_checksum_verification=True).read(use_threads=False)
        seal = (table.schema.metadata or {}).get(SEAL)
        whole = seal in (None, _seal(table.schema))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged: no readable parquet file ({' '.join(str(error).split())[:120]})") from None
    if not whole:
        raise Damaged(f"{path} is damaged: it is not what was written")
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise HiresError(
            f"{path} has no column {', '.join(missing)}, so another version of hires wrote it: delete it, and the next "
            "run makes it again"
        )
    return table


def read_frame(path: Path, columns: Sequence[str] = ()) -> "pd.DataFrame":
    """`read` as a frame."""
    return read(path, columns).to_pandas()


def _seal(schema: pa.Schema) -> bytes:
    metadata = {key.hex(): value.hex() for key, value in (schema.metadata or {}).items() if key != SEAL}
    types = [str(kind).replace("<item:", "<element:") for kind in schema.types]  # Arrow's and Parquet's name in lists
    return digest([schema.names, types, metadata]).encode()
