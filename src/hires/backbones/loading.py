"""`hires.load`: a backbone from a name, a diffusers folder or a hub id, with trained or random weights."""

import hashlib
import json
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from hires.backbones.base import Backbone
from hires.backbones.catalogue import CONFIGS, MODELS
from hires.errors import HiresError, unknown
from hires.execution.offload import check_offload, offload_parts
from hires.execution.oom import exhausted
from hires.files.untrusted import member, parse_json, read_hints, read_table
from hires.hub import download_pipeline
from hires.models import ASSETS, HINTS, build_pipeline

HEADER = 100_000_000  # bytes, as the format allows
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    name_or_folder: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    weights: Literal["pretrained", "random"] = "pretrained",
    offload: str | None = None,
    prepare: Callable[[Backbone], Backbone] | None = None,
) -> Backbone:
    """Load a model.

    Args:
        name_or_folder: a name of `hires.backbones.catalogue.MODELS` ("tiny-flux", "flux-dev", "sdxl", …), a diffusers
            folder with safetensors weights, or a hub id: OWNER/NAME, or OWNER/NAME@REVISION.
        device: torch device; default: CUDA where there is one, else the CPU.
        dtype: "float32", "float16", "bfloat16" or a torch dtype; default: on CUDA float16 for SDXL and bfloat16
            for the others, float32 elsewhere and for the tiny models.
        weights: "random" draws weights for the same architecture, from a fixed seed: enough to measure time and memory.
        offload: a kind of `hires.execution.offload`, by which parts wait in main memory until they run on the device.
        prepare: what to add to the model before it goes to the device, for example `hires.additions.Additions.add`.

    Raises:
        HiresError: an unknown name or device, a folder without model_index.json, a missing or truncated file, a
            pipeline class of no known family, a model that the hub doesn't give (see `hires.hub`).
    """
    device = usable_device(device)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        dtype = DTYPES[dtype]
    if weights not in ("pretrained", "random"):
        raise unknown("weights", weights, ("pretrained", "random"))
    name = str(name_or_folder)
    if offload:
        check_offload(offload, device)
    with _quiet():
        backbone = _random(name, device, dtype) if weights == "random" else _pretrained(name, device, dtype)
        if prepare:
            backbone = prepare(backbone)
        if offload:
            offload_parts(backbone.pipe, offload, device)
        else:
            backbone.pipe.to(device)
    backbone.pipe.set_progress_bar_config(disable=True)
    return backbone


