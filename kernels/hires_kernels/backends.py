"""Which program runs an operation, and why another one can't.

A backend is a module with a function for each operation that it runs, which imports torch only (anything heavier
inside the functions), and one line in `BACKENDS`. Its check is what chooses it and what explains a refusal.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from hires_kernels import flex, fused, hopper, reference, sdpa
from hires_kernels.errors import KernelError


@dataclass(frozen=True)
class Problem:
    """What a backend's decision may depend on; for operations on images `head_dim` is the number of channels."""

    operation: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    needs_grad: bool = False
    own_patches: bool = False  # of another side than half the window's


@dataclass(frozen=True)
class Backend:
    """`refusal` gives the reason why the backend can't run a problem, None if it can."""

    module: ModuleType
    summary: str
    refusal: Callable[[Problem], str | None]


def _anything(problem: Problem) -> None:
    return None


def interpreted() -> bool:
    """Triton's own switch: kernels run line by line on the CPU, for tests. "auto" leaves them alone then."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed(name: str) -> bool:
    """Once for each process: a search takes as long as a launch."""
    return find_spec(name) is not None


ON_IMAGES = ("group_norm", "add_bias")  # any number of channels, no heads
OPERATIONS = ("neighborhood_patch_attention", "local_attention", "qk_norm_rope", *ON_IMAGES)
HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16)
PATCHES = "its query patches have half the window's side"


def _triton(problem: Problem) -> str | None:
    if not _installed("triton"):
        return "triton is not installed"
    if problem.device.type != "cuda" and not interpreted():
        return f"it needs a CUDA device, got {problem.device.type}"
    if problem.device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if problem.device.type == "cuda" and torch.cuda.get_device_capability(problem.device) < (8, 0):
        return f"it needs compute capability 8.0 or newer, got {torch.cuda.get_device_name(problem.device)}"
    float32_too = interpreted() or not problem.operation.endswith("attention")  # the others have no products
    if problem.dtype not in DTYPES and not (float32_too and problem.dtype == torch.float32):
        return f"it needs float16 or bfloat16, got {str(problem.dtype).removeprefix('torch.')}"
    if problem.dtype == torch.bfloat16 and interpreted() and problem.operation.endswith("attention"):
        return "Triton's interpreter has no bfloat16 products"
    if problem.operation not in ON_IMAGES and problem.head_dim not in HEAD_DIMS:
        return f"it needs head_dim {', '.join(map(str, HEAD_DIMS))}, got {problem.head_dim}"
    if problem.needs_grad and problem.operation != "local_attention":
        return "it has no backward pass"
    return None


def _gluon(problem: Problem) -> str | None:
    if problem.operation != "neighborhood_patch_attention":
        return "it runs neighborhood_patch_attention"
    if interpreted():
        return "Gluon has no interpreter"
    if (reason := _triton(problem)) is not None:
        return reason
    if torch.cuda.get_device_capability(problem.device) != (9, 0):
        return f"it needs compute capability 9.0 (Hopper), got {torch.cuda.get_device_name(problem.device)}"
    if problem.head_dim == 32:
        return "it needs head_dim 64, 128, got 32"
    return None


def _flex(problem: Problem) -> str | None:
    if not problem.operation.endswith("attention"):
        return "it runs neighborhood_patch_attention, local_attention"
    if problem.own_patches:
        return PATCHES
    if problem.device.type == "cuda" and problem.dtype not in (*DTYPES, torch.float32):
        return f"it needs float16, bfloat16 or float32, got {str(problem.dtype).removeprefix('torch.')}"
    if problem.device.type == "cuda" and problem.head_dim < 16:
        return f"it needs head_dim 16 or more, got {problem.head_dim}"
    return None


BACKENDS: dict[str, Backend] = {  # in order of preference
    "gluon": Backend(hopper, "fused kernels written out for Hopper", _gluon),
    "triton": Backend(fused, "fused Triton kernels", _triton),
    "sdpa": Backend(sdpa, "gathered windows, scaled_dot_product_attention", _anything),
    "reference": Backend(reference, "the definition, plain PyTorch", _anything),
    "flex": Backend(flex, "permuted tokens, FlexAttention: for comparison", _flex),
}


def explain(problem: Problem) -> dict[str, str | None]:
    """For every backend, in order of preference, why it can't run the problem; None if it can.

    "auto" takes the first that can. Raises KernelError for an unknown operation.
    """
    if problem.operation not in OPERATIONS:
        raise KernelError(f"unknown operation {problem.operation!r}: allowed: {', '.join(OPERATIONS)}")
    return {name: backend.refusal(problem) for name, backend in BACKENDS.items()}


def choose(name: str, problem: Problem) -> ModuleType:
    """The module of backend `name`, or for "auto" of the first that can run the problem.

    Raises KernelError when the name is unknown or the backend refuses.
    """
    refusals = explain(problem)
    if name == "auto":
        tests_only = ("triton",) if interpreted() else ()
        name = next(backend for backend, reason in refusals.items() if reason is None and backend not in tests_only)
    elif name not in refusals:
        raise KernelError(f"unknown backend {name!r}: allowed: auto, {', '.join(BACKENDS)}")
    elif refusals[name] is not None:
        able = ", ".join(backend for backend, reason in refusals.items() if reason is None)
        raise KernelError(f"backend {name!r} can't run {problem.operation}: {refusals[name]}; able: {able}")
    return BACKENDS[name].module
