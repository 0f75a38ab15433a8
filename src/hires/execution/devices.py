"""One GPU per process. Snakemake counts GPUs but hands out no device numbers, so each job locks one for itself."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hires.errors import HiresError
from hires.files.storage import holder


def gpus() -> list[str]:
    """Ids of the NVIDIA GPUs that this process may use, without starting CUDA; `CUDA_VISIBLE_DEVICES` narrows them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def uses_gpu(device: str) -> bool:
    """Whether a job with `compute.device` = `device` takes a GPU on this machine."""
    return device.startswith("cuda") or (device == "auto" and bool(gpus()))


def without_fragments() -> None:
    """Have PyTorch grow the GPU memory that it holds in place: stages differ in size, and what one leaves in pieces is
    of no use to the next. Unless the user chose otherwise; call it before CUDA starts."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def locked_device(device: str = "auto", poll: float = 0.2, patience: float = 5.0) -> Iterator[str]:
    """Wait for a free GPU, show this process only that one, and give the name that torch knows it by.

    `device`: `auto` (a GPU where there is one, else the CPU), `cuda`, `cuda:<n>` (the n-th visible one), or any other
    torch device, which needs no lock. Call it before CUDA starts. The lock ends with the block, or with the process
    however that ends; blocks within blocks share it. Who holds the GPUs is told after `patience` seconds, and then ever
    more rarely. HiresError when a GPU is asked for and there is none.
    """
    if not uses_gpu(device):
        yield "cpu" if device == "auto" else device
        return
    names = gpus()
    if ":" in device:
        index = int(device.split(":")[1])
        names = names[index : index + 1]
    if not names:
        raise HiresError(f"compute.device = {device!r}: this machine shows {len(gpus())} GPU(s); allowed: auto, cpu")
    # Slurm numbers the GPUs of each of its jobs from 0.
    folder = Path(tempfile.gettempdir()) / f"hires-devices-{os.getuid()}-{os.environ.get('SLURM_JOB_ID', 'local')}"
    folder.mkdir(exist_ok=True)
    locks = {name: FileLock(folder / f"{name.replace('/', '_')}.lock", is_singleton=True) for name in names}
    name = _first_free(locks, poll, patience)
    Path(locks[name].lock_file).write_text(str(os.getpid()))
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = name
    try:
        yield "cuda"
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        locks[name].release()


def _first_free(locks: dict[str, FileLock], poll: float, patience: float) -> str:
    started = time.monotonic()
    while True:
        for name, lock in locks.items():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            return name
        if time.monotonic() - started > patience:
            held = ", ".join(holder(Path(lock.lock_file)) for lock in locks.values())
            print(
                f"waiting for a GPU for {time.monotonic() - started:.0f} s: held by {held}; "
                "one that hangs may be killed, its finished work is kept",
                file=sys.stderr,
            )
            patience *= 4
        time.sleep(poll)
