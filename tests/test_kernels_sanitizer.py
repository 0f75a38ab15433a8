"""compute-sanitizer finds nothing in any kernel: bad addresses, races in shared memory, barriers, unwritten memory."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_nothing_is_found(tool):
    script = Path(__file__).with_name("sanitize_kernels.py")
    subprocess.run([sys.executable, str(script)], check=True)  # compiles everything, which takes long under a tool
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "ran" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
