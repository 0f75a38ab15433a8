"""Whether results are as they were made: every file against its recorded hash, and every record against the others.

SHA256SUMS holds the hashes of tables, figures, scores and manifests; a manifest those of its images or latents. Needs
no torch, except for making images once more.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hires import layout, provenance, shards
from hires.analysis import reference
from hires.config import Config
from hires.errors import HiresError
from hires.files.storage import digest, read_json, read_sealed, sha256
from hires.files.untrusted import read_picture
from hires.provenance.schema import Entry, Manifest, Model, Origin, Promotion, Provenance, Record
from hires.stages import VERSIONS, base, checksums, images, models

SUMS = "SHA256SUMS"
MANIFEST = re.compile(r"(images|base)/.+/shard-\d+\.json|(references)/[^/]+/manifest\.json")
LEFT_ASIDE = re.compile(rf"logs/.*|\.lock|{SUMS}")


@dataclass(frozen=True)
class Difference:
    """kind: missing, changed, extra, or other: made by another version, commit, configuration or model."""

    kind: str
    file: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}" + (f": {self.reason}" if self.reason else "")


@dataclass
class Folder:
    """A results folder: what should lie in it, by path relative to it.

    hashes: of the files that are listed. manifests: those that could be read. records: the entries of manifests, by
    the record beside each file. keys: of the records that could be read.
    """

    path: Path
    hashes: dict[str, str]
    manifests: dict[str, Manifest] = field(default_factory=dict)
    records: dict[str, Entry] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def summary(self, differences: Iterable[Difference]) -> str:
        """One line: how many files are as they were made, or how many are not."""
        kinds = Counter(difference.kind for difference in differences)
        if not kinds:
            return f"{self.path}: {len(self.hashes)} files, all as they were made"
        counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ("missing", "changed", "extra", "other") if kinds[kind])
        return f"{self.path}: {kinds.total()} differences in {len(self.hashes)} files: {counts}"


def verify(path: Path) -> tuple[Folder, list[Difference]]:
    """Check the results of a configuration, or results/reference. HiresError for a folder that is neither."""
    if not path.is_dir():
        raise HiresError(f"{path} is no folder: give the results of a configuration, such as results/embedded")
    folder = Folder(path, read_sums(path / SUMS))
    differences = [*_manifests(folder), *_files(folder), *_extra(folder)]
    differing = {difference.file for difference in differences}
    differences += (_makers if "config.yaml" in folder.hashes else _promotions)(folder, differing)
    return folder, differences


def read_sums(file: Path) -> dict[str, str]:
    """Path -> hash, as sha256sum writes them; HiresError where a line is none."""
    if not file.is_file():
        raise HiresError(f"{file.parent} holds no {file.name}: finish the run first (snakemake, or hires run)")
    sums = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64})  ([^/].*)", line)
        if not match or ".." in Path(match[2]).parts:
            raise HiresError(f"{file}, line {number}: no line of sha256sum's: run hires checksums again")
        sums[match[2]] = match[1]
    return sums


def _manifests(folder: Folder) -> Iterator[Difference]:
    """Read the manifests, and add what they list to the folder."""
    for name in list(folder.hashes):
        if not MANIFEST.fullmatch(name) or not (folder.path / name).is_file():
            continue
        place = folder.path / name
        try:
            manifest = Manifest.of(read_sealed(place), place)
        except HiresError as error:
            yield Difference("other", name, str(error).removeprefix(f"{place}: "))
            continue
        folder.manifests[name] = manifest
        for entry in (*manifest.images, *manifest.latents):
            file = f"{Path(name).parent.as_posix()}/{entry.file}"
            folder.hashes[file] = entry.sha256
            folder.records[f"{file}.json"] = entry


def _files(folder: Folder) -> Iterator[Difference]:
    """Every listed file against its hash, and every record against its manifest."""

    def check(name: str) -> Difference | None:
        file = folder.path / name
        if not file.is_file():
            return Difference("missing", name)
        return Difference("changed", name) if sha256(file) != folder.hashes[name] else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from filter(None, pool.map(check, folder.hashes))
    for name, entry in folder.records.items():
        if not (folder.path / name).is_file():
            yield Difference("missing", name)
            continue
        try:
            record = Record.of(read_sealed(folder.path / name), folder.path / name)
        except HiresError as error:
            yield Difference("changed", name, str(error).removeprefix(f"{folder.path / name}: "))
            continue
        folder.keys[name] = record.key
        if record.sha256 != entry.sha256:
            yield Difference("changed", name, "the manifest states another hash of its file")


def _extra(folder: Folder) -> Iterator[Difference]:
    """Files that nothing lists, except beside a manifest that could not be read."""
    unread = {Path(n).parent for n in folder.hashes if MANIFEST.fullmatch(n) and n not in folder.manifests}
    for file in sorted(path for path in folder.path.rglob("*") if path.is_file()):
        name = file.relative_to(folder.path)
        listed = name.as_posix() in folder.hashes or name.as_posix() in folder.records
        if not listed and not LEFT_ASIDE.fullmatch(name.as_posix()) and name.parent not in unread:
            yield Difference("extra", name.as_posix())


# --- who made it ----------------------------------------------------------------------------------------------------


def _makers(folder: Folder, differing: set[str]) -> Iterator[Difference]:
    """Differences of version, commit, configuration and model. `differing`: files that aren't as they were made."""
    if not (folder.path / "config.yaml").is_file():  # told as missing
        return
    try:
        config = provenance.read_stored(folder.path / "config.yaml")
    except HiresError as error:
        yield Difference("other", "config.yaml", str(error))
        return
    file = folder.path / "provenance.json"
    if not file.is_file():  # told as missing
        return
    try:
        whole = Provenance.of(read_json(file), file)
    except HiresError as error:
        yield Difference("other", "provenance.json", str(error).removeprefix(f"{file}: "))
        return
    if whole.config != provenance.config_digest(config):
        yield Difference("other", "provenance.json", "made from another configuration than config.yaml")
    yield from _versions("provenance.json", whole.stages)
    for name, model in whole.models.items():
        if reason := _another_model(model):
            yield Difference("other", "provenance.json", f"backbone {name!r}: {reason}")
    for name, manifest in folder.manifests.items():
        stage = next(part for part in MANIFEST.fullmatch(name).groups() if part)  # type: ignore[union-attr]
        yield from _versions(name, {stage: manifest.version})
        reasons = [_another_origin(origin, whole, manifest.backbone) for origin in manifest.provenance]
        yield from (Difference("other", name, reason) for reason in dict.fromkeys(reasons) if reason)
    yield from _unlisted(folder, config)
    if "prompts.parquet" not in differing:
        yield from _keys(folder, config)


