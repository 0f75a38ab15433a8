"""Files are whole or absent, whatever ends a process; one GPU per process."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hires.errors import HiresError
from hires.execution.devices import gpus, locked_device, uses_gpu
from hires.files.blocks import with_block
from hires.files.storage import (
    claim,
    digest,
    read_json,
    replacing,
    sha256,
    write_bytes,
    write_changed,
    write_json,
    write_text,
)


def start(code, **environment):
    """A Python process that runs `code`."""
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env={**os.environ, **environment}, **pipes)


def test_a_file_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_failure_leaves_what_stood_there(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_killed_process_leaves_no_half_file(tmp_path):
    path = tmp_path / "file.bin"
    child = start(
        "import pathlib, sys\n"
        "from hires.files.storage import replacing\n"
        f"with replacing(pathlib.Path({str(path)!r})) as temporary, temporary.open('wb') as file:\n"
        "    file.write(b'x' * 100000); file.flush(); print('half', flush=True); sys.stdin.read()"
    )
    assert child.stdout.readline() == "half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not path.exists()
    write_bytes(path, b"whole")
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_full_file_system_is_told_in_one_line(tmp_path):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    child = start(
        "import pathlib, resource\n"
        "from hires.errors import HiresError\n"
        "from hires.files.storage import write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        f"    write_bytes(pathlib.Path({str(path)!r}), b'x' * 2000)\n"
        "except HiresError as error:\n"
        "    print(error)"
    )
    out, _ = child.communicate()
    assert f"cannot write {path}" in out and out.count("\n") == 1
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_an_unchanged_file_keeps_its_time(tmp_path):
    path = tmp_path / "file.txt"
    write_changed(path, "same")
    os.utime(path, ns=(1, 1))
    write_changed(path, "same")
    assert path.stat().st_mtime_ns == 1
    write_changed(path, "other")
    assert path.read_text() == "other" and path.stat().st_mtime_ns != 1


def test_json_returns_as_it_was_written(tmp_path):
    value = {"prompt": "été, 絵", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_text())
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", float("nan"))


def test_digests(tmp_path):
    write_bytes(tmp_path / "file", b"abc" * 100_000)
    assert sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) == digest({"a": 1, "b": (1, 2)})
    values = [{}, {"a": 1}, {"a": 2}, {"a": "1"}, {"a": 1.5}, {"a": None}, {"b": 1}, {"a": [1]}, {"a": [1, 2]}]
    assert len({digest(value) for value in values}) == len(values)


def test_a_folder_is_claimed_until_the_process_ends(tmp_path):
    child = start(
        "import pathlib, sys\n"
        "from hires.files.storage import claim\n"
        f"held = claim(pathlib.Path({str(tmp_path)!r}))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    assert child.stdout.readline() == "held\n"
    with pytest.raises(HiresError, match="another run is writing"):
        claim(tmp_path)
    child.kill()
    child.wait()
    with claim(tmp_path):
        pass


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return {"CUDA_VISIBLE_DEVICES": "4,7", "TMPDIR": str(tmp_path)}


HOLD = (
    "import os, sys\n"
    "from hires.execution.devices import locked_device\n"
    "with locked_device('auto', poll=0.01) as device:\n"
    "    os.write(1, f'{device} {os.environ[\"CUDA_VISIBLE_DEVICES\"]}\\n'.encode()); sys.stdin.read()"
)


def test_each_process_gets_a_gpu_of_its_own(two_gpus):
    first, second, third = (start(HOLD, **two_gpus) for _ in range(3))
    running = [first, second, third]
    try:
        # Two of the three hold a GPU, the last one waits until a holder is gone, even when it was killed.
        deadline = time.monotonic() + 30
        got = {}
        for child in running:
            os.set_blocking(child.stdout.fileno(), False)
        while len(got) < 2 and time.monotonic() < deadline:
            got |= {child: line for child in running if child not in got and (line := child.stdout.readline())}
            time.sleep(0.02)
        assert sorted(got.values()) == ["cuda 4\n", "cuda 7\n"]
        holder, line = next(iter(got.items()))
        (waiting,) = set(running) - set(got)
        time.sleep(0.2)
        assert waiting.stdout.readline() == ""
        holder.kill()
        while not (found := waiting.stdout.readline()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert found == line
    finally:
        for child in running:
            child.kill()
            child.wait()


def test_a_block_within_a_block_keeps_its_gpu(two_gpus):
    with locked_device("cuda:1") as outer, locked_device("auto") as inner:
        assert outer == inner == "cuda"
        assert gpus() == ["7"]
    assert gpus() == ["4", "7"]


def test_without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not uses_gpu("auto") and not uses_gpu("cpu") and uses_gpu("cuda")
    with locked_device("auto") as device:
        assert device == "cpu"
    with pytest.raises(HiresError, match="shows 0 GPU"), locked_device("cuda"):
        pass


def test_a_gpu_that_is_not_there(two_gpus):
    with pytest.raises(HiresError, match="shows 2 GPU"), locked_device("cuda:2"):
        pass


def test_a_block_of_a_page_is_replaced_and_the_rest_stays():
    page = "a\n<!-- keys: made by x -->\nold\n<!-- /keys -->\nb\n<!-- other: y -->\nkept\n<!-- /other -->\n"
    assert with_block(page, "keys", r"new \1" + "\n") == page.replace("old", r"new \1")
    with pytest.raises(HiresError, match="<!-- speed: "):
        with_block(page, "speed", "new\n")
