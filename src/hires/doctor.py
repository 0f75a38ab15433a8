"""What this machine offers and what to mend. Everything is looked up locally: no connection, no token read or shown.

Only the standard library is imported at the top, as any package may be the one that is missing.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import hires
from hires.errors import HiresError
from hires.files import ASSETS

GIB = 2**30
MEMORY, DISK = 2 * GIB, GIB  # of the embedded default: 1.8 GiB and 0.2 GiB, measured
PACKAGE = Path(hires.__file__).parent
INSTALL = "pip install -r requirements.lock, or pip install -e ."
EMBEDDED = ("tiny-flux", "tiny-sdxl", "tiny-clip")


@dataclass(frozen=True)
class Check:
    """One line: `wrong` stops what is to run, `note` is good to know; `mend` says what to do, "" for nothing."""

    name: str
    state: Literal["ok", "note", "wrong"]
    found: str
    mend: str = ""


def examine(results: Path = Path("results"), config: Path | None = None, model: str | None = None) -> list[Check]:
    """Every check, in the order of the report.

    `results`: the folder that outputs go to. `config`, `model`: what is to run in place of the embedded default.
    HiresError: a configuration with a mistake, or a model of no known name.
    """
    machine = [*_python(), *_packages(), *_torch()]
    if config is not None:
        subject = _configuration(config)
    elif model is not None:
        subject = list(_model(model, "note"))
    else:
        subject = [check for name in EMBEDDED for check in _embedded(name)]
    return [*machine, *subject, _memory(), *_folders(results, _images(config) if config else DISK), _token()]


def runs(checks: list[Check]) -> bool:
    """Whether nothing stops what is to run."""
    return all(check.state != "wrong" for check in checks)


def table(checks: list[Check]) -> str:
    """A line for each check, and what to do below those that leave something to do."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<5}  {check.name:<{width}}  {check.found}")
        lines += [f"{'':<5}  {'':<{width}}  → {check.mend}"] * bool(check.mend)
    return "\n".join(lines)


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"runs": runs(checks), "checks": [asdict(check) for check in checks]}


# --- Python and packages ------------------------------------------------------------------------------------------


def _asked() -> tuple[str, list[str], dict[str, list[str]]]:
    """(Python, packages, packages of each extra) that hires asks for: pyproject.toml, or what was installed with it."""
    pyproject = PACKAGE.parents[1] / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text())["project"]
        return project["requires-python"], project["dependencies"], project["optional-dependencies"]
    from packaging.requirements import Requirement

    metadata = importlib.metadata.metadata("hires")
    lines = metadata.get_all("Requires-Dist") or []
    names = metadata.get_all("Provides-Extra") or []

    def wanted(line: str, extra: str) -> bool:
        marker = Requirement(line).marker
        return marker is None or marker.evaluate({"extra": extra})

    plain = [line for line in lines if wanted(line, "")]
    extras = {name: [line for line in lines if line not in plain and wanted(line, name)] for name in names}
    return metadata["Requires-Python"], plain, extras


def _unmet(requirements: list[str]) -> list[str]:
    """What is missing, or has another version than asked for."""
    from packaging.requirements import Requirement

    problems = []
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": requirement.name}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    return problems


def _python() -> Iterator[Check]:
    if find_spec("packaging") is None:
        return
    from packaging.specifiers import SpecifierSet

    asked, here = _asked()[0], platform.python_version()
    fits = SpecifierSet(asked).contains(here, prereleases=True)
    yield Check("Python", "ok" if fits else "wrong", f"{here} ({asked})", "" if fits else f"use Python {asked}")


def _packages() -> Iterator[Check]:
    if find_spec("packaging") is None:
        yield Check("packages", "wrong", "packaging is missing", INSTALL)
        return
    _, plain, extras = _asked()
    unmet = _unmet(plain)
    found = "; ".join(unmet) or f"{len(plain)}, as pyproject.toml asks"
    yield Check("packages", "wrong" if unmet else "ok", found, INSTALL if unmet else "")
    for extra, requirements in extras.items():
        unmet = _unmet(requirements)
        mend = f"pip install -e .[{extra}], if you need it: {USES.get(extra, extra)}" if unmet else ""
        yield Check(f"extra {extra}", "note" if unmet else "ok", "; ".join(unmet) or "installed", mend)


USES = {
    "workflow": "Snakemake, and the notebooks of a reproduction",
    "paper": "Inception scores",
    "train": "the optimiser of Scale-DiT's paper",
    "dev": "tests and linters",
}