def _pretrained(name: str, device: torch.device, dtype: torch.dtype | None) -> Backbone:
    """Trained weights in the dtype for the device, still in main memory."""
    folder = _folder(name)
    family = check_folder(folder)
    dtype = dtype or _default_dtype(family, device, folder)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except Exception as error:  # parts that are whole but don't belong together: diffusers raises anything
        if exhausted(error):
            raise
        reason = f"{error}".partition("\n")[0] or type(error).__name__
        raise HiresError(f"{folder}: diffusers cannot load it: {reason}") from error
    parts = [(name, part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
    for component, part in parts:
        lacking = [name for name, weight in part.named_parameters() if weight.is_meta]
        if lacking:
            raise HiresError(f"{folder}: {component} lacks the weights {lacking[0]} of its config.json: fetch it again")
    return Backbone.from_pipeline(pipe, name, read_hints(folder), revision(folder))


def usable_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, by default CUDA where there is one; HiresError unless a tensor can be put there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise HiresError(f"device {str(name)!r} can't be used here: {str(error).splitlines()[0]}") from None


def _default_dtype(family: type[Backbone], device: torch.device, folder: Path) -> torch.dtype:
    if device.type == "cpu" or folder.parent == ASSETS:
        return torch.float32
    return family.cuda_dtype


def _folder(name: str) -> Path:
    """The local folder of a model; what comes from the hub is downloaded, or found in its cache."""
    place = locate(name)
    return download_pipeline(place) if isinstance(place, str) else place


def locate(name: str) -> Path | str:
    """Where a model lies: a local folder, or the source on the hub that a text names (see `hires.hub`).

    HiresError: neither a known name nor a folder nor a hub id.
    """
    known = MODELS.get(name)
    if known:
        return ASSETS / known.source if known.embedded else known.source
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.count("/") == 1 and name[0] not in "./~":
        return name
    if "/" in name:
        raise HiresError(f"model folder {name} does not exist")
    raise unknown("model", name, MODELS)


def check_folder(folder: Path) -> type[Backbone]:
    """The family of a diffusers folder; HiresError where a part is missing, cut short, or of no known family."""
    index = _model_index(folder)
    family = _family(folder, index)
    for component, (library, part_class) in _components(index):
        part = folder / component
        if library is None or part_class is None:
            continue
        if not part.is_dir():
            raise HiresError(f"{folder}: the folder of {component!r} is missing")
        for file in sorted(part.glob("*.json")):
            read_table(file)
        known = _class(library, part_class)
        needed = _configuration(known)
        if not (part / needed).is_file():
            raise HiresError(f"{part} has no {needed}: fetch the model again")
        if hasattr(known, "vocab_files_names"):
            _check_vocabulary(part, known.vocab_files_names)
        if needed == "config.json":
            files = _weight_files(part)
            if not files:
                raise HiresError(f"{part} has no *.safetensors weights; other formats are not read")
            for file in files:
                _check_whole(file)
    return family


def _family(folder: Path, index: dict[str, Any]) -> type[Backbone]:
    families = {family.pipeline_class.__name__: family for family in Backbone.families.values()}
    name = str(index.get("_class_name"))
    if name not in families:
        raise HiresError(f"{folder} holds a {name}: allowed: {', '.join(families)}")
    return families[name]


def _class(library: str, name: str) -> Any:
    """The class of a component; what is neither diffusers' nor transformers' own would need code of the folder's."""
    known = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    if not isinstance(known, type):
        raise HiresError(f"component {library}.{name}: no class of diffusers or transformers; other code is not run")
    return known


def _configuration(known: Any) -> str:
    """The file without which a component of this class is not there."""
    if hasattr(known, "vocab_files_names"):
        return "tokenizer_config.json"
    if hasattr(known, "get_image_processor_dict"):
        return "preprocessor_config.json"
    return getattr(known, "config_name", None) or "config.json"


def _check_vocabulary(part: Path, names: dict[str, str]) -> None:
    """HiresError unless a tokenizer has one file with everything, or all of its separate ones.

    Without them transformers makes an empty tokenizer and says nothing.
    """
    whole = names["tokenizer_file"]
    separate = [name for kind, name in names.items() if kind != "tokenizer_file"]
    if not (part / whole).is_file() and not all((part / name).is_file() for name in separate):
        raise HiresError(f"{part} has no vocabulary ({whole}, or {' and '.join(separate)}): fetch the model again")


def _model_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.is_file():
        raise HiresError(f"{folder} is no diffusers folder: it has no model_index.json")
    return read_table(path)


def _components(index: dict[str, Any]) -> list[tuple[str, tuple[str | None, str | None]]]:
    components = [(name, value) for name, value in index.items() if isinstance(value, list)]
    for name, value in components:
        if not name.isidentifier() or len(value) != 2 or not all(isinstance(v, str | None) for v in value):
            raise HiresError(f"model_index.json: {name!r}: {value}: must be a name: [library, class]")
    return [(name, (value[0], value[1])) for name, value in components]


def _weight_files(part: Path) -> list[Path]:
    """Weight files of a component: the shards that its index names, or every safetensors file."""
    files = set(part.glob("*.safetensors"))
    for index in part.glob("*.safetensors.index.json"):
        shards = read_table(index).get("weight_map")
        if not isinstance(shards, dict):
            raise HiresError(f"{index}: must say in weight_map which file beside it holds which tensor")
        files |= {member(part, shard) for shard in shards.values()}
    return sorted(files)


def _check_whole(file: Path) -> None:
    """HiresError unless the file has the length that its safetensors header states."""
    if not file.is_file():
        raise HiresError(f"weight file {file} is missing: fetch the model again")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > HEADER:
                raise HiresError(f"weight file {file}: a header of {length} bytes, at most {HEADER}")
            header = parse_json(stream.read(length))
        needed = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except HiresError:
        raise
    except (struct.error, ValueError, LookupError, TypeError, AttributeError):
        raise HiresError(f"weight file {file} is cut short or no safetensors file: fetch the model again") from None
    if size != needed:
        raise HiresError(f"weight file {file} is cut short: {size} of {needed} bytes: fetch the model again")


def revision(folder: Path) -> str:
    """What the weights are: the commit of a hub snapshot, else the sha256 over all weight files and their places."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for component, _ in sorted(_components(_model_index(folder))):
        for file in _weight_files(folder / component):
            digest.update(f"{component}/{file.name}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _random(name: str, device: torch.device, dtype: torch.dtype | None) -> Backbone:
    """Random weights: the tiny models from their own builder, others from the configs that a folder holds."""
    if name in HINTS:
        pipe: Any = build_pipeline(name)
        pipe.to(device, dtype or torch.float32)
        return Backbone.from_pipeline(pipe, name, HINTS[name], "random")
    folder = CONFIGS / name if name in MODELS else Path(name).expanduser()
    if not folder.is_dir():
        raise unknown("model with random weights", name, [*HINTS, *(path.name for path in CONFIGS.iterdir())])
    index = _model_index(folder)
    family = _family(folder, index)
    dtype = dtype or _default_dtype(family, device, folder)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        parts = {
            component: _random_component(folder / component, library, class_name, device, dtype, family.family)
            for component, (library, class_name) in _components(index)
        }
    options = {key: value for key, value in index.items() if not key.startswith("_") and key not in parts}
    pipe = family.pipeline_class(**parts, **options)
    return Backbone.from_pipeline(pipe, name, read_hints(folder), "random")


def _random_component(
    part: Path, library: str | None, class_name: str | None, device: torch.device, dtype: torch.dtype, family: str
) -> Any:
    """One component of a pipeline from its configuration alone; tokenizers and schedulers are complete anyway.

    A model is drawn in place, on its device and in its dtype: FLUX.1-dev in float32 would need 48 GB on the way. The
    package carries no vocabulary of the large models: the tiny model's words stand in, at the large one's length.
    """
    if library is None or class_name is None:
        return None
    known = _class(library, class_name)
    config = part / "config.json"
    if part.parent.parent == CONFIGS and hasattr(known, "vocab_files_names"):
        length = read_table(part / "tokenizer_config.json")["model_max_length"]
        return known.from_pretrained(ASSETS / f"tiny-{family}" / part.name, model_max_length=length)
    if not config.is_file():
        return known.from_pretrained(part)
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            if library == "diffusers":
                model = known.from_config(json.loads(config.read_text()))
            else:
                model = known(known.config_class.from_pretrained(part))
    finally:
        torch.set_default_dtype(former)
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without progress bars and remarks; warnings about truncated prompts and the like stay for later."""
    levels = {name: logging.getLogger(name).level for name in ("diffusers", "transformers", "huggingface_hub")}
    bars = [
        (diffusers.utils.logging, diffusers.utils.logging.is_progress_bar_enabled()),
        (transformers.utils.logging, transformers.utils.logging.is_progress_bar_enabled()),
    ]
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    for module, _ in bars:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for module, enabled in bars:
            if enabled:
                module.enable_progress_bar()
