"""Read a configuration: YAML, `extends`, overrides, and one line for the first mistake in it."""

import re
import types
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from hires.config.model import HINTS, Config, Section, at
from hires.errors import HiresError, redacted, unknown
from hires.files.untrusted import read_yaml

Root = TypeVar("Root", bound=Section)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, merge (`extends`, then `overrides`) and validate a configuration.

    What is merged into a section with fixed keys replaces single keys; tables of your own names (backbones, variants,
    studies, notebooks) and lists are replaced as a whole. HiresError, one line, for anything that isn't right.
    """
    return load_section(path, Config, overrides)


def load_section(path: str | Path, model: type[Root], overrides: Mapping[str, Any] | None = None) -> Root:
    """`load_config` for a YAML file of any kind; `extends` is for kinds that have the key."""
    data = _merge(_read(Path(path), (), model), overrides or {}, model)
    _check_secrets(data)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise HiresError(f"{path}: {_one_line(error, model)}") from None


def _check_secrets(value: Any) -> None:
    """A configuration is stored beside its results and shown in the report."""
    if isinstance(value, Mapping | list):
        for part in (*value, *value.values()) if isinstance(value, Mapping) else value:
            _check_secrets(part)
    elif isinstance(value, str) and redacted(value) != value:
        raise HiresError(f"{value!r}: a token or password has no place in a configuration: use hf auth login")


def _read(path: Path, chain: tuple[Path, ...], model: type[Section]) -> dict[str, Any]:
    try:
        here = path.resolve()
        if here in chain:
            raise HiresError(f"{path}: extends itself, by way of {chain[-1].name}")
        data = read_yaml(path)
    except HiresError:
        raise
    except FileNotFoundError:
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "no .yaml files"
        named = f" (named by extends in {chain[-1].name})" if chain else ""
        raise HiresError(f"configuration {path}{named} does not exist; {path.parent} holds: {others}") from None
    except (OSError, ValueError, RuntimeError) as error:  # a name that can't be one, links in a circle
        raise HiresError(f"configuration {path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(data, dict):
        given = "empty" if data is None else f"a {type(data).__name__}"
        raise HiresError(f"{path}: must be a mapping of keys ({', '.join(_keys(model))}), but it is {given}")
    if "extends" in model.model_fields and isinstance(data.get("extends"), str):
        data = _merge(_read(path.parent / data["extends"], (*chain, here), model), data, model)
    return data


def _merge(base: Mapping[str, Any], edit: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in edit.items():
        section: Any = _keys(model).get(key)
        mappings = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        if mappings and isinstance(section, type) and issubclass(section, Section):
            value = _merge(base[key], value, section)
        merged[key] = value
    return merged


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    """Key as written in YAML -> type."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _one_line(error: ValidationError, root: type[Section]) -> str:
    """The first mistake in a validation error, in our words."""
    mistakes = error.errors(include_url=False)
    first, more = mistakes[0], len(mistakes) - 1
    names = [str(part) for part in first["loc"] if part != "[key]"]
    place, given, kind = ".".join(names), first["input"], first["type"]
    shown = "null" if given is None else repr(given)
    if kind == "extra_forbidden":
        allowed = _keys(_model_at(names[:-1], root))
        text = str(at(place, unknown("key", names[-1], allowed)))
    elif kind == "missing":
        text = f"{place}: missing; {_description(names, root)}"
    elif kind == "value_error":
        cause = first["ctx"]["error"]
        text = f"{place}: {cause}" if place else str(cause)
    elif kind == "literal_error":
        text = f"{place} = {shown}: {_nearest(given, first['ctx']['expected'])}"
    elif kind == "string_pattern_mismatch":
        text = f"{place} = {shown}: write {HINTS[first['ctx']['pattern']]}"
    elif kind in ("model_type", "dict_type", "model_attributes_type"):
        text = f"{place} = {shown}: must be a mapping, key: value"
    elif kind == "too_short":
        text = f"{place}: must not be empty; {_description(names, root)}"
    elif kind == "string_type":
        text = f"{place} = {shown}: must be text; quote it: {str(given)!r}"
    else:
        text = f"{place} = {shown}: {first['msg'][0].lower()}{first['msg'][1:]} ({_description(names, root)})"
    return text + (f" (and {more} more mistake{'s' * (more > 1)})" if more else "")


def _nearest(given: Any, expected: str) -> str:
    near = get_close_matches(str(given), re.findall(r"'([^']*)'", expected), n=1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"allowed: {expected.replace(chr(39), '')}"


def _walk(names: Iterable[str], root: type[Section]) -> Iterator[tuple[Any, str]]:
    """(type, description) at each step from the root along the names of a place."""
    here: Any = root
    for name in names:
        here = plain(here)
        if isinstance(here, type) and issubclass(here, BaseModel):
            fields = {field.alias or key: field for key, field in here.model_fields.items()}
            if name not in fields:
                return
            here, description = fields[name].annotation, fields[name].description or ""
        else:
            here, description = (get_args(here) or (Any,))[-1], ""
        yield here, description


def _model_at(names: list[str], root: type[Section]) -> type[BaseModel]:
    return plain([root, *(kind for kind, _ in _walk(names, root))][-1])


def _description(names: list[str], root: type[Section]) -> str:
    return next((text for _, text in reversed(list(_walk(names, root))) if text), "")


def plain(kind: Any) -> Any:
    """Without Annotated and None."""
    while get_origin(kind) is Annotated or get_origin(kind) in (Union, types.UnionType):
        kind = next(k for k in get_args(kind) if k is not type(None))
    return kind
