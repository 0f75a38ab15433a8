"""One kind of error for everything a user can mend: one line, exit code 2, no traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class HiresError(ValueError):
    """Bad input. The message says what was given, what is allowed and how to mend it, in one line."""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> HiresError:
    """The error for a name that is not in `allowed`, naming the nearest right one."""
    names = sorted(allowed)
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return HiresError(f"unknown {kind} {given!r}: {hint}allowed: {', '.join(names)}")
