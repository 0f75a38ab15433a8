"""The configuration's keys for people and editors: the table in config/README.md, and config/schema.json.

`python -m hires.config` writes both; a test fails when they are behind.
"""

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from hires.config.model import SIZE, Config
from hires.config.reading import plain
from hires.files.blocks import with_block
from hires.settings import Sampling
from hires.variants import Variant


def json_schema() -> str:
    """The configuration's JSON schema, for editors."""
    schema = Config.model_json_schema(by_alias=True)
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def key_table() -> str:
    """The Markdown table of all keys for config/README.md."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in _rows(Config, "")]
    return "\n".join(lines) + "\n"


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        key, kind = prefix + (field.alias or name), plain(field.annotation)
        inner = plain(get_args(kind)[-1]) if get_origin(kind) is dict else kind
        nested = isinstance(inner, type) and issubclass(inner, BaseModel)
        default = "required" if field.is_required() else "" if nested or get_origin(kind) is dict else _yaml(field)
        yield f"`{key}`", type_name(field.annotation), default, field.description or ""
        if nested and inner not in (Sampling, Variant):
            yield from _rows(inner, f"{key}.{'<name>.' if inner is not kind else ''}")
    if prefix == "":
        yield from _rows(Sampling, "<sampling>.")
        yield from _rows(Variant, "<variant>.")


def _yaml(field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    return f"`{'null' if default is None else json.dumps(default, ensure_ascii=False)}`"


def type_name(kind: Any) -> str:
    """A field's type in words: "integer or null", or the values that it may have."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(type_name(k) for k in get_args(kind))
    kind = plain(kind)
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"list of {type_name(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        key, value = get_args(kind)
        named = {f"^{SIZE}$": "size"}.get(next((m.pattern for m in getattr(key, "__metadata__", ())), ""), "name")
        return f"{named} → {type_name(value)}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {"Sampling": "sampling", "Variant": "variant"}.get(kind.__name__, "section")
    return {str: "text", int: "integer", float: "number", bool: "true, false", type(None): "null"}.get(kind, "value")


def with_key_table(readme: str) -> str:
    """config/README.md with its table of keys brought up to date."""
    return with_block(readme, "keys", key_table())


def main(folder: Path = Path("config")) -> None:
    """Write config/schema.json and the table of keys in config/README.md."""
    readme = folder / "README.md"
    (folder / "schema.json").write_text(json_schema(), encoding="utf-8")
    readme.write_text(with_key_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
