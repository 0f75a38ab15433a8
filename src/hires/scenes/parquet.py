"""The scenes as an image–text data set with the columns of a LAION metadata parquet."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hires.errors import HiresError
from hires.files.storage import replacing
from hires.scenes.captions import caption
from hires.scenes.world import WHOLE, Camera, close_up, scene, stream_of

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
SCHEME, CLOSE_UP = "scene://", "?close-up"


def scene_of_url(url: str) -> int:
    """The id in a `scene://<id>` address."""
    number = url.removeprefix(SCHEME)
    if not url.startswith(SCHEME) or not (number.isascii() and number.isdigit()):
        raise HiresError(f"{url!r} is no scene address: expected scene://<id>, for example scene://42")
    return int(number)


def view_of_url(url: str) -> tuple[int, Camera]:
    """Scene id and camera of `scene://<id>`, the whole scene, or `scene://<id>?close-up`, its own close-up."""
    scene_id = scene_of_url(url.removesuffix(CLOSE_UP))
    return scene_id, close_up(scene(scene_id)) if url.endswith(CLOSE_UP) else WHOLE


def write_parquet(
    path: str | os.PathLike[str], ids: Iterable[int], *, width: int, height: int, close_ups: bool = False
) -> None:
    """Write one row per scene id; `width` and `height` (pixels) are those of its reference image.

    `close_ups`: captions and addresses are those of the scenes' close-ups (`hires.scenes.world.close_up`).
    """
    rows = []
    for scene_id in ids:
        similarity, unsafe, watermark, score = stream_of(scene_id, 2).random(4).tolist()
        rows.append(
            {
                "URL": f"{SCHEME}{scene_id}{CLOSE_UP * close_ups}",
                "TEXT": caption(scene(scene_id), close_up(scene(scene_id)) if close_ups else WHOLE),
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
