"""One kind of error for everything a user can mend: one line, exit code 2, no traceback."""

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    M = TypeVar("M", bound=BaseModel)

LONGEST = 2000  # characters of a message
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # environment
_SECRETS = (  # what goes before a secret, and the secret
    re.compile(r"()\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"(\bBearer\s+)[^\s'\"]+", re.IGNORECASE),
    re.compile(r"(://)[^/?#\s'\"]+(?=@)"),
    re.compile(
        r"([?&](?:[\w.-]*(?:token|signature|secret|password|credential)|sig|(?:api[_-]?)?key)=)[^&#\s'\"]+",
        re.IGNORECASE,
    ),
)


class HiresError(ValueError):
    """Bad input. The message says what was given, what is allowed and how to mend it, in one line.

    Whatever was given is shown without secrets, line breaks and characters that steer a terminal, and cut short.
    """

    def __init__(self, message: object):
        text = printable(redacted(str(message)))
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}")


def unknown(kind: str, given: object, allowed: Iterable[str]) -> HiresError:
    """The error for a name that is not in `allowed`, naming the nearest right one."""
    names = sorted(allowed)
    near = get_close_matches(str(given)[:100], names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return HiresError(f"unknown {kind} {given!r}: {hint}allowed: {', '.join(names)}")


def first_mistake(error: "ValidationError") -> tuple[str, Any, str]:
    """Of pydantic's first complaint: the place, as "sampling.tau", what was given there, and why it is refused."""
    first = error.errors(include_url=False)[0]
    return ".".join(map(str, first["loc"])), first["input"], first["msg"][0].lower() + first["msg"][1:]


def validated(kind: "type[M]", what: str, fields: Mapping[str, Any]) -> "M":
    """`kind(**fields)` of a typed model; HiresError tells a wrong name or value of `what`, such as "setting"."""
    from pydantic import ValidationError

    for name in fields:
        if name not in kind.model_fields:
            raise unknown(what, name, kind.model_fields)
    try:
        return kind(**fields)
    except ValidationError as error:
        place, given, reason = first_mistake(error)
        raise HiresError(f"{what} {place} = {given!r}: {reason}") from None


def redacted(text: str) -> str:
    """`text` with … for Hugging Face tokens, bearer tokens, and the credentials and signatures of web addresses."""
    for name in TOKENS:
        if len(token := os.environ.get(name, "")) >= 8:
            text = text.replace(token, "…")
    for secret in _SECRETS:
        text = secret.sub(r"\1…", text)
    return text


def printable(text: str) -> str:
    """`text` on one line, control characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c == "\n" else ascii(c)[1:-1] for c in text)
