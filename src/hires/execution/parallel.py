"""Several devices of one host for one image, one process each, through torch.distributed.

`hires.attention.bands` divides the transformer among them. Everything outside it runs the same in every process, but
for the tiles of the VAE, which are shared. The base stage has too few tokens to be divided: every process makes it.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import hires_kernels
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor, nn

from hires.errors import HiresError


def active() -> bool:
    """Whether this process makes images together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first() -> bool:
    """Whether this process is the one that writes: the first of several, joined yet or not, or the only one."""
    if active():
        return dist.get_rank() == 0
    return not launched() or os.environ["RANK"] == "0"


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str | None = None) -> Iterator[str | None]:
    """Join the processes that torchrun started; gives this process's device. Without torchrun, nothing but `device`.

    One GPU each, in the order of their numbers (NCCL); gloo on the CPU.
    """
    if not launched():
        yield device
        return
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    local = int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise HiresError(
            f"{os.environ['WORLD_SIZE']} processes and {torch.cuda.device_count()} GPUs: give one GPU each"
        )
    if cuda:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast memory, which shared hosts often lack
        for name, value in hires_kernels.NCCL.items():
            os.environ.setdefault(name, value)
        torch.cuda.set_device(local)
    own = torch.device("cuda", local) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo", device_id=own if cuda else None)
    try:
        yield str(own)
    finally:
        dist.destroy_process_group()


def shared_tiles(vae: Any, size: Sequence[int], factor: int) -> AbstractContextManager[None]:
    """Within it every process decodes or encodes a share of the tiles, and then has all of them.

    Args:
        vae: an AutoencoderKL, tiled or not; any other runs whole in every process, and so does an encoder followed by a
            convolution, which reads tiles before they are exchanged.
        size: (height, width) of its input.
        factor: 1 to encode; to decode, pixels a latent pixel.
    """
    if not active() or not isinstance(vae, AutoencoderKL) or not vae.use_tiling:
        return nullcontext()
    decode = factor > 1
    side = vae.tile_latent_min_size if decode else vae.tile_sample_min_size
    if max(size) <= side or (vae.config.use_quant_conv and not decode):
        return nullcontext()
    step = int(side * (1 - vae.tile_overlap_factor))
    tiles = len(range(0, size[0], step)) * len(range(0, size[1], step))
    ratio = vae.tile_sample_min_size / vae.tile_latent_min_size
    if decode:
        return _shared(vae.decoder, tiles, ratio, vae.config.out_channels)
    return _shared(vae.encoder, tiles, 1 / ratio, 2 * vae.config.latent_channels)


@contextmanager
def _shared(module: nn.Module, tiles: int, scale: float, channels: int) -> Iterator[None]:
    """`module` called `tiles` times an image; `scale`: side of its output over that of its input.

    A tile goes to the process with the smallest area so far. To others it is memory that the last call fills: a
    transfer that waits for its sender would hold multiprocessors meanwhile.
    """
    rank, former = dist.get_rank(), module.forward
    areas = [0] * dist.get_world_size()
    outputs: list[tuple[int, Tensor]] = []

    def forward(x: Tensor) -> Tensor:
        owner = areas.index(min(areas))
        areas[owner] += x.shape[2] * x.shape[3]
        if owner == rank:
            output = former(x).contiguous()
        else:
            output = x.new_empty(x.shape[0], channels, round(x.shape[2] * scale), round(x.shape[3] * scale))
        outputs.append((owner, output))
        if len(outputs) == tiles:
            for work in [dist.broadcast(tile, src=source, async_op=True) for source, tile in outputs]:
                work.wait()
            outputs.clear()
            areas[:] = [0] * len(areas)
        return output

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        module.forward = former  # type: ignore[method-assign]


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `hires` with these arguments in `count` processes, as torchrun would; the exit code.

    The first process speaks; of the others what they say when they fail first. One that fails ends all.
    HiresError where there are fewer GPUs than processes.
    """
    found = torch.cuda.device_count()
    if found and count > found:
        raise HiresError(f"--gpus {count}: this machine shows {found}; allowed: up to {found}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "hires.cli", *arguments]
    with tempfile.TemporaryFile() as said:
        processes = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=said if rank else None,
                stderr=said if rank else None,
            )
            for rank in range(count)
        ]
        failed = None
        while failed is None and any(process.poll() is None for process in processes):
            time.sleep(0.05)
            failed = next((process for process in processes if process.poll()), None)
        grace = time.monotonic() + 5  # the same mistake ends all of them, and the first says it
        while failed is not None and processes[0].poll() is None and time.monotonic() < grace:
            time.sleep(0.05)
        if processes[0].returncode:
            failed = processes[0]
        for process in processes if failed else ():
            process.terminate()
        codes = [process.wait() for process in processes]
        if failed is not None and failed is not processes[0]:
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace"))
        return codes[0] if failed is None else abs(failed.returncode)
