"""What the stages write down about what they made, as typed models: whoever reads a record reads it through these.

`python -m hires.provenance.schema` writes their JSON schema to docs/records.schema.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from pydantic.json_schema import models_json_schema

from hires import __version__
from hires.errors import HiresError, first_mistake

SCHEMA = Path("docs/records.schema.json")


class Part(BaseModel):
    """Part of a record. Fields that are None or empty by default are lacking in records of an older hires."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def of(cls, value: Any, place: str | Path) -> Self:
        """The record in a JSON value; HiresError, naming its `place`, where it is another version's, or none."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            name, _, reason = first_mistake(error)
            made = f"hires {by} wrote it" if (by := writer(value)) else "another version of hires wrote it"
            raise HiresError(f"{place}: {name or 'the record'}: {reason}: {made}, this is {__version__}") from None


def writer(value: Any) -> str | None:
    """The version of hires that a record says it is from."""
    if not isinstance(value, Mapping):
        return None
    origins = value.get("provenance", value)
    origin = origins[-1] if isinstance(origins, list) and origins else origins
    version = origin.get("hires") if isinstance(origin, Mapping) else None
    return version if isinstance(version, str) else None


class Attention(Part):
    """What the operations of hires_kernels ran on; empty where PyTorch did everything.

    operations: name -> backends. launches: parameters that fused kernels chose, with their `kernel`.
    """

    operations: dict[str, list[str]]
    launches: list[dict[str, Any]]


class Origin(Part):
    """Code, versions, machine, configuration and time; for what a model made, the model and what it ran on.

    time: UTC, when the process began its work. commit, dirty: None outside of a git checkout. config: digest of the
    configuration. files: SHA-256 of the model's files. adapters: digests of the LoRAs that acted.
    """

    time: str
    hires: str
    commit: str | None
    dirty: bool | None
    python: str
    packages: dict[str, str]
    system: str
    cpu: str
    cores: int | None
    gpu: str | None
    config: str
    device: str | None = None
    model: str | None = None
    revision: str | None = None
    files: dict[str, str] = {}
    adapters: dict[str, str] = {}
    attention: Attention | None = None


class Cost(Part):
    """A stage of the cascade: its size in pixels, denoising steps, seconds an image; stored: made by an earlier job."""

    name: str
    height: int
    width: int
    steps: int
    seconds: float
    stored: bool = False


class Measured(Part):
    """What making one file took.

    seconds: this file's share of its batch. peak_bytes: of the whole batch. savings: what memory that ran out made
    necessary. source_sha256: of the picture that a reference was cut from.
    """

    sha256: str
    source_sha256: str | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    batch: int | None = None
    steps: int | None = None
    stages: list[Cost] = []
    savings: dict[str, Any] = {}


class Record(Measured):
    """<file>.json beside an image, a reference image or base latents.

    version: of the stage. key: digest of all that the file depends on.
    """

    version: int = 1
    key: str
    sampling: dict[str, Any] = {}
    provenance: Origin


class Entry(Measured):
    """A file of a shard. seed: the trial's; an image states its own, drawn from trial and prompt, in its metadata."""

    id: str
    seed: int
    file: Annotated[str, StringConstraints(pattern=r"^[^/\\]+\.[a-z]+$")]


class Manifest(Part):
    """shard-*.json, references/<H>x<W>/manifest.json.

    version: of the stage. missing: references without an image; reasons: why.
    """

    version: int
    study: str | None = None
    setting: str | None = None
    backbone: str | None = None
    variant: str | None = None
    height: int
    width: int
    sampling: dict[str, Any] = {}
    images: list[Entry] = []
    latents: list[Entry] = []
    missing: list[str] = []
    reasons: dict[str, str] = {}
    provenance: list[Origin]


class Model(Part):
    """What tells a model from others: how it is loaded, its revision, the content of a local folder, its files."""

    model: str
    weights: str
    dtype: str
    content: str | None
    revision: str | None
    files: dict[str, str] = {}


class Prompts(Part):
    """Number of prompts, and the digest of their ids."""

    n: int
    digest: str


class Images(Part):
    """Number of images, the seconds that they took, and the seeds of their trials."""

    n: int
    seconds: float | None = None
    seeds: list[int]


class Provenance(Origin):
    """provenance.json: what made the results of a configuration.

    stages: versions of the stages. runs: every different origin of a shard. note: what a person added.
    """

    stages: dict[str, int] = {}
    configuration: dict[str, Any]
    models: dict[str, Model]
    prompts: Prompts
    images: Images
    runs: list[Origin] = []
    note: str | None = None


class Promotion(Provenance):
    """An entry of results/reference/provenance/<config>.json: what made the rows of these studies."""

    studies: list[str]


def json_schema() -> str:
    """The JSON schema of every kind of record."""
    kinds = [(kind, "validation") for kind in (Record, Manifest, Provenance, Promotion)]
    _, schema = models_json_schema(kinds, title="Records of hires")  # type: ignore[arg-type]
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(json_schema(), encoding="utf-8")
