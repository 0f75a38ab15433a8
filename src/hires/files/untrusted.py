"""Read what others wrote: pictures, YAML, JSON. Bounded in size, and one line for whatever is wrong with it."""

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from hires.errors import HiresError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")  # a decoder of these; Pillow has riskier ones
BROKEN = (  # what Pillow's decoders raise on broken files
    OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, MemoryError,
    NotImplementedError, struct.error, zlib.error,
)  # fmt: skip
YAML_BYTES = 1 << 20
YAML_NODES = 100_000  # aliases counted as often as they are used


def read_picture(source: Path | IO[bytes], name: object, upright: bool = False) -> "Image.Image":
    """A picture in RGB, 8 bits a channel; greyscale of 16 bits is scaled.

    Args:
        source: file, or its content.
        name: of the picture, for messages.
        upright: turn it as its EXIF data says.

    Raises:
        HiresError: of another format, broken, or larger than Pillow's limit against bombs (179 million pixels).
    """
    import numpy as np
    from PIL import Image, ImageOps

    with _decoding(name), Image.open(source, formats=FORMATS) as image:
        if image.mode in ("I", "F"):
            raise HiresError(f"{name}: 32 bits a pixel, whose range is not known: give 8 or 16 bits a channel")
        image.load()
        turned = ImageOps.exif_transpose(image) if upright else image
        if turned.mode.startswith("I;16"):
            turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
        return turned.convert("RGB")


def picture_size(source: Path | IO[bytes], name: object) -> tuple[int, int]:
    """(width, height) in pixels as the file states them, before any pixel is read; errors as `read_picture`."""
    from PIL import Image

    with _decoding(name), Image.open(source, formats=FORMATS) as image:
        return image.size


@contextmanager
def _decoding(name: object) -> Iterator[None]:
    from PIL import Image

    try:
        yield
    except HiresError:
        raise
    except Image.UnidentifiedImageError:
        raise HiresError(f"{name} can't be read (no image, or a broken one; allowed: {', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, *BROKEN) as error:
        raise HiresError(f"{name} can't be read ({getattr(error, 'strerror', None) or error})") from None


class _Loader(yaml.SafeLoader):
    """yaml.safe_load that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; HiresError where it is none, or unfolds to more than YAML_NODES values.

    OSError where the file can't be read.
    """
    with path.open("rb") as file:
        data = file.read(YAML_BYTES + 1)
    if len(data) > YAML_BYTES:
        raise HiresError(f"{path}: more than {YAML_BYTES >> 20} MiB: no configuration is so long")
    try:
        loader = _Loader(data.decode())
        root = loader.get_single_node()
        if root is None:
            return None
        _count(root, {}, path)
        return loader.construct_document(root)
    except HiresError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise HiresError(f"{path}, line {line}: {error.problem}; the file must be YAML") from None
    except UnicodeDecodeError as error:
        raise HiresError(f"{path} can't be read as UTF-8 ({error}): convert it") from None
    except RecursionError:
        raise HiresError(f"{path}: nested too deep") from None
    except Exception as error:  # a scalar that isn't what its tag says raises anything
        raise HiresError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _count(node: yaml.Node, counts: dict[int, int], path: Path) -> int:
    """How many values a node unfolds to."""
    if id(node) not in counts:
        counts[id(node)] = YAML_NODES  # until it is known: a node within itself has no end
        inner = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        counts[id(node)] = 1 + sum(_count(part, counts, path) for part in inner)
    if counts[id(node)] > YAML_NODES:
        raise HiresError(f"{path}: its aliases unfold to more than {YAML_NODES} values, or into themselves")
    return counts[id(node)]


def member(folder: Path, name: object) -> Path:
    """`folder`/`name`; HiresError unless that is a file in the folder itself."""
    if not isinstance(name, str) or name in ("", "..") or "\0" in name or Path(name).name != name:
        raise HiresError(f"{name!r} is not the name of a file in {folder}")
    return folder / name


def parse_json(data: str | bytes) -> Any:
    """The value of a JSON text; ValueError where it is none, also where it is nested too deep."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_hints(folder: Path) -> dict[str, Any]:
    """What `hires.json` in a model folder says about its training size, size rule and sampling; {} without one."""
    path = folder / "hires.json"
    if not path.is_file():
        return {}
    hints = read_table(path)
    for name in ("base_resolution", "size_multiple"):
        if not (isinstance(hints.get(name, 1), int) and hints.get(name, 1) > 0):
            raise HiresError(f"{path}: {name} = {hints[name]!r}: give a number of pixels")
    if not isinstance(hints.get("sampling", {}), dict):
        raise HiresError(f"{path}: sampling = {hints['sampling']!r}: give a table of settings")
    return hints


def read_table(path: Path) -> dict[str, Any]:
    """The table in a model folder's JSON file; HiresError where it holds none."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise HiresError(f"{path} is not JSON ({error}): fetch the model again") from None
    if not isinstance(value, dict):
        raise HiresError(f"{path} holds no table of names and values: fetch the model again")
    return value