def _versions(file: str, found: dict[str, int]) -> Iterator[Difference]:
    for stage, version in found.items():
        if version != VERSIONS.get(stage):
            yield Difference(
                "other", file, f"made by version {version} of the stage {stage}, not {VERSIONS.get(stage)}"
            )


def _another_model(model: Model) -> str | None:
    """Why a recorded model isn't the one that the same name stands for here; None where it is, or isn't here."""
    from hires.config import BackboneEntry

    entry = BackboneEntry(model=model.model, weights=model.weights, dtype=model.dtype)  # type: ignore[arg-type]
    content = models.identity(entry)["content"]
    return f"made with other files of {model.model!r} than are here" if content not in (model.content, None) else None


def _another_origin(origin: Origin, whole: Provenance, backbone: str | None) -> str | None:
    """What a shard was made by, where provenance.json says something else."""
    for what, here, there in (
        ("hires", origin.hires, whole.hires),
        ("commit", _commit(origin), _commit(whole)),
    ):
        if here != there:
            return f"made by {what} {here}, not {there}"
    model = whole.models.get(backbone or "")
    if model and (origin.revision != model.revision or (origin.files and origin.files != model.files)):
        return f"made with another revision or other files of {model.model!r} than provenance.json names"
    return None


def _commit(origin: Origin) -> str:
    return f"{origin.commit}{' with local changes' if origin.dirty else ''}"


