"""Read what a run left behind: scores, prompts, images. Figures, notebooks and the report go through this.

A folder without images (results/reference) is as good as a full one: whatever needs pictures finds none.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from PIL import Image
from pydantic import BaseModel, ValidationError

from hires.errors import HiresError, first_mistake
from hires.files import parquet
from hires.files.storage import Damaged, read_json, read_sealed
from hires.files.untrusted import member

TRUE = "true image"
_REFERENCE = "reference"  # what the table of scores calls them
BETWEEN = "between"  # settings of one variant compared, where paired.parquet names a setting
SET = ["study", "setting", "backbone", "variant", "height", "width"]
# what is read of the tables; those that another version wrote may have more
METRICS = [*SET, "trial", "metric", "value", "low", "high", "n", "flag", "protocol"]
PAIRED = ["study", "setting", "backbone", "height", "width", "metric", "a", "b", "difference", "low", "high", "n"]


class _Image(BaseModel):
    id: str
    seed: int
    file: str


class _Shard(BaseModel):
    """What is read of a manifest."""

    study: str
    setting: str
    backbone: str
    variant: str
    height: int
    width: int
    images: list[_Image]


def repository_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: the working directory) that holds the project's config/."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "config" / "published.csv").is_file():
            return folder
    raise HiresError(f"no config/published.csv at or above {start}: start in the repository, or in one of its folders")


def size_name(height: int, width: int) -> str:
    return f"{height}x{width}"


def named(variant: str, setting: str) -> str:
    """A variant in one setting, as paired.parquet names it in a and b where settings are compared."""
    return f"{variant}, {setting}"


@dataclass(frozen=True)
class Results:
    """One results folder, for example results/embedded. `output` is where tables/ and figures/ go."""

    path: Path
    output: Path

    @classmethod
    def open(cls, path: str | Path, output: str | Path = "") -> "Results":
        """Open `path`, absolute, or relative to the working directory or the repository root.

        `output`: the folder to write tables/ and figures/ to; empty: into the results themselves.
        """
        folder = _resolve(path)
        if not (folder / "metrics.parquet").is_file():
            raise HiresError(
                f"no metrics.parquet in {folder}: make the results first (`hires run`), or name a folder that has "
                "some, such as results/reference"
            )
        return cls(folder, _resolve(output) if output else folder)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The tidy table of scores over all trials, one row per image set and metric."""
        return where(parquet.read_frame(self.path / "metrics.parquet", METRICS), trial="all")

    @cached_property
    def trials(self) -> pd.DataFrame:
        """The same table for each seed of the studies that have several; `trial` names the seed."""
        rows = parquet.read_frame(self.path / "metrics.parquet")
        return rows[rows["trial"] != "all"]

    def scores(self, study: str, **columns) -> pd.DataFrame:
        """A study's scores; those of the references stand under every backbone, as variant "true image"."""
        rows = where(self.metrics, study=study, **columns)
        rows = rows[rows["setting"] != _REFERENCE]
        truth = where(self.metrics, study=study, setting=_REFERENCE).drop(columns=["setting", "backbone", "variant"])
        sets = rows[["setting", "backbone", "height", "width"]].drop_duplicates()
        return pd.concat([rows, truth.merge(sets, on=["height", "width"]).assign(variant=TRUE)], ignore_index=True)

    @cached_property
    def paired(self) -> pd.DataFrame:
        """Paired differences between variants, and between settings; empty where none were computed."""
        file = self.path / "paired.parquet"
        return parquet.read_frame(file, PAIRED) if file.is_file() else pd.DataFrame(columns=PAIRED)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """Columns index, id, prompt, …; empty where the prompts were not kept."""
        file = self.path / "prompts.parquet"
        return parquet.read_frame(file) if file.is_file() else pd.DataFrame(columns=["index", "id", "prompt"])

    @cached_property
    def provenance(self) -> dict:
        file = self.path / "provenance.json"
        return read_json(file) if file.is_file() else {}

    @cached_property
    def images(self) -> pd.DataFrame:
        """One row per stored image: the columns of its set, id, seed, path, in the order of the prompts."""
        parts = [pd.DataFrame(columns=[*SET, "id", "seed", "path"])]
        for manifest in sorted(self.path.glob("images/*/*/*/*/*/shard-*.json")):
            try:
                record = _Shard.model_validate(read_sealed(manifest))
            except ValidationError as error:
                place, _, reason = first_mistake(error)
                raise HiresError(f"{manifest}: {place}: {reason}") from None
            columns = {name: [getattr(image, name) for image in record.images] for name in ("id", "seed")}
            columns["path"] = [str(member(manifest.parent, image.file)) for image in record.images]
            parts.append(pd.DataFrame({**{name: getattr(record, name) for name in SET}, **columns}))
        return self._in_order(pd.concat(parts[1:] or parts, ignore_index=True))

    @cached_property
    def references(self) -> pd.DataFrame:
        """One row per reference image: height, width, id, path."""
        rows = []
        for file in sorted(self.path.glob("references/*x*/*.png")):
            height, width = map(int, file.parent.name.split("x"))
            rows.append({"height": height, "width": width, "id": file.stem, "path": file})
        return self._in_order(pd.DataFrame(rows, columns=["height", "width", "id", "path"]))

    def crops(self, study: str, setting: str, backbone: str, variant: str, size: str) -> Image.Image | None:
        """The stored crops of an image set (`hires.stages.crops`); None where none were kept."""
        found = [*self.path.glob(f"crops/**/{study}/{setting}/{backbone}/{variant}/{size}.webp")]
        return read_image(found[0]) if found else None

    def pictures(
        self, n: int, by: str = "variant", truth: bool = True, **columns
    ) -> list[tuple[str, dict[str, Image.Image]]]:
        """(prompt, images by their value of column `by`) of the first `n` prompts that have images with these columns.

        `truth`: with the reference image of that size, under "true image".
        """
        chosen = where(self.images, **columns)
        rows = []
        for identifier in list(dict.fromkeys(chosen["id"]))[:n]:
            images = {}
            for row in where(chosen, id=identifier).drop_duplicates(by).itertuples():
                same = where(self.references, id=identifier, height=row.height, width=row.width)
                if truth and len(same):
                    images[TRUE] = read_image(same["path"].iloc[0])
                images[getattr(row, by)] = read_image(row.path)
            rows.append((self.prompt(identifier), images))
        return rows

    def prompt(self, identifier: str) -> str:
        return self.prompts.set_index("id")["prompt"].get(identifier, identifier)

    def _in_order(self, frame: pd.DataFrame) -> pd.DataFrame:
        position = {identifier: i for i, identifier in enumerate(self.prompts["id"])}
        order = frame["id"].map(position).sort_values(kind="stable").index
        return frame.loc[order].reset_index(drop=True)


def where(frame: pd.DataFrame, **columns) -> pd.DataFrame:
    """The rows whose columns have the given value, or one of the given values; None leaves a column free."""
    for name, value in columns.items():
        if value is not None:
            frame = frame[frame[name].isin(value if isinstance(value, list | tuple) else [value])]
    return frame


def read_image(path: str | Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise Damaged(f"{path} is damaged: no image ({error}); hires run makes it again") from None


def _resolve(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path.resolve() if path.is_absolute() or path.exists() else (repository_root() / path).resolve()
