"""The record that an image file carries: read, told in words, and carried out once more.

`hires generate` records everything (`hires.generation.Request`). The images stage records what tells an image from the
others of its configuration, which says the rest.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, ValidationError

from hires import __version__
from hires.additions import NOTHING, Additions, AdditionsRecord
from hires.config import Config
from hires.errors import HiresError, first_mistake, printable
from hires.files.storage import replacing, sha256
from hires.files.untrusted import BROKEN, FORMATS, parse_json, read_picture
from hires.settings import Sampling
from hires.variants import Variant, variant

if TYPE_CHECKING:
    from hires.backbones import Backbone
    from hires.cascade import Callback

IMAGE_DESCRIPTION = 270  # TIFF tag
PLACE = ("study", "setting", "backbone")  # what only the images stage records


class Picture(BaseModel):
    """Your own picture, in the place of the base image."""

    file: str
    sha256: str


class Recipe(BaseModel):
    """All that an image is a function of. Sides are pixels; `sampling` states every setting.

    `additions`: LoRAs, ControlNets and IP-Adapters with their images, and a crop.
    `adapters`: the LoRAs that acted, name -> digest (`additions.adapters.adapter_digests`); older records have none.
    `places`: where a configuration says that LoRAs of variants lie.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    revision: str | None
    dtype: str
    prompt: str
    seed: int
    variant: str | None
    variant_fields: Variant
    height: int
    width: int
    strength: float | None
    image: Picture | None
    sampling: Sampling
    versions: dict[str, str]
    additions: AdditionsRecord | None = None
    adapters: dict[str, str] = {}
    places: dict[str, Path] = {}


RECORDED = [name for name, field in Recipe.model_fields.items() if field.is_required()]
KNOWN = [*RECORDED, "additions", "adapters", "stage"]


def read(path: Path) -> dict[str, Any]:
    """The record in a PNG (text chunk `parameters`) or TIFF (tag ImageDescription); HiresError where there is none."""
    if not path.is_file():
        raise HiresError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give a PNG or TIFF file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            kind = image.format
            text = image.getexif().get(IMAGE_DESCRIPTION) if kind == "TIFF" else image.info.get("parameters")
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise HiresError(f"{path}: {_reason(error)}; give a PNG or TIFF file") from None
    if kind not in ("PNG", "TIFF"):
        raise HiresError(f"{path}: a {kind} file carries no record; give the PNG or TIFF that hires wrote")
    try:
        record = parse_json(text or "")
    except ValueError:
        record = None
    if not isinstance(record, dict):
        lack = "metadata of another program" if text else "no metadata"
        raise HiresError(f"{path}: {lack}: only files that hires wrote, and no program saved since, carry a record")
    return record


