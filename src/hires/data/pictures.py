"""Where the pictures of prompts come from: the web, or the folder that img2dataset wrote.

img2dataset fetches thousands a second and keeps what it got. It wants an environment of its own, with pandas below 3:

    pipx run img2dataset --url_list results/paper/prompts.parquet --input_format parquet --url_col url
        --caption_col prompt --save_additional_columns '["id"]' --resize_mode no --disable_all_reencoding True
        --output_format webdataset --output_folder data/pictures
"""

import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hires.data.download import LARGEST, fetch
from hires.data.prompts import Prompt
from hires.errors import HiresError

COLUMNS = ["id", "key", "status", "error_message"]
NO_PICTURES = (".json", ".txt")  # what img2dataset writes beside a picture


class Missing(Exception):
    """Why a prompt has no picture, in words."""


Contents = Callable[[Prompt], bytes]  # of the picture's file; raises Missing


def contents(folder: str | None, private: bool = False) -> Contents:
    """What gives the content of a prompt's picture: img2dataset's `folder`, or the web where it is None.

    `private`: as of `hires.data.download.fetch`. HiresError where the folder is none of img2dataset's.
    """
    return partial(_from_web, private=private) if folder is None else _archive(Path(folder))


def _from_web(prompt: Prompt, private: bool) -> bytes:
    content = fetch(prompt.url or "", private)
    if content is None:
        raise Missing("no answer")
    return content


def _archive(folder: Path) -> Contents:
    """img2dataset's shards: NNNNN.parquet says what became of each address, NNNNN/ or NNNNN.tar holds the pictures."""
    found: dict[str, tuple[Path, str]] = {}  # id -> shard, key
    lost: dict[str, str] = {}
    tables = sorted(folder.glob("*.parquet"))
    if not tables:
        raise HiresError(f"prompts.pictures {str(folder)!r} holds no *.parquet: it is no folder that img2dataset wrote")
    for table in tables:
        try:
            rows = pq.read_table(table, columns=COLUMNS).to_pylist()
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise HiresError(
                f"{table}: img2dataset's columns {', '.join(COLUMNS)} can't be read ({reason}): run it with "
                "--save_additional_columns '[\"id\"]' on prompts.parquet"
            ) from None
        for row in rows:
            if row["status"] == "success":
                found[row["id"]] = (table.with_suffix(""), row["key"])
            else:
                lost[row["id"]] = ": ".join(filter(None, (row["status"], row["error_message"])))
    shards: dict[Path, dict[str, Callable[[], bytes]]] = {}

    def read(prompt: Prompt) -> bytes:
        if prompt.id not in found:
            raise Missing(lost.get(prompt.id, f"not in {folder}"))
        shard, key = found[prompt.id]
        if shard not in shards:
            shards[shard] = _files(shard) if shard.is_dir() else _members(shard.with_suffix(".tar"))
        if key not in shards[shard]:
            raise Missing(f"img2dataset names {key}, which is not in {shard.name}")
        return shards[shard][key]()

    return read


def _files(folder: Path) -> dict[str, Callable[[], bytes]]:
    """Key -> content of the pictures in a folder."""
    pictures = [path for path in folder.iterdir() if path.suffix not in NO_PICTURES and not path.is_symlink()]
    return {path.stem: path.read_bytes for path in pictures if path.stat().st_size <= LARGEST}


def _members(archive: Path) -> dict[str, Callable[[], bytes]]:
    """Key -> content of the pictures in an uncompressed tar archive, read where they lie; links are passed over."""

    def content(member: tarfile.TarInfo) -> bytes:
        with archive.open("rb") as file:
            file.seek(member.offset_data)
            return file.read(member.size)

    try:
        with tarfile.open(archive, "r:") as opened:
            members = [m for m in opened if m.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and m.size <= LARGEST]
    except (tarfile.TarError, OSError) as error:
        raise HiresError(f"{archive} can't be read ({error}): run img2dataset again") from None
    pictures = [member for member in members if Path(member.name).suffix not in NO_PICTURES]
    return {Path(member.name).stem: partial(content, member) for member in pictures}
