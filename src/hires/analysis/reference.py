"""results/reference: the scores of full evaluations, tracked by git, one beside the other.

    metrics.parquet, paired.parquet     rows of all of them, under `config` which configuration made them
    provenance/<config>.json            what made them: one record for the studies of each promotion
    prompts/<config>.parquet            the prompts drawn
    crops/<config>/                     of the first images of every set
    SHA256SUMS                          of everything here

A study is known by its name alone to whatever reads the tables, so two configurations can't share one.
"""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from hires.analysis.results import SET
from hires.errors import HiresError
from hires.files import parquet
from hires.files.storage import digest, read_json, write_json
from hires.provenance.schema import Provenance
from hires.stages import checksums

REFERENCE = Path("results/reference")
TABLES = ("metrics.parquet", "paired.parquet")
CROPS = "crops"


def promote(source: Path, target: Path = REFERENCE) -> list[str]:
    """Take the scores, crops and records of a results folder into `target`; returns the studies taken.

    Rows of these studies are replaced, and so are all crops of the configuration; the rest stays. Tables and figures
    are drawn from the scores wherever they are wanted (`snakemake figures`). Origins of shards that differ in nothing
    but the time are recorded once, with the first of these.
    HiresError where the folder is unfinished, or a study of that name is another configuration's.
    """
    for name in (*TABLES, "provenance.json", "prompts.parquet"):
        if not (source / name).is_file():
            raise HiresError(f"{source} holds no {name}: finish the run first")
    file = source / "provenance.json"
    record = Provenance.of(read_json(file), file).model_dump(exclude_unset=True)
    record["runs"] = _distinct(record.get("runs", []))
    config = record["configuration"]["name"]
    taken = sorted(set(pd.read_parquet(source / "metrics.parquet", columns=["study"])["study"]))
    merged = {name: _merged(source / name, target / name, config, taken) for name in TABLES}
    for name, rows in merged.items():
        parquet.write_frame(target / name, rows)
    if (source / CROPS).is_dir():
        shutil.rmtree(target / CROPS / config, ignore_errors=True)
        shutil.copytree(source / CROPS, target / CROPS / config)
    (target / "prompts").mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "prompts.parquet", target / "prompts" / f"{config}.parquet")
    made = [*_others(target, config, taken), {"studies": taken, **record}]
    write_json(target / "provenance" / f"{config}.json", made)
    seal(target)
    return taken


def promote_costs(source: Path, target: Path = REFERENCE) -> list[str]:
    """Take what `hires costs` measured in a results folder, for studies that stand in `target`; returns these.

    Seconds and bytes of the image sets that were measured are replaced; of differences in these, all of a study and
    backbone, as measured alone and beside others don't compare. HiresError where nothing was measured, or no score of
    it was promoted.
    """
    from hires.config import load_config
    from hires.metrics.scores import TIDY, paired
    from hires.stages import costs

    config = load_config(source / "config.yaml")
    rows = costs.rows(config, config.image_sets())
    if rows.empty:
        raise HiresError(f"{source} holds no costs of this configuration: measure them first (hires costs)")
    table = target / "metrics.parquet"
    there = {study for name, study in studies(table) if name == config.name} if table.is_file() else set()
    taken = sorted(there & {*rows["study"]})
    if not taken:
        raise HiresError(f"{target} has no scores of {config.name}: promote them first (hires promote results)")
    rows = rows[rows["study"].isin(taken)]
    kinds = ["study", "backbone"]
    fresh = {
        "metrics.parquet": (rows[TIDY], [*kinds, "setting", "variant", "height", "width"]),
        "paired.parquet": (paired(rows), kinds),
    }
    for name, (added, columns) in fresh.items():
        former = parquet.read_frame(target / name)
        places, measured = (pd.MultiIndex.from_frame(each[columns]) for each in (former, rows))
        old = places.isin(measured) & former["metric"].isin(costs.METRICS)
        added.insert(0, "config", config.name)
        parquet.write_frame(target / name, pd.concat([former[~old], added], ignore_index=True)[former.columns])
    seal(target)
    return taken


def seal(target: Path = REFERENCE) -> None:
    """Write SHA256SUMS over everything in `target`, for `hires verify`."""
    checksums.write(target, sorted(path for path in target.rglob("*.*") if path.is_file()))


def studies(table: Path) -> list[tuple[str, str]]:
    """(configuration, study) of the rows of a table in results/reference."""
    rows = pd.read_parquet(table, columns=["config", "study"]).drop_duplicates()
    return list(rows.itertuples(index=False, name=None))


def image_sets(table: Path) -> Counter[str]:
    """Study → how many image sets of it have scores in a table of results/reference; none where there is no table."""
    if not table.is_file():
        return Counter()
    rows = pd.read_parquet(table, columns=SET).drop_duplicates()
    return Counter(rows[rows["setting"] != "reference"]["study"])


def records(config: str, target: Path = REFERENCE) -> list[dict[str, Any]]:
    """What made the rows of a configuration: one record for each promotion of which something is left."""
    file = target / "provenance" / f"{config}.json"
    return read_json(file) if file.is_file() else []


def makers(target: Path = REFERENCE) -> pd.DataFrame:
    """What made the rows, one line per promotion: configuration, studies, commit, machine, torch, day."""
    rows = []
    for file in sorted((target / "provenance").glob("*.json")):
        for record in read_json(file):
            runs = record.get("runs") or [record]
            row = {"configuration": file.stem, "studies": ", ".join(record["studies"])}
            row["commit"] = _list((run["commit"] or "unknown")[:7] for run in runs)
            row["machine"] = _list(run["gpu"] or run["cpu"] for run in runs)
            row["torch"] = _list(run["packages"]["torch"] for run in runs)
            rows.append({**row, "day": _list(run["time"][:10] for run in runs)})
    return pd.DataFrame(rows)


def _list(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _others(target: Path, config: str, studies: list[str]) -> list[dict[str, Any]]:
    """The records of what stays: studies of earlier promotions that this one doesn't replace."""
    kept = [{**record, "studies": sorted({*record["studies"]} - {*studies})} for record in records(config, target)]
    return [record for record in kept if record["studies"]]


def _distinct(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for origin in sorted(runs, key=lambda origin: origin["time"]):
        found.setdefault(digest({**origin, "time": ""}), origin)
    return list(found.values())


def _merged(source: Path, target: Path, config: str, studies: list[str]) -> pd.DataFrame:
    """The rows of `target` that stay, and those of `source`; a column that older rows lack is null there."""
    fresh = parquet.read_frame(source)
    fresh.insert(0, "config", config)
    if not target.is_file():
        return fresh
    former = parquet.read_frame(target)
    if "config" not in former.columns:
        raise HiresError(
            f"{target} doesn't say which configuration made it, so an older hires wrote it: delete it first"
        )
    taken = former[former["study"].isin(studies) & (former["config"] != config)]
    if len(taken):
        study, owner = taken[["study", "config"]].iloc[0]
        raise HiresError(
            f"study {study!r} of {target.parent} was made by configuration {owner!r}: "
            f"give the study of configuration {config!r} another name"
        )
    if unknown := [name for name in former.columns if name not in fresh.columns]:
        raise HiresError(
            f"{source} has no column {', '.join(unknown)}, but {target} has: "
            "make the scores again with this version of hires (hires metrics)"
        )
    return pd.concat([former[~former["study"].isin(studies)], fresh], ignore_index=True)[fresh.columns]
