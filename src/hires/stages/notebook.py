"""Stage: run one notebook on the results of a configuration."""

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from hires import layout, shards
from hires.config import Config
from hires.errors import HiresError, unknown
from hires.files.storage import read_json, replacing
from hires.stages import metrics

NOTEBOOKS = Path("notebooks")


def run(
    config: Config,
    name: str,
    *,
    results: Path | None = None,
    output: Path | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Run notebooks/<name>.ipynb with the configuration's parameters for it; with `output`, any other too.

    `results`: the folder that it reads, the configuration's own when None. `output`: the folder that gets tables/ and
    figures/, `results` when None. `given`: parameters that take the place of the configuration's. Declared output:
    `layout.notebook`, or <output>/figures/notebooks/<name>.ipynb.
    HiresError for a parameter that the notebook's `parameters` cell lacks, and for a cell that fails.
    """
    parameters = {"results": str(results or config.root), **config.notebooks.get(name, {}), **given}
    if output:
        parameters["output"] = str(output)
        target = output / "figures" / "notebooks" / f"{name}.ipynb"
    else:
        target = layout.notebook(config, name)
    if results is None:
        metrics.check(config)
    with shards.counted(f"notebook {name}", 1) as made:
        execute(NOTEBOOKS / f"{name}.ipynb", target, parameters)
        made.append(1)


def check_all(config: Config) -> None:
    """HiresError for a notebook, or a parameter of one, that isn't there: known before any work is done."""
    for name, parameters in config.notebooks.items():
        check(NOTEBOOKS / f"{name}.ipynb", parameters)


def check(notebook: Path, parameters: Iterable[str]) -> None:
    """HiresError unless the notebook's `parameters` cell assigns each of these names; papermill would only warn."""
    allowed = notebook_parameters(notebook)
    for name in parameters:
        if name not in allowed:
            raise unknown(f"parameter of {notebook}", name, allowed)


def execute(notebook: Path, target: Path, parameters: dict[str, Any]) -> None:
    """Run `notebook` with `parameters` through papermill and store it at `target`."""
    check(notebook, parameters)
    with tempfile.TemporaryDirectory() as folder, replacing(target) as temporary:
        values = Path(folder) / "parameters.yaml"
        values.write_text(yaml.safe_dump(parameters))
        command = [sys.executable, "-m", "papermill", str(notebook), str(temporary), "-k", "python3", "-f", str(values)]
        # Kernels that share IPython's history file wait for each other.
        environment = {**os.environ, "IPYTHONDIR": folder}
        done = subprocess.run([*command, "--no-progress-bar"], env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise HiresError(f"{notebook} failed: {_reason(done.stderr)}")


def notebook_parameters(notebook: Path) -> set[str]:
    """Names that the cell tagged `parameters` assigns."""
    if not notebook.exists():
        raise unknown("notebook", notebook.stem, (path.stem for path in notebook.parent.glob("*.ipynb")))
    cells = [c for c in read_json(notebook)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    if not cells:
        raise HiresError(f"{notebook} has no cell tagged parameters: tag the one that assigns the defaults")
    statements = ast.parse("".join(cells[0]["source"])).body
    targets = [t for s in statements if isinstance(s, ast.Assign) for t in s.targets]
    targets += [s.target for s in statements if isinstance(s, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _reason(stderr: str) -> str:
    """The error that papermill ends with; all of it goes to stderr as well."""
    print(stderr, file=sys.stderr)
    lines = [line for line in stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "papermill gave no reason"
