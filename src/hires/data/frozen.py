"""A list of prompts that can be replayed: ids, keys and digests of captions, no captions.

LAION loses rows, and a draw from what is left is another draw. A frozen list names the rows themselves: a replay takes
those that are still there with the same caption, in the list's order, and counts the others.
"""

from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hires.errors import HiresError, first_mistake
from hires.files.storage import read_bytes


class Row(BaseModel):
    """One prompt: its id, the key of its row where the source has one, SHA-256 of its caption."""

    model_config = ConfigDict(extra="forbid")

    id: str
    hash: str | None
    caption_sha256: str


class Frozen(BaseModel):
    """A frozen list, in the order of the draw. `source`, `seed`: what it was drawn from and with."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    source: str
    seed: int
    prompts: list[Row]


def load_frozen(path: str | Path) -> Frozen:
    """Read a list; HiresError where it is none."""
    if not Path(path).is_file():
        raise HiresError(f"prompts.frozen {str(path)!r} does not exist: write one with hires prompts --freeze")
    try:
        return Frozen.model_validate_json(read_bytes(Path(path)))
    except ValidationError as error:
        place, _, reason = first_mistake(error)
        raise HiresError(f"prompts.frozen {str(path)!r} is no frozen list: {place}: {reason}") from None


def caption_digest(caption: str) -> str:
    return sha256(caption.encode()).hexdigest()
