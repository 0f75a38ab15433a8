"""compute-sanitizer finds nothing in any kernel: bad addresses, races in shared memory, barriers, unwritten memory."""

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


def hand_over(file):
    """Lines that stand for the code by which Triton starts warp groups: a kernel's own, and those that specialise."""
    lines = file.read_text().splitlines()
    return {n for n, line in enumerate(lines, 1) if re.match(r"def _(attend|apart)\(|\s+gl\.warp_specialize\(", line)}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", ["memcheck", "synccheck", "initcheck"])
def test_nothing_is_found(tool):
    told, code = sanitized(tool, KERNELS)
    assert code == 0, told[-3000:]


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_no_race_is_found():
    """None but one that racecheck sees in every kernel with warp groups, between the instructions that start them."""
    from hires_kernels.hopper import npa

    told, _ = sanitized("racecheck", APART)
    assert {(name, int(line) in hand_over(APART)) for _, name, line in PLACES.findall(told)} == {(APART.name, True)}
    told, code = sanitized("racecheck", KERNELS)
    found = {(kernel, name, int(line)) for kernel, name, line in PLACES.findall(told)}
    allowed = {("_attend", "npa.py", line) for line in hand_over(Path(npa.__file__))}
    assert code == 0 or (found and found <= allowed), told[-3000:]
