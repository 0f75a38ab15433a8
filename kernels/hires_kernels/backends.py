"""Which program runs an operation, and why another one can't.

A backend is a module with the functions `neighborhood_patch_attention` and `local_attention`, which imports torch
only (anything heavier inside the functions), and one line in `BACKENDS`. Its check is what chooses it and what
explains a refusal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from hires_kernels import reference, sdpa
from hires_kernels.errors import KernelError


@dataclass(frozen=True)
class Problem:
    """What a backend's decision may depend on."""

    operation: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    needs_grad: bool = False


@dataclass(frozen=True)
class Backend:
    """`refusal` gives the reason why the backend can't run a problem, None if it can."""

    module: ModuleType
    summary: str
    refusal: Callable[[Problem], str | None]


def _anything(problem: Problem) -> None:
    return None


BACKENDS: dict[str, Backend] = {  # in order of preference
    "sdpa": Backend(sdpa, "gathered windows, scaled_dot_product_attention", _anything),
    "reference": Backend(reference, "the definition, plain PyTorch", _anything),
}


def explain(problem: Problem) -> dict[str, str | None]:
    """For every backend, in order of preference, why it can't run the problem; None if it can."""
    return {name: backend.refusal(problem) for name, backend in BACKENDS.items()}


def choose(name: str, problem: Problem) -> ModuleType:
    """The module of backend `name`, or for "auto" of the first that can run the problem.

    Raises KernelError when the name is unknown or the backend refuses.
    """
    refusals = explain(problem)
    if name == "auto":
        name = next(backend for backend, reason in refusals.items() if reason is None)
    elif name not in refusals:
        raise KernelError(f"unknown backend {name!r}: allowed: auto, {', '.join(BACKENDS)}")
    elif refusals[name] is not None:
        able = ", ".join(backend for backend, reason in refusals.items() if reason is None)
        raise KernelError(f"backend {name!r} can't run {problem.operation}: {refusals[name]}; able: {able}")
    return BACKENDS[name].module
