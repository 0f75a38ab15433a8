"""Captioned images to train on: scenes, folders, tar shards. Picture number n is always the same one.

So a run that goes on from a checkpoint goes on with the data, too: its place is a number.
"""

import csv
import io
import tarfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hires.errors import HiresError
from hires.files.untrusted import picture_size, read_picture
from hires.training.data import Views, draw_views, normalised

LONGEST = 1 << 16  # bytes of a caption
LARGEST = 1 << 28  # bytes of a member of a shard
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


class Pictures(Protocol):
    """Some images, not yet on the device, and their captions."""

    captions: list[str]

    def render(self, size: int, device: torch.device | str) -> Tensor:
        """(n, 3, size, size) in [−1, 1]."""


class Source(Protocol):
    """Pictures by number, without end."""

    def pictures(self, numbers: Sequence[int]) -> Any:
        """`Pictures` of these numbers."""


def seed_of(*parts: int) -> int:
    """One 63-bit seed of some numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) & (2**63 - 1)


@dataclass(frozen=True)
class Scenes:
    """Camera views of training scenes, every number another scene; `shares` as in `draw_views`."""

    seed: int
    shares: dict[str, float] = field(default_factory=dict)

    def pictures(self, numbers: Sequence[int]) -> Views:
        views = [draw_views(1, seed_of(self.seed, number), **self.shares) for number in numbers]
        return Views(
            [view.scenes[0] for view in views],
            [view.cameras[0] for view in views],
            [view.captions[0] for view in views],
        )


@dataclass(frozen=True)
class Crops:
    """Crops that were read: images (n, 3, size, size) uint8."""

    images: Tensor
    captions: list[str]

    def render(self, size: int, device: torch.device | str) -> Tensor:
        return normalised(self.images.to(device))


class Entry(NamedTuple):
    """An image of a collection: its name for messages, how to open its bytes, its caption."""

    name: str
    open: Callable[[], Any]
    caption: str


@dataclass(frozen=True)
class Collection:
    """Native crops of images on disk, in a new order every epoch, each at a random place."""

    entries: list[Entry]
    size: int
    seed: int

    def pictures(self, numbers: Sequence[int]) -> Crops:
        drawn = [self._picture(number) for number in numbers]
        return Crops(torch.stack([image for image, _ in drawn]), [caption for _, caption in drawn])

    def _picture(self, number: int) -> tuple[Tensor, str]:
        epoch, place = divmod(number, len(self.entries))
        entry = self.entries[_order(len(self.entries), seed_of(self.seed, epoch, 1))[place]]
        try:
            image = read_picture(entry.open(), f"image {entry.name}", upright=True)
        except HiresError as error:
            raise HiresError(f"{error}: mend or remove it") from None
        rng = np.random.default_rng(seed_of(self.seed, number))
        left, top = (int(rng.integers(side - self.size + 1)) for side in image.size)
        crop = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return torch.from_numpy(crop.copy()).permute(2, 0, 1), entry.caption


@lru_cache(maxsize=2)
def _order(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


@dataclass(frozen=True)
class _Member:
    """Opens a file inside a tar archive by its place."""

    archive: Path
    offset: int
    length: int

    def __call__(self) -> io.BytesIO:
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.length))


@dataclass(frozen=True)
class _File:
    path: Path

    def __call__(self) -> Path:
        return self.path


def open_source(source: str, size: int, seed: int, shares: dict[str, float]) -> Source:
    """The source that a recipe names: "scenes", a folder of images, or tar shards (a file, a folder, a glob).

    Captions of a folder stand in metadata.csv (columns file_name and text), else beside each image in a .txt file;
    those of webdataset shards in the .txt member of the same key.

    Raises:
        HiresError: nothing there, an image without caption, an image smaller than `size` pixels.
    """
    if source == "scenes":
        return Scenes(seed, shares)
    path = Path(source).expanduser()
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [Path(found) for found in sorted(glob(str(path)))]
    if path.is_dir() and not shards:
        entries = _folder(path)
    elif shards and all(shard.suffix == ".tar" for shard in shards):
        entries = [entry for shard in shards for entry in _shard(shard)]
    else:
        raise HiresError(
            f"data.source {source!r}: allowed: scenes, a folder of images, .tar shards; nothing of it there"
        )
    if not entries:
        raise HiresError(f"data.source {source!r} holds no images ({', '.join(SUFFIXES)})")
    for entry in entries:
        _check_size(entry, size)
    return Collection(entries, size, seed)


def _folder(path: Path) -> list[Entry]:
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    table = path / "metadata.csv"
    if not table.is_file():
        return [Entry(str(file), _File(file), _beside(file)) for file in images]
    rows = csv.DictReader(io.StringIO(_decoded(table.read_bytes(), str(table)), newline=""), restval="")
    try:
        if not {"file_name", "text"} <= set(rows.fieldnames or ()):
            raise HiresError(f"{table}: needs the columns file_name and text, has {', '.join(rows.fieldnames or ())}")
        captions = {row["file_name"]: row["text"] for row in rows}
    except csv.Error as error:
        raise HiresError(f"{table}, line {rows.line_num}: {error}") from None
    outside = [name for name in captions if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise HiresError(f"{table}: {outside[0]} is not a file name inside {path}")
    missing = [name for name in captions if not (path / name).is_file()]
    if missing:
        raise HiresError(
            f"{table}: {missing[0]} is not in {path} (of {len(captions)} images {len(missing)} are missing)"
        )
    return [Entry(str(path / name), _File(path / name), text) for name, text in captions.items()]


def _beside(image: Path) -> str:
    text = image.with_suffix(".txt")
    if not text.is_file():
        raise HiresError(f"image {image} has no caption: write {text.name} beside it, or metadata.csv")
    return _caption(text.read_bytes(), str(text))


def _caption(data: bytes, name: str) -> str:
    if len(data) > LONGEST:
        raise HiresError(f"{name}: {len(data)} bytes are no caption: at most {LONGEST}")
    return _decoded(data, name).strip()


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise HiresError(f"{name} is not UTF-8: convert it") from None


def _shard(path: Path) -> list[Entry]:
    """A webdataset sample is what stands under one key, the name up to its first dot."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
    try:
        with tarfile.open(path, "r:") as archive:  # not compressed: members are read where they lie
            for member in archive:
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue  # a link or a device
                if member.size > LARGEST:
                    raise HiresError(f"shard {path}: {member.name} has {member.size} bytes, at most {LARGEST}")
                folder, _, name = member.name.rpartition("/")
                key, dot, suffix = name.partition(".")
                samples[f"{folder}/{key}"][f"{dot}{suffix.lower()}"] = member
    except (tarfile.TarError, OSError) as error:
        raise HiresError(f"shard {path} can't be read ({error}): fetch it again") from None
    entries = []
    for key, members in samples.items():
        image = next((suffix for suffix in SUFFIXES if suffix in members), None)
        if image is None:
            continue
        name = f"{path}:{members[image].name}"
        if ".txt" not in members:
            raise HiresError(f"image {name} has no caption: its key {key.lstrip('/')} needs a .txt member")
        picture, text = (_Member(path, members[s].offset_data, members[s].size) for s in (image, ".txt"))
        caption = _caption(text().read(), f"{path}:{members['.txt'].name}")
        entries.append(Entry(name, picture, caption))
    return entries


def _check_size(entry: Entry, size: int) -> None:
    try:
        width, height = picture_size(entry.open(), f"image {entry.name}")
    except HiresError as error:
        raise HiresError(f"{error}: mend or remove it") from None
    if min(width, height) < size:
        raise HiresError(
            f"image {entry.name} is {width}x{height}: smaller than the crops of {size}; remove it or lower size"
        )