def save(image: Image.Image, path: str | Path) -> None:
    """Write an image of `hires.generate` as a PNG that carries its record, as the command line's do.

    PIL's own `image.save` leaves the record out. HiresError for another format, and for an image without a record.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise HiresError(f"{path}: only PNG carries the parameters: give a name that ends with .png")
    if "parameters" not in image.info:
        raise HiresError(f"{path}: this image has no record (image.info['parameters']): only hires.generate's have one")
    text = PngInfo()
    text.add_text("parameters", image.info["parameters"])
    with replacing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=text)


def describe(record: Mapping[str, Any]) -> str:
    """The record as an aligned list; what is null is left out."""
    lines = []
    for name, value in record.items():
        if isinstance(value, dict) and value:
            lines += [printable(name), *(f"  {line}" for line in _aligned(value))]
        elif value not in (None, {}):
            lines += _aligned({name: value})
    return "\n".join(lines)


def _aligned(values: Mapping[str, Any], width: int = 14) -> list[str]:
    width = max(width, *(len(name) for name in values))
    return [f"{printable(name):<{width}}  {_text(value)}" for name, value in values.items() if value is not None]


def _text(value: Any) -> str:
    """Text as it stands, unless it is empty or would move the cursor."""
    return value if isinstance(value, str) and value and value.isprintable() else json.dumps(value)


def configuration(path: Path) -> Path | None:
    """The configuration of the results folder that an image of the images stage lies in, if it lies in one."""
    folders = path.resolve().parents[6:7]  # <results>/images/<study>/<setting>/<backbone>/<variant>/<size>/<file>
    stored = [folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()]
    return stored[0] if stored else None


def recipe(record: Mapping[str, Any], config: Config | None = None) -> Recipe:
    """What a record says, complete and checked.

    `config`: for a record of the images stage, which names a backbone and a variant of it. HiresError where the record
    is another version's, with a field too few or too many, or doesn't agree with the configuration.
    """
    places: dict[str, str] = {}
    given = record.get("additions")
    if isinstance(given, dict) and "in_memory" in given:
        told = ", ".join(map(str, given["in_memory"])) if isinstance(given["in_memory"], dict) else "more"
        raise HiresError(f"made in Python with {printable(told)}, which isn't in the image: call hires.generate again")
    if "study" in record:
        record, places = _completed(record, config)
    maker = record.get("versions") or {}
    version = maker.get("hires") if isinstance(maker, dict) else None
    _match(record, RECORDED, "", version, KNOWN)
    for part, fields in (("sampling", Sampling.model_fields), ("variant_fields", Variant.model_fields)):
        if isinstance(record[part], dict):
            _match(record[part], fields, f"{part}.", version, fields)
    try:
        return Recipe.model_validate({**record, "places": places})
    except ValidationError as error:
        name, given, reason = first_mistake(error)
        raise HiresError(f"the record's {name} = {given!r}: {reason}") from None


def _match(
    given: Mapping[str, Any], needed: Iterable[str], place: str, version: str | None, known: Iterable[str]
) -> None:
    """HiresError unless `given` has every needed name and, what isn't empty, known ones only."""
    lacking = [place + name for name in needed if name not in given]
    new = [place + name for name, value in given.items() if name not in known and value]
    if lacking or new:
        what = f"lacks {', '.join(lacking)}" if lacking else f"states {', '.join(new)}, unknown here"
        raise HiresError(
            f"the record {what}: hires {version or 'of another version'} wrote it, this is {__version__}: "
            "make the image again with the version that wrote it"
        )


def _completed(record: Mapping[str, Any], config: Config | None) -> tuple[dict[str, Any], dict[str, str]]:
    """A record of the images stage with what its configuration says beside it, and where adapters lie."""
    _match(record, (*PLACE, "variant", "sampling", "model"), "", None, {*PLACE, *KNOWN})
    for name in ("study", "backbone", "variant", "model"):
        if not isinstance(record[name], str):
            raise HiresError(f"the record's {name} = {record[name]!r}: must be a name")
    if not isinstance(record["sampling"], Mapping):
        raise HiresError(f"the record's sampling = {record['sampling']!r}: must be a table of settings")
    if config is None:
        raise HiresError(
            f"the image was made by a configuration, as study {record['study']!r}, backbone {record['backbone']!r}: "
            "give its file with --config, or the image where it lay in results/"
        )
    entry = config.backbones.get(record["backbone"])
    if entry is None or entry.model != record["model"]:
        raise HiresError(
            f"configuration {config.name!r} has no backbone {record['backbone']!r} of model {record['model']!r}: give "
            "the configuration that made the image with --config"
        )
    fields = variant(record["variant"], config.variants()).model_dump()
    completed = {
        **{name: value for name, value in record.items() if name not in PLACE},
        "dtype": entry.dtype,
        "variant_fields": fields,
        "strength": None,
        "image": None,
        "sampling": {**Sampling().model_dump(), **record["sampling"]},
        "versions": {},
    }
    return completed, entry.adapters


def own_picture(recipe: Recipe, path: Path | None) -> Image.Image | None:
    """The picture that took the base image's place, from `path`; HiresError unless it is the recorded one, or none."""
    if recipe.image is None:
        if path is not None:
            raise HiresError(f"--image {path}: the record names no picture: leave it out")
        return None
    if path is None:
        raise HiresError(
            f"made from a picture, {recipe.image.file!r} with sha256 {recipe.image.sha256}: give it with --image"
        )
    try:
        found = sha256(path)
        if found != recipe.image.sha256:
            raise HiresError(f"--image {path}: sha256 {found}, but the record says {recipe.image.sha256}")
    except OSError as error:
        raise HiresError(f"--image {path}: {_reason(error)}") from None
    return read_picture(path, f"--image {path}")


