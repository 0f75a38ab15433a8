"""What made a result: code, versions, machine, model, configuration, time. No host names, no absolute paths."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from hires import __version__, layout
from hires.config import Config, load_config
from hires.errors import HiresError
from hires.files.storage import digest, read_json, write_changed
from hires.stages import VERSIONS

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "torchmetrics", "triton", "numpy", "pillow")


def record(config: Config, **facts: Any) -> dict[str, Any]:
    """Provenance of what this process makes, as JSON-like values; `facts` are added as they are.

    Keys: `time` (UTC), `hires`, `commit` and `dirty` (where the code lies in no git checkout: HIRES_COMMIT, and None),
    `python`, `packages`, `system`, `cpu`, `cores`, `gpu` (None on the CPU), `config` (digest of the configuration).
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine(),
        "config": config_digest(config),
        **facts,
    }


def machine() -> dict[str, Any]:
    """The part of a record that depends on the code and the machine only."""
    commit, dirty = _commit()
    return {
        "hires": __version__,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
    }


def config_data(config: Config) -> dict[str, Any]:
    """What the configuration states, defaults left out: `load_config` reads it back to an equal one."""
    return config.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"extends"})


def config_digest(config: Config) -> str:
    """16 hex digits of the configuration, whatever its files and its order of keys."""
    return digest(config_data(config))


def stored_config(config: Config) -> Path:
    """Where the stages of a run read the configuration: results/<name>/config.yaml."""
    return config.root / "config.yaml"


def store_config(config: Config) -> Path:
    """Write the configuration to `stored_config` unless it stands there. HiresError where a newer hires has been."""
    path = stored_config(config)
    other_versions(config)
    write_changed(path, yaml.safe_dump(config_data(config), sort_keys=False, allow_unicode=True))
    return path


def other_versions(config: Config) -> dict[str, int]:
    """Stage -> its version when the results were finished, for the stages that have another one since.

    Nothing for unfinished results, or those of a hires that recorded no versions. HiresError where one is newer than
    this hires knows.
    """
    try:
        record = read_json(layout.provenance(config))
    except HiresError:  # not there, or damaged: it will be written again
        return {}
    found = {stage: n for stage, n in record.get("stages", {}).items() if n != VERSIONS.get(stage)}
    for stage, n in found.items():
        if n > VERSIONS.get(stage, 0):
            raise HiresError(
                f"{config.root} was made by hires {record['hires']} (stage {stage}: version {n}), this is "
                f"{__version__} ({VERSIONS.get(stage, 'none')}): use that one, or give the configuration another name"
            )
    return found


def read_stored(path: Path) -> Config:
    """The configuration that a run stored in its results folder, with its outputs there, wherever that lies now.

    HiresError, with the version that wrote it, where it is no configuration of this version.
    """
    try:
        return load_config(path).at(path.parent)
    except HiresError as error:
        try:
            by = f"hires {read_json(path.parent / 'provenance.json')['hires']}"
        except (HiresError, KeyError, TypeError):
            by = "another version of hires"
        raise HiresError(f"{by} wrote it, this is {__version__}: {error}") from None


def distinct(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The different records of a list, in the order of their first appearance."""
    return list({digest(entry): entry for entry in records}.values())


def _commit() -> tuple[str | None, bool | None]:
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    if git("ls-files", "--error-unmatch", here.name) is None:
        return os.environ.get("HIRES_COMMIT"), None  # a copy without its history may be told
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return head, bool(changes)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
