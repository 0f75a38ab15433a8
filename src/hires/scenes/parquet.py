"""The scenes as an image–text data set with the columns of a LAION metadata parquet."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hires.errors import HiresError
from hires.scenes.captions import caption
from hires.scenes.world import scene, stream_of
from hires.storage import replacing

SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("WIDTH", pa.int64()),
        ("HEIGHT", pa.int64()),
        ("similarity", pa.float64()),
        ("punsafe", pa.float64()),
        ("pwatermark", pa.float64()),
        ("AESTHETIC_SCORE", pa.float64()),
        ("hash", pa.int64()),
    ]
)
SCHEME = "scene://"


def scene_of_url(url: str) -> int:
    """The id in a `scene://<id>` address."""
    number = url.removeprefix(SCHEME)
    if not url.startswith(SCHEME) or not (number.isascii() and number.isdigit()):
        raise HiresError(f"{url!r} is no scene address: expected scene://<id>, for example scene://42")
    return int(number)


def write_parquet(path: str | os.PathLike[str], ids: Iterable[int], *, width: int, height: int) -> None:
    """Write one row per scene id; `width` and `height` (pixels) are those of its reference image."""
    rows = []
    for scene_id in ids:
        similarity, unsafe, watermark, score = stream_of(scene_id, 2).random(4).tolist()
        rows.append(
            {
                "URL": f"{SCHEME}{scene_id}",
                "TEXT": caption(scene(scene_id)),
                "WIDTH": width,
                "HEIGHT": height,
                "similarity": 0.28 + 0.12 * similarity,
                "punsafe": 0.01 * unsafe,
                "pwatermark": 0.2 * watermark,
                "AESTHETIC_SCORE": 5.0 + 2.0 * score,
                "hash": int(np.uint64((scene_id + 1) * 0xD6E8FEB86659FD93 % 2**64).astype(np.int64)),
            }
        )
    with replacing(Path(path)) as unfinished:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), unfinished)
