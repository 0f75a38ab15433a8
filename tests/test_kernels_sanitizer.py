"""compute-sanitizer finds nothing in any kernel: bad addresses, races in shared memory, barriers, unwritten memory."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS, APART = (Path(__file__).with_name(f"sanitize_{name}.py") for name in ("kernels", "warp_groups"))
PLACES = re.compile(r"(?:Read|Write) access at (\w+)\+0x\w+ in (\w+\.py):(\d+)")


def sanitized(tool, script):
    """What the tool says of a script, and its exit code: 9 where it found something."""
    subprocess.run([sys.executable, str(script)], check=True)  # compiles everything, which takes long under a tool
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "ran" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout, done.returncode


def starts(file):
    """Lines of the kernel that starts the warp groups; what these run lies outside."""
    (kernel,) = (
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and "warp_specialize" in ast.unparse(node)
    )
    return {(kernel.name, file.name, line) for line in range(kernel.lineno, kernel.end_lineno + 1)}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", ["memcheck", "synccheck", "initcheck"])
def test_nothing_is_found(tool):
    told, code = sanitized(tool, KERNELS)
    assert code == 0, told[-3000:]


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_no_race_is_found():
    """None but one that racecheck sees in kernels whose groups share nothing as well: between the bytes that tell a
    group what to run, with what arguments, and the groups' reading them, which is behind a barrier (BAR.SYNC 1)."""
    from hires_kernels.hopper import npa

    for script, kernels in ((APART, APART), (KERNELS, Path(npa.__file__))):
        told, code = sanitized("racecheck", script)
        found = {(kernel, file, int(line)) for kernel, file, line in PLACES.findall(told)}
        assert code == 9 and found and found <= starts(kernels), told[-3000:]