# --- torch, GPU, kernels ------------------------------------------------------------------------------------------


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", "wrong", str(error).splitlines()[0], INSTALL)
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    yield Check("torch", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} CPU threads")
    usable = torch.cuda.is_available()
    yield from _gpus(torch, usable)
    yield _triton(usable)
    yield from _attention(torch, usable)


def _gpus(torch: Any, usable: bool) -> Iterator[Check]:
    """What nvidia-smi lists, and what torch can use of it."""
    listed = _nvidia_smi()
    if usable:
        drivers = {driver for *_, driver in listed}
        driver = f", driver {', '.join(sorted(drivers))}" if drivers else ""
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            free = [f", {row[2]}" for row in listed if str(gpu.uuid) in row[0]]
            found = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB{''.join(free)}, compute capability "
            yield Check(f"GPU {index}", "ok", f"{found}{gpu.major}.{gpu.minor}{driver}")
    elif listed:
        names = ", ".join(f"{name}, {free}, driver {driver}" for _, name, free, driver in listed)
        if torch.version.cuda is None:
            mend = "this torch is built for the CPU: pip install --force-reinstall torch from the plain package index"
        elif os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            mend = "CUDA_VISIBLE_DEVICES hides it: unset it"
        else:
            mend = f"torch can't use it: its CUDA {torch.version.cuda} needs a newer driver"
        yield Check("GPU", "note", names, mend)
    else:
        yield Check("GPU", "note", "none: the CPU does for the embedded models; FLUX.1-dev and SDXL need a GPU")