def _unlisted(folder: Folder, config: Config) -> Iterator[Difference]:
    """Outputs of the configuration that are neither there nor listed."""
    for path in checksums.outputs(config):
        name = path.relative_to(config.root).as_posix()
        if name not in folder.hashes and not path.is_file():
            yield Difference("missing", name, f"config.yaml asks for it, but {SUMS} doesn't list it")


def _keys(folder: Folder, config: Config) -> Iterator[Difference]:
    """Files made from something else than what the configuration and its models stand for now."""
    for path, wanted in _items(config):
        if path not in folder.manifests:
            continue
        for item in wanted:
            name = f"{item.file.relative_to(config.root).as_posix()}.json"
            if name not in folder.records:
                yield Difference("missing", name.removesuffix(".json"), "its manifest doesn't list it")
            elif folder.keys.get(name, item.key) != item.key:
                yield Difference("other", name.removesuffix(".json"), "made from other settings, prompts or models")


def _items(config: Config) -> Iterator[tuple[str, list[shards.Item]]]:
    """Manifest -> the files that it should list, by the layout of `config`."""
    sets: list[tuple[Any, Callable[..., Path], Callable[..., list[shards.Item]]]] = [
        *((made, layout.base_shard, base.items) for made in layout.base_sets(config)),
        *((made, layout.image_shard, images.items) for made in config.image_sets()),
    ]
    for made, place, items in sets:
        for shard in layout.shards(config, made.n):
            yield place(config, made, shard).relative_to(config.root).as_posix(), items(config, made, shard)


def _promotions(folder: Folder, differing: set[str]) -> Iterator[Difference]:
    """results/reference: a record for every study of its tables, and what was made with other models than are here."""
    records: dict[str, list[Promotion]] = {}
    for file in sorted(folder.path.glob("provenance/*.json")):
        name = file.relative_to(folder.path).as_posix()
        try:
            found = read_json(file)
            records[file.stem] = [
                Promotion.of(entry, file) for entry in (found if isinstance(found, list) else [found])
            ]
        except HiresError as error:
            yield Difference("other", name, str(error).removeprefix(f"{file}: "))
            continue
        for entry in records[file.stem]:
            for backbone, model in entry.models.items():
                if reason := _another_model(model):
                    yield Difference("other", name, f"{', '.join(entry.studies)}, backbone {backbone!r}: {reason}")
    for table in reference.TABLES:
        if table in folder.hashes and table not in differing:
            for config, study in reference.studies(folder.path / table):
                if not any(study in entry.studies for entry in records.get(config, [])):
                    yield Difference("other", table, f"nothing says what made study {study!r} of {config!r}")


# --- once more ------------------------------------------------------------------------------------------------------


def again(folder: Folder, n: int, seed: int = 0, device: str | None = None) -> Iterator[tuple[str, str]]:
    """Make `n` images once more, drawn by `seed`: (file, "the same pixels" or what differs)."""
    files = [name.removesuffix(".json") for name in folder.records if name.startswith("images/")]
    if not files:
        raise HiresError(f"{folder.path} holds no images to make again: leave --again out")
    import torch

    from hires.provenance import records

    config = provenance.read_stored(folder.path / "config.yaml")
    torch.set_num_threads(config.compute.threads)  # another number may move the last bits
    loaded: dict[str, Any] = {}
    for name in sorted(random.Random(seed).sample(files, min(n, len(files)))):
        entry = folder.records[f"{name}.json"]
        recipe = records.recipe(records.read(folder.path / name), config)
        model = digest(recipe.model_dump(mode="json", include={"model", "revision", "dtype", "variant_fields"}))
        if model not in loaded:
            loaded = {model: records.load(recipe, device=device)}
        image, _ = records.make(recipe, loaded[model])
        verdict = records.compare(read_picture(folder.path / name, name), image)
        if verdict != records.SAME and (entry.batch or 1) > 1:
            verdict += f" (made in a batch of {entry.batch} then, alone now)"
        yield name, verdict
