"""What ran: the backend that took each operation, and how its kernels were launched."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Ran:
    """Filled while `watch` lasts; every entry stands once.

    Attributes:
        operations: operation -> backends that ran it, in order of appearance.
        launches: what a backend of our own kernels chose, as {"kernel": …, parameter: value}.
    """

    operations: dict[str, list[str]] = field(default_factory=dict)
    launches: list[dict[str, Any]] = field(default_factory=list)


_watchers: list[Ran] = []


@contextmanager
def watch() -> Iterator[Ran]:
    """Note which backends run, and how, until the block ends. What a CUDA graph replays is not seen."""
    ran = Ran()
    _watchers.append(ran)
    try:
        yield ran
    finally:
        _watchers.remove(ran)


def operation(name: str, backend: str) -> None:
    """A backend is about to run an operation."""
    for ran in _watchers:
        backends = ran.operations.setdefault(name, [])
        if backend not in backends:
            backends.append(backend)


def launched(kernel: str, **parameters: Any) -> None:
    """A kernel is about to be launched."""
    for ran in _watchers:
        entry = {"kernel": kernel, **parameters}
        if entry not in ran.launches:
            ran.launches.append(entry)