def _nvidia_smi() -> list[tuple[str, str, str, str]]:
    """(uuid, name, free memory, driver) of every GPU that the driver lists."""
    command = ["nvidia-smi", "--query-gpu=uuid,name,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [(uuid, name, _free_gib(mib), driver) for uuid, name, mib, driver in rows]


def _free_gib(mib: str) -> str:
    return f"{int(mib) / 1024:.0f} GiB free" if mib.isdecimal() else "free memory unknown"


def _triton(usable: bool) -> Check:
    if find_spec("triton") is None:
        return Check("Triton", "note", "missing: the fused kernels need it", "pip install triton" if usable else "")
    version = importlib.metadata.version("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Check("Triton", "note", f"{version}, interpreted", "unset TRITON_INTERPRET: it is for tests")
    if usable and not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return Check("Triton", "note", f"{version}, no C compiler", "install gcc: Triton builds its launchers with it")
    if usable and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return Check(
            "Triton", "note", f"{version}, no Python.h", "install the headers of Python: Triton builds with them"
        )
    return Check("Triton", "ok", version)


def _attention(torch: Any, usable: bool) -> Iterator[Check]:
    """What each operation of the kernels would run on, for the models' own dtype and head size, and what refuses."""
    from hires_kernels import BACKENDS, Problem, explain
    from hires_kernels.backends import choose

    operations = ("neighborhood_patch_attention", "local_attention", "qk_norm_rope")
    cases: list[tuple[str, Any, int, tuple[str, ...]]] = [("embedded", torch.float32, 32, operations)]
    if usable:
        cases += [("FLUX", torch.bfloat16, 128, operations), ("SDXL", torch.float16, 64, operations[:1])]
    device = torch.device("cuda" if usable else "cpu")
    for model, dtype, head_dim, used in cases:
        for operation in used:
            problem = Problem(operation, device, dtype, head_dim)
            module, refusals = choose("auto", problem), explain(problem)
            name = next(name for name, backend in BACKENDS.items() if backend.module is module)
            faster = list(refusals)[: list(refusals).index(name)]
            reasons: dict[str, list[str]] = {}
            for other in faster:
                reasons.setdefault(refusals[other] or "interpreted, for tests", []).append(other)
            why = "; ".join(f"{', '.join(others)}: {reason}" for reason, others in reasons.items())
            yield Check(f"{operation}, {model}", "ok", f"{name} (not {why})" if why else name)


# --- weights ------------------------------------------------------------------------------------------------------


def _embedded(model: str, assets: Path = ASSETS) -> Iterator[Check]:
    """Whether an embedded model is whole: every part there, every weights file as long as its header states."""
    try:
        from safetensors import SafetensorError, safe_open

        from hires.backbones.loading import check_folder
    except (ImportError, RuntimeError, OSError) as error:
        yield Check(f"weights {model}", "wrong", f"not checked: {str(error).splitlines()[0]}", INSTALL)
        return
    folder = assets / model
    problems = []
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError:
            problems.append(f"{file.relative_to(folder)} is cut short or no safetensors file")
    if model == "tiny-clip":  # not a pipeline
        needed = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        problems += [f"{name} is missing" for name in needed if not (folder / name).is_file()]
    elif not problems:
        try:
            check_folder(folder)
        except HiresError as error:
            problems.append(str(error).replace(f"{folder}/", "").removesuffix(": fetch the model again"))
    mend = f"fetch src/hires/assets/{model} again: git checkout, or install hires anew" if problems else ""
    found = "; ".join(problems) or f"{_size(folder)}, whole"
    yield Check(f"weights {model}", "wrong" if problems else "ok", found, mend)


def _size(folder: Path) -> str:
    files = list(folder.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 2**20
    return (
        f"{size / 1024:.1f} GiB" * (size >= 1024) + f"{size:.1f} MiB" * (size < 1024) + f" in {len(files)} safetensors"
    )


def _model(name: str, without_gpu: Literal["note", "wrong"]) -> Iterator[Check]:
    """Whether a model's weights are here, whole, and whether a GPU holds them; where not, how to get them."""
    from hires.backbones.catalogue import MODELS
    from hires.backbones.loading import check_folder, locate, revision
    from hires.hub import cached

    known = MODELS.get(name)
    if known and known.embedded:
        yield from _embedded(name)
        return
    place = locate(name)
    folder = cached(place) if isinstance(place, str) else place
    if folder is None:
        yield from _to_download(name, str(place))
    else:
        try:
            check_folder(folder)
            yield Check(f"weights {name}", "ok", f"{_size(folder)}, whole, revision {revision(folder)}")
        except HiresError as error:
            there = f"fetch it again: hf download {place}" if isinstance(place, str) else "mend the folder"
            yield Check(f"weights {name}", "wrong", str(error).removesuffix(": fetch the model again"), there)
    if known:
        yield _fits(name, known.parameters, without_gpu)


def _to_download(name: str, source: str) -> Iterator[Check]:
    """What the first use of a model of the hub asks for: a login where it is gated, disk, a connection."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    from hires.backbones.catalogue import MODELS
    from hires.hub import LOGIN, page

    known = MODELS.get(name)
    amount = f"{known.download:g} GB" if known else "its weights"
    steps = []
    if known and known.gated and not _token_place():
        steps.append(f"accept its licence on {page(source)}, then {LOGIN}")
    free = shutil.disk_usage(_existing(Path(HF_HUB_CACHE))).free
    if known and free < known.download * 1e9:
        steps.append(f"{free / 1e9:.0f} GB are free for it: set HF_HOME to a larger disk")
    if HF_HUB_OFFLINE:
        steps.append("unset HF_HUB_OFFLINE")
    found = f"not in the cache; the first use fetches {amount} from {page(source)}"
    yield Check(f"weights {name}", "wrong" if steps else "note", found, "; ".join(steps))


def _fits(name: str, parameters: float, without_gpu: Literal["note", "wrong"]) -> Check:
    """Whether the largest GPU holds a model of `parameters` billions in 16 bits."""
    import torch

    needed = 2 * parameters
    if not torch.cuda.is_available():
        return Check(f"GPU for {name}", without_gpu, "none", f"use a machine with a GPU: {needed:.0f} GB of weights")
    have = max(torch.cuda.get_device_properties(k).total_memory for k in range(torch.cuda.device_count())) / 1e9
    found = f"{have:.0f} GB for {needed:.0f} GB of weights in 16 bits"
    if have > 1.3 * needed:
        return Check(f"GPU for {name}", "ok", found)
    return Check(f"GPU for {name}", "note", found, "keep parts of it in main memory: hires generate --offload model")


def _configuration(path: Path) -> list[Check]:
    """What a configuration needs beside the machine: prompts, models, adapters, the networks of its scores."""
    from hires.config import load_config
    from hires.data.sources import is_address, parquet_files
    from hires.metrics.networks import clip_files

    config = load_config(path)
    gpu: Literal["note", "wrong"] = "wrong" if config.compute.device.startswith("cuda") else "note"
    checks = []
    if is_address(config.prompts.source):
        checks.append(Check("prompts", "note", f"read from {config.prompts.source}, not looked at"))
    elif config.prompts.source != "scenes":
        try:
            files = parquet_files(config.prompts.source)
            checks.append(Check("prompts", "ok", f"{len(files)} parquet files at {config.prompts.source}"))
        except HiresError as error:
            checks.append(Check("prompts", "wrong", str(error), "config/README.md says where LAION's come from"))
    trained = {entry.model for entry in config.backbones.values() if entry.weights == "pretrained"}
    for model in sorted(trained):
        checks += _model(model, gpu)
    for name, entry in config.backbones.items():
        for adapter, place in entry.adapters.items():
            there = Path(place).exists()
            mend = "" if there else "train it (docs/training.md), or leave out the variants that need it"
            checks.append(Check(f"adapter {adapter}, {name}", "ok" if there else "wrong", place, mend))
    if config.metrics.clip == "tiny-clip" or config.metrics.features == "tiny-clip":
        checks += _embedded("tiny-clip")
    if config.metrics.clip != "tiny-clip" and not clip_files(config.metrics.clip):
        checks.append(_encoders(config.metrics.clip))
    if config.metrics.features != "tiny-clip":
        checks += _inception()
    return checks


def _encoders(source: str) -> Check:
    from hires.hub import cached, page

    if cached(source, "model.safetensors"):
        return Check(f"encoders {source}", "ok", "in the cache")
    return Check(f"encoders {source}", "note", f"not in the cache; the first use fetches them from {page(source)}")


def _inception() -> Iterator[Check]:
    import torch

    lacking = _unmet(_asked()[2]["paper"])
    if lacking:
        yield Check("Inception", "wrong", "; ".join(lacking), "pip install -e .[paper]")
        return
    there = any(Path(torch.hub.get_dir(), "checkpoints").glob("weights-inception-2015-12-05-*.pth"))
    yield Check("Inception", *(("ok", "in torch's cache") if there else ("note", "fetched at its first use, 91 MiB")))


# --- memory, disk, token ------------------------------------------------------------------------------------------


def _memory() -> Check:
    free = _free_memory()
    mend = "" if free >= MEMORY else f"end other programs: the embedded default takes {MEMORY // GIB} GiB"
    return Check("memory", "note" if mend else "ok", f"{free / GIB:.1f} GiB free", mend)


def _free_memory() -> int:
    """Bytes that this process can still have: what the machine has available, within the limit of its cgroup."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"), None)
    if group is None:
        return free
    place = Path(f"/sys/fs/cgroup{group}")
    for folder in (place, *place.parents):
        limit = folder / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(counts["inactive_file"])  # cache goes first
            free = min(free, int(most) - used)
    return free


def _images(config: Path) -> int:
    """Bytes of a configuration's images before compression."""
    from hires.config import load_config

    return sum(s.n * len(s.seeds) * s.height * s.width * 3 for s in load_config(config).image_sets())


def _folders(results: Path, needed: int = DISK) -> Iterator[Check]:
    yield _disk("disk of results", results, "wrong", f"it takes up to {needed / GIB:.1f} GiB", needed)
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return
    yield _disk("disk of models", Path(HF_HUB_CACHE), "note", "only models from the hub need it: set HF_HOME")


def _disk(name: str, folder: Path, state: Literal["note", "wrong"], use: str, needed: int = DISK) -> Check:
    there = _existing(folder)
    free = shutil.disk_usage(there).free
    found = f"{folder}: {free / GIB:.1f} GiB free"
    if not os.access(there, os.W_OK):
        return Check(name, state, f"{found}, not writable", f"make {there} writable, or work elsewhere; {use}")
    if free < needed:
        return Check(name, state, found, f"free some space; {use}")
    return Check(name, "ok", found)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def _token_place() -> str | None:
    """Where a token lies. Asking the hub's own function could open a connection, so only the places are seen."""
    from huggingface_hub.constants import HF_TOKEN_PATH

    if any(os.environ.get(variable) for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return "in the environment"
    file = Path(HF_TOKEN_PATH)
    return "in a file" if file.is_file() and file.stat().st_size else None


def _token() -> Check:
    name = "Hugging Face token"
    if find_spec("huggingface_hub") is None:
        return Check(name, "note", "unknown: huggingface_hub is missing")
    if place := _token_place():
        return Check(name, "ok", f"present, {place}")
    return Check(name, "note", "none", "needed for gated models only (FLUX.1-dev): hf auth login")
