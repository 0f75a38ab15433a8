"""Compile the kernels of neighborhood patch attention and of images for sm_90, no GPU needed; a line for each.

Run it alone, without TRITON_INTERPRET: `python tests/compile_for_hopper.py`.
"""

import json
import re
import subprocess
import tempfile
from types import SimpleNamespace

import torch
import triton
from hires_kernels import launches
from hires_kernels.fused import images, npa
from hires_kernels.hopper import npa as hopper
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

HOPPER = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_device_interface=lambda: torch.cuda,
)
CASES = {  # grid, window, text tokens, heads, head dim, dtype, rows of the grid that are run
    "FLUX": ((128, 128), (64, 64), 512, 24, 128, torch.bfloat16, None),
    "FLUX, ragged": ((100, 130), (52, 76), 77, 24, 128, torch.bfloat16, None),
    "FLUX, edge of a band": ((64, 128), (64, 64), 512, 24, 128, torch.bfloat16, (0, 32)),
    "SDXL": ((128, 128), (64, 64), None, 10, 64, torch.float16, None),
}


def figures(kernel):
    """What ptxas says of a kernel."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        ptxas = triton.knobs.nvidia.ptxas.path
        log = subprocess.run(
            [ptxas, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    found = {name: int(re.search(rf"(\d+) {words}", log)[1]) for name, words in WORDS.items()}
    return found | {
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "tma": kernel.asm["ptx"].count("cp.async.bulk.tensor"),
        "serialised": "serialized" in log,
        "stale": len(stale_bounds(kernel.asm["ttgir"])),
    }


def stale_bounds(ttgir):
    """Bounds of loops within loops that were computed before the outer one, though they are tensors of its own.

    Triton 3.6 takes an argument of a loop for dead where nothing but an inner loop's bound uses it, and keeps its first
    value. Bounds that are arguments of the kernel are meant so.
    """
    found, around = [], []  # [indentation, names that are computed within]
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while around and indent <= around[-1][0] and line.strip():
            around.pop()
        loop = re.search(r"scf\.for %\S+ = \S+ to (%\S+) step", line)
        if loop and around and loop[1].split("#")[0] not in around[-1][1]:
            found.append(loop[1])
        for _, names in around:
            names.update(re.findall(r"(%\w+)(?::\d+)? =", line))
        if loop:
            around.append((indent, set(re.findall(r"(%\w+) = ", line.split("iter_args")[-1]))))
    return found


WORDS = {"registers": "registers", "spills": "bytes spill stores"}


def main():
    triton.runtime.driver.set_active(HOPPER)
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=132)
    torch.cuda.get_device_capability = lambda _: (9, 0)
    npa.launch = lambda query: npa.Launch(**launches.launch("npa_triton", query.shape[-1], query.device))
    npa.programs = lambda *_: 132
    compiled = []
    run = JITFunction.run

    def compile_only(self, *arguments, warmup, **options):
        compiled.append((self, run(self, *arguments, warmup=True, **options)))

    JITFunction.run = compile_only
    for case, (grid, window, text_tokens, heads, dim, dtype, rows) in CASES.items():
        tokens = grid[0] * grid[1]
        image = torch.empty(1, tokens, 3, heads, dim, dtype=dtype).unbind(2)
        text = None if text_tokens is None else torch.empty(1, text_tokens, 3, heads, dim, dtype=dtype).unbind(2)
        rope = (torch.empty(tokens, dim),) * 2
        for backend, attend in (("triton", npa.attend), ("gluon", hopper.attend)):
            compiled.clear()
            npa.neighborhood_patch_attention(
                *image, grid=grid, window=window, text=text, rope=rope, shift=None, text_rows="patch", scale=0.1,
                rows=rows, run=attend,
            )  # fmt: skip
            kernels = [kernel for function, kernel in compiled if function.__name__ == "_attend"]
            for name, kernel in zip((backend, "gluon, again"), kernels):
                print(json.dumps({"case": case, "backend": name} | figures(kernel)))
    for channels, dtype in ((128, torch.bfloat16), (512, torch.bfloat16), (256, torch.float32), (24, torch.float16)):
        compiled.clear()
        x, values = torch.empty(1, channels, 64, 64, dtype=dtype), torch.empty(channels, dtype=dtype)
        images.group_norm(
            x, groups=8 if channels == 24 else 32, weight=values, bias=values, eps=1e-6, silu=True, shift=values
        )
        images.add_bias(x, x, bias=values)
        for function, kernel in compiled:
            case = f"{channels} channels, {dtype}"
            print(json.dumps({"case": case, "kernel": function.__name__} | figures(kernel)))


if __name__ == "__main__":
    main()
