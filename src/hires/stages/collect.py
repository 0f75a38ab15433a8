"""Stage: bring together the scores of one configuration that several machines made, without the images."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hires import layout
from hires.config import Config, ImageSet
from hires.data.prompts import read_prompts
from hires.errors import HiresError
from hires.files.storage import read_json, replacing, write_json
from hires.provenance import config_digest
from hires.stages import VERSIONS

SHAPING = {"prompts", "references", "base", "images", "features", "scores"}  # stages that shape a score


def run(config: Config, sources: Sequence[Path]) -> list[str]:
    """Take what `sources`, results folders of this very configuration, hold and this one lacks; the sets taken.

    Scores, crops, features of references and prompts are copied. `layout.collected` names the sets, which later runs
    leave alone, and keeps the records of what made them. HiresError where a folder is another configuration's, its
    prompts are others, or another version of a stage made its scores.
    """
    check(config)
    for source in sources:
        file = source / layout.provenance(config).name
        if not file.is_file():
            raise HiresError(f"{source} holds no {file.name}: name a results folder that `hires run` has written")
        record = read_json(file)
        if (theirs := record["config"]) != config_digest(config):
            raise HiresError(
                f"{source} was made from configuration {theirs}, this one is {config_digest(config)}: their scores "
                "don't belong together: collect results of this configuration"
            )
        _same_stages(source, record, "make them again there (hires run) and then collect")
        ours = layout.prompts(config)
        if ours.exists() and read_prompts(ours) != read_prompts(source / ours.name):  # bytes differ by Arrow's version
            raise HiresError(
                f"{source / ours.name} differs from {ours}: other prompts were drawn: collect runs of the same ones"
            )
    taken = [name for source in sources for name in _take(config, source)]
    fresh = [read_json(source / layout.provenance(config).name) for source in sources]
    past = _read(config)
    sets = sorted({*past["sets"], *taken})
    kept = [record for record in past["records"] if not any(_continues(new, record) for new in fresh)]
    write_json(layout.collected(config), {"sets": sets, "records": [*kept, *fresh]})
    return taken


def elsewhere(config: Config) -> list[ImageSet]:
    """The image sets that were collected: their images are not here."""
    names = _read(config)["sets"]
    return [images for images in config.image_sets() if _name(config, images) in names]


def records(config: Config) -> list[dict[str, Any]]:
    """What made the collected sets: the provenance of each source."""
    return _read(config)["records"]


def check(config: Config) -> None:
    """HiresError where another version of a stage made collected scores: they don't belong beside those made here."""
    for record in records(config):
        _same_stages(config.root, record, "delete the folder, or give the configuration another name")


def _same_stages(place: Path, record: dict[str, Any], mend: str) -> None:
    for stage in sorted(SHAPING & record.get("stages", {}).keys()):
        if (theirs := record["stages"][stage]) != VERSIONS[stage]:
            raise HiresError(
                f"{place} holds scores that version {theirs} of the stage {stage} made, which is at {VERSIONS[stage]} "
                f"now: {mend}"
            )


def _continues(record: dict[str, Any], former: dict[str, Any]) -> bool:
    """Whether a record is a later one of the same results folder: all runs of the former are in it."""
    return all(run in record["runs"] for run in former["runs"])


def _read(config: Config) -> dict[str, list[Any]]:
    file = layout.collected(config)
    return read_json(file) if file.is_file() else {"sets": [], "records": []}


def _name(config: Config, images: ImageSet) -> str:
    return str(layout.scores(config, images).relative_to(config.root))


def _take(config: Config, source: Path) -> list[str]:
    _copy(config, source, layout.prompts(config))
    for height, width, _ in layout.references(config):
        _copy(config, source, layout.reference_features(config, height, width))
        _copy(config, source, layout.reference_crops(config, height, width))
    found = []
    for images in config.image_sets():
        scores = layout.scores(config, images)
        if _copy(config, source, layout.image_scores(config, images)) and _copy(config, source, scores):
            found.append(_name(config, images))
        _copy(config, source, layout.crops(config, images))
        _copy(config, source, layout.costs(config, images))
    return found


def _copy(config: Config, source: Path, target: Path) -> bool:
    """Whether the file is there and not here: it is copied then."""
    file = source / target.relative_to(config.root)
    if target.exists() or not file.exists():
        return False
    with replacing(target) as temporary:
        shutil.copyfile(file, temporary)
    return True