def load(
    recipe: Recipe, model: str | None = None, device: str | None = None, additions: Additions = NOTHING
) -> "Backbone":
    """The recorded model, or the same one from elsewhere (`model`), with what was added.

    HiresError where it isn't found, or differs in its weights or in defaults that shaped the image.
    """
    from hires import backbones

    if recipe.revision is None:
        raise HiresError("the record names no revision: the image was made from a pipeline in memory, not from a model")
    weights = "random" if recipe.revision == "random" else "pretrained"
    backbone = backbones.load(model or recipe.model, device, recipe.dtype, weights, prepare=additions.add)  # type: ignore[arg-type]
    backbone.adapters = recipe.places
    if backbone.revision != recipe.revision:
        raise HiresError(
            f"model {backbone.name!r} is revision {backbone.revision} here, but the record says {recipe.revision}: "
            "give the folder of that revision with --model (hf download MODEL --revision REVISION prints it)"
        )
    _same_adapters(recipe, backbone)
    recorded, now = recipe.sampling.model_dump(), recipe.sampling.over(backbone.defaults).model_dump()
    for name, value in now.items():
        if value != recorded[name]:
            raise HiresError(
                f"setting {name}: the record states none, and model {backbone.name!r} has {value!r} as its default now"
            )
    return backbone


def _same_adapters(recipe: Recipe, backbone: "Backbone") -> None:
    """HiresError unless the LoRAs that would act now are the recorded ones."""
    from hires.additions.adapters import adapter_digests

    needed = recipe.variant_fields.adapter
    if needed:
        backbone.require_adapter(needed)
    found = adapter_digests(backbone.pipe, needed)
    for name in sorted({*found, *recipe.adapters}):
        if name not in recipe.adapters:
            raise HiresError(
                f"the record names no digest of adapter {name!r}, which an older hires left out: it can't be told "
                "whether the one here is the same; make the image again"
            )
        if name not in found:
            raise HiresError(f"made with the LoRA {name!r}, digest {recipe.adapters[name]}, which isn't loaded here")
        if found[name] != recipe.adapters[name]:
            raise HiresError(
                f"adapter {name!r} is {found[name]} here, but the record says {recipe.adapters[name]}: "
                "put the recorded one back"
            )


def make(
    recipe: Recipe,
    backbone: "Backbone",
    picture: Image.Image | None = None,
    callback: "Callback | None" = None,
    additions: Additions = NOTHING,
) -> tuple[Image.Image, dict[str, Any]]:
    """The image once more, and its record of now. A stage on the way is the last one of a run to its own size."""
    from hires.generation import Request

    prompts, seeds = [recipe.prompt], [recipe.seed]
    request = Request(
        backbone, recipe.variant_fields, recipe.height, recipe.width, recipe.sampling, picture, recipe.strength,
        additions.extras(), additions.crop,
    )  # fmt: skip
    *_, stage = request.stages(prompts, seeds, callback)
    own = recipe.image.model_dump() if recipe.image else None
    (image,) = request.images(stage, prompts, seeds, own, additions.record())
    return image, {**json.loads(image.info["parameters"]), "variant": recipe.variant}


def compare(former: Image.Image, image: Image.Image) -> str:
    """In words, whether two images have the same pixels; "the same pixels" only if all are."""
    import numpy as np

    if former.size != image.size:
        return "another size"
    one, two = (np.asarray(picture.convert("RGB"), dtype=int) for picture in (former, image))
    distance = np.abs(one - two)
    if not distance.any():
        return SAME
    share = (distance.max(axis=2) > 0).mean()
    return f"{share:.2%} of the pixels differ, by at most {distance.max()} of 255"


SAME = "the same pixels"


def _reason(error: Exception) -> str:
    """Why a file can't be read, without its name."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image, or a broken one"
    return getattr(error, "strerror", None) or str(error)
