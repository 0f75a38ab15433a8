"""Models as the stages need them: loaded once, and told apart without being loaded."""

import re
import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires.config import BackboneEntry, Config
from hires.errors import HiresError
from hires.execution.oom import attempt
from hires.files import ASSETS
from hires.files.storage import digest, sha256

if TYPE_CHECKING:
    from hires.backbones import Backbone


def load(config: Config, backbone: str, device: str) -> "Backbone":
    """The model of a backbone on a torch device, with `compute.threads` CPU threads; the last one stays in memory."""
    import torch

    torch.set_num_threads(config.compute.threads)
    entry, compute = config.backbones[backbone], config.compute
    given = entry.model, entry.weights, entry.dtype, tuple(entry.adapters.items()), device
    found: list[Backbone] = []
    reason = attempt(lambda: found.append(_load(*given, compute.offload, compute.compile)))
    if reason and device.startswith("cuda") and not compute.offload:
        if compute.out_of_memory == "refuse":
            raise HiresError(f"model {entry.model!r} does not fit: {reason}; what helps: compute.offload = true")
        print(f"model {entry.model!r} does not fit: {reason}; going on with offload = true", file=sys.stderr)
        reason = attempt(lambda: found.append(_load(*given, True, compute.compile)))
    if reason:
        raise HiresError(f"model {entry.model!r} does not fit: {reason}; it needs a machine with more memory")
    return found[0]


@lru_cache(maxsize=1)
def _load(
    model: str,
    weights: Any,
    dtype: str,
    adapters: tuple[tuple[str, str], ...],
    device: str,
    offload: bool,
    compiled: bool,
) -> "Backbone":
    from hires.backbones import load
    from hires.execution.compilation import compile_blocks

    quiet("diffusers", "transformers")
    kind = "model" if offload and device.startswith("cuda") else None
    backbone = load(model, device=device, dtype=dtype, weights=weights, offload=kind)
    backbone.adapters = {name: Path(place) for name, place in adapters}
    if compiled:
        compile_blocks(backbone.model)
    return backbone


def quiet(*libraries: str) -> None:
    """No progress bars while loading, and no word on each prompt that is cut: protocols of the scores count them."""
    for library in libraries:
        speech = import_module(f"{library}.utils.logging")
        speech.disable_progress_bar()
        speech.set_verbosity_error()


def record(backbone: "Backbone") -> dict[str, Any]:
    """What a record says of a loaded model: device, name, revision, and the SHA-256 of its files by their paths."""
    folder = Path(backbone.pipe.name_or_path or "")
    pretrained = backbone.revision not in (None, "random") and folder.is_dir()
    return {
        "device": backbone.device.type,
        "model": backbone.name,
        "revision": backbone.revision,
        "files": folder_digests(folder) if pretrained else {},
    }


@lru_cache
def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model folder. The hub's cache names large files by it, and they are not read again."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _blob(path) or sha256(path) for path in files}


def _blob(path: Path) -> str | None:
    name = path.resolve().name
    return name if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name) else None


def files(entry: BackboneEntry) -> list[Path]:
    """Files of a backbone's model, as `folder_files`, none for random weights; and those of its adapters."""
    own = [] if entry.weights == "random" else folder_files(entry.model)
    return own + [file for place in entry.adapters.values() for file in _adapter_files(Path(place))]


def _adapter_files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.glob("*.safetensors"))


def folder_files(model: str) -> list[Path]:
    """Files of a model that the repository or a local folder holds; none for hub ids."""
    folder = _folder(model)
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []


def _folder(model: str) -> Path | None:
    return next((place for place in (ASSETS / model, Path(model)) if place.is_dir()), None)


def identity(entry: BackboneEntry, adapter: str | None = None) -> dict[str, Any]:
    """What tells a model from every other: its name, how it is loaded, and the content of a local folder.

    `adapter`: the one that a variant needs, whose content then counts too, wherever it lies.
    """
    found: dict[str, Any] = {"model": entry.model, "weights": entry.weights, "dtype": entry.dtype}
    folder = _folder(entry.model)
    own = [] if entry.weights == "random" else folder_files(entry.model)
    found["content"] = _content(tuple(path for path in own if folder and folder / "adapters" not in path.parents))
    if adapter in entry.adapters:
        found["adapter"] = _content(tuple(_adapter_files(Path(entry.adapters[adapter]))))
    elif adapter and folder:
        found["adapter"] = _content(tuple(_adapter_files(folder / "adapters" / adapter)))
    return found


@lru_cache
def _content(paths: tuple[Path, ...]) -> str | None:
    return digest([[path.name, sha256(path)] for path in paths]) if paths else None
