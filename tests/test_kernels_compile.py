"""What the compiler makes of the kernels for Hopper, without one: matrix instructions, TMA, memory, no spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = 227 * 1024  # of a thread block


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    lines = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {(line.get("backend") or line["kernel"], line["case"]): line for line in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *(
            (case, backend)
            for case in ("FLUX", "FLUX, ragged", "FLUX, edge of a band")
            for backend in ("triton", "gluon", "gluon, again")
        ),
        *(("SDXL", backend) for backend in ("triton", "gluon")),  # float16: nothing is done again
    ],
)
def test_npa_compiles_for_hopper(case, backend, compiled):
    figures = compiled[backend, case]
    assert figures["wgmma"] > 0 and figures["tma"] > 0 and not figures["serialised"]
    assert figures["shared"] <= SHARED_MEMORY
    outside_the_loop = backend.startswith("gluon") and case.startswith("FLUX")
    assert figures["spills"] == 0 or (outside_the_loop and figures["spills"] <= 64)
    assert figures["stale"] == 0


@pytest.mark.parametrize("kernel", ["_moments", "_merge", "_apply", "_sum"])
def test_image_kernels_compile_for_hopper(kernel, compiled):
    found = [figures for (name, _), figures in compiled.items() if name == kernel]
    assert len(found) == 4 and all(figures["spills"] == 0 for figures in found)
