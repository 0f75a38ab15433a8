"""What a command adds to a model and a prompt: LoRAs, ControlNets, IP-Adapters and the images for them, all as files.

`hires.additions.extras.Extras` holds what a call in Python adds: images in memory, for what its pipeline has loaded.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from hires.errors import HiresError
from hires.files.storage import sha256
from hires.files.untrusted import read_picture

if TYPE_CHECKING:
    from hires.additions.extras import Extras
    from hires.backbones import Backbone


CONTROL_SETTINGS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "control_mode")


class Part(BaseModel):
    """A file, or a folder of weights, in a record."""

    file: str
    sha256: str


class LoraPart(Part):
    """A LoRA in a record."""

    weight: float


class NetPart(BaseModel):
    """A ControlNet in a record."""

    source: str
    sha256: str


class AdditionsRecord(BaseModel):
    """What a record says of `Additions`. Records of older versions lack digests, without which nothing is found."""

    model_config = ConfigDict(extra="forbid")

    loras: list[LoraPart] = []
    controlnets: list[NetPart] = []
    control_images: list[Part] = []
    controlnet_conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0
    control_mode: int | None = None
    ip_adapters: list[Part] = []
    image_encoder: Part | None = None
    ip_adapter_scale: float = 1.0
    ip_adapter_images: list[Part] = []
    crop: bool = False

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.ip_adapters and self.image_encoder is None:
            raise ValueError("an IP-Adapter without its image encoder")
        return self


@dataclass(frozen=True)
class Additions:
    """LoRAs with their weights, ControlNets (folder or hub id) and IP-Adapters (file), each with its images.

    `lora_names`: file names that name the LoRAs on the model, their own by default.
    """

    loras: Sequence[tuple[Path, float]] = ()
    lora_names: Sequence[str] = ()
    controlnets: Sequence[str] = ()
    control_images: Sequence[Path] = ()
    controlnet_conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0
    control_mode: int | None = None
    ip_adapters: Sequence[Path] = ()
    image_encoder: Path | None = None
    ip_adapter_scale: float = 1.0
    ip_adapter_images: Sequence[Path] = ()
    crop: bool = False

    @classmethod
    def found(cls, record: AdditionsRecord, files: Sequence[Path]) -> Self:
        """What a record names, each known by its digest among `files` and folders, whatever its name is now.

        A ControlNet may also be where it was. HiresError names what is missing, and what the record doesn't know.
        """
        digests = {digest: path for path in files for digest in _digests(path)}
        places = dict(digests)
        for net in record.controlnets:
            if net.sha256 not in digests:
                with suppress(HiresError):  # it isn't there any more
                    if _weights_digest(folder := _folder(net.source)) == net.sha256:
                        places[net.sha256] = folder
        encoder = [record.image_encoder] if record.image_encoder else []
        named = [*record.loras, *record.control_images, *record.ip_adapters, *encoder, *record.ip_adapter_images]
        needed = {part.sha256: part.file for part in named} | {net.sha256: net.source for net in record.controlnets}
        if missing := [f"{name!r} with sha256 {digest}" for digest, name in needed.items() if digest not in places]:
            raise HiresError(f"made with {', '.join(missing)}, not in the image: give --with PATH for each")
        for path in files:
            if not needed.keys() & _digests(path):
                raise HiresError(f"--with {path}: the record names nothing of its sha256, {min(_digests(path))}")
        return cls(
            loras=[(places[lora.sha256], lora.weight) for lora in record.loras],
            lora_names=[lora.file for lora in record.loras],
            controlnets=[str(places[net.sha256]) for net in record.controlnets],
            control_images=[places[part.sha256] for part in record.control_images],
            controlnet_conditioning_scale=record.controlnet_conditioning_scale,
            control_guidance_start=record.control_guidance_start,
            control_guidance_end=record.control_guidance_end,
            control_mode=record.control_mode,
            ip_adapters=[places[part.sha256] for part in record.ip_adapters],
            image_encoder=places[encoder[0].sha256] if encoder else None,
            ip_adapter_scale=record.ip_adapter_scale,
            ip_adapter_images=[places[part.sha256] for part in record.ip_adapter_images],
            crop=record.crop,
        )

    def check(self) -> None:
        """HiresError for what is missing or can't be read; nothing heavy is imported."""
        for flag, files, acts_on, there in (
            ("--control-image", self.control_images, "--controlnet", self.controlnets),
            ("--ip-adapter-image", self.ip_adapter_images, "--ip-adapter", self.ip_adapters),
        ):
            for file in files:
                read_picture(file, f"{flag} {file}")
                if not there:
                    raise HiresError(f"{flag} {file}: acts on {acts_on}, of which there is none: name one")
        for acts_on, there, names in (
            ("--controlnet", self.controlnets, CONTROL_SETTINGS),
            ("--ip-adapter", self.ip_adapters, ("image_encoder", "ip_adapter_scale")),
        ):
            for name in names:
                given = getattr(self, name)
                if given != getattr(Additions, name) and not there:
                    flag = name.replace("_", "-")
                    raise HiresError(f"--{flag} {given}: acts on {acts_on}, of which there is none: leave it out")
        if self.ip_adapters and self.image_encoder is None:
            raise HiresError("--ip-adapter: its image encoder is another folder: name it with --image-encoder")
        for file in self.ip_adapters:
            if file.suffix != ".safetensors" or not file.is_file():
                raise HiresError(f"--ip-adapter {file}: give a safetensors file")

    def extras(self) -> "Extras":
        """The images, and how they act."""
        from hires.additions.extras import Extras

        return Extras(
            control_image=[read_picture(file, file) for file in self.control_images] or None,
            controlnet_conditioning_scale=self.controlnet_conditioning_scale,
            control_guidance_start=self.control_guidance_start,
            control_guidance_end=self.control_guidance_end,
            control_mode=self.control_mode,
            ip_adapter_image=[read_picture(file, file) for file in self.ip_adapter_images] or None,
        )

    def add(self, backbone: "Backbone") -> "Backbone":
        """The model with LoRAs, ControlNets and IP-Adapters; HiresError for one that doesn't belong to it."""
        if self.controlnets:
            backbone = backbone.with_controlnets([_controlnet(backbone, source) for source in self.controlnets])
        if self.ip_adapters:
            _add_ip_adapters(backbone, self.ip_adapters, self.image_encoder, self.ip_adapter_scale)
        if self.loras:
            from hires.additions.lora import load_lora

            files = self.lora_names or [file.name for file, _ in self.loras]
            names = [f"{index}-{Path(file).stem}".replace(".", "-") for index, file in enumerate(files, 1)]
            for name, (file, _) in zip(names, self.loras, strict=True):
                load_lora(backbone.pipe, file, name)
            backbone.pipe.set_adapters(names, [weight for _, weight in self.loras])
        return backbone

    def record(self) -> dict[str, Any] | None:
        """What was added, with the SHA-256 of every file, as JSON-ready values; None where nothing was."""
        found: dict[str, Any] = {}
        if self.loras:
            found["loras"] = [
                {"file": file.name, "sha256": sha256(_lora_file(file)), "weight": weight} for file, weight in self.loras
            ]
        if self.controlnets:
            found["controlnets"] = [
                {"source": source, "sha256": _weights_digest(_folder(source))} for source in self.controlnets
            ]
            found["control_images"] = _parts(self.control_images)
            found |= {name: getattr(self, name) for name in CONTROL_SETTINGS}
        if self.ip_adapters:
            assert self.image_encoder is not None  # `check`
            encoder = {"file": self.image_encoder.name, "sha256": _weights_digest(self.image_encoder)}
            found["ip_adapters"], found["image_encoder"] = _parts(self.ip_adapters), encoder
            found["ip_adapter_images"] = _parts(self.ip_adapter_images)
            found["ip_adapter_scale"] = self.ip_adapter_scale
        if self.crop:
            found["crop"] = True
        return found or None


NOTHING = Additions()


def parse_lora(text: str) -> tuple[Path, float]:
    """ "style.safetensors:0.8" -> (path, 0.8); the weight is 1 where none is given."""
    path, colon, weight = text.rpartition(":")
    if not colon:
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise HiresError(f"--lora {text}: give PATH or PATH:WEIGHT, for example style.safetensors:0.8") from None


def _lora_file(source: Path) -> Path:
    from hires.additions.lora import WEIGHTS

    return source / WEIGHTS if source.is_dir() else source


def _digests(path: Path) -> set[str]:
    """What a record may know a path by: a file's SHA-256; of a folder those of its weights, and of a LoRA in it."""
    if not path.exists():
        raise HiresError(f"--with {path}: no such file or folder")
    if path.is_file():
        return {sha256(path)}
    return {_weights_digest(path), *({sha256(lora)} if (lora := _lora_file(path)).is_file() else ())}


def _parts(files: Sequence[Path]) -> list[dict[str, str]]:
    return [{"file": file.name, "sha256": sha256(file)} for file in files]


def _folder(source: str) -> Path:
    """The folder of a ControlNet: a local one, or that of the hub's cache."""
    from hires.hub import download_controlnet

    path = Path(source).expanduser()
    return path if path.is_dir() else download_controlnet(source)


def _weights_digest(folder: Path) -> str:
    """SHA-256 over the SHA-256 of each weight file."""
    from hires.files.storage import digest

    return digest([[file.name, sha256(file)] for file in sorted(folder.glob("*.safetensors"))])


def _controlnet(backbone: "Backbone", source: str) -> Any:
    from hires.files.untrusted import read_table

    wanted, folder = backbone.controlnet_class, _folder(source)
    if wanted is None:
        raise HiresError(f"--controlnet {source}: ControlNets of {backbone.family} models are not known here")
    if not (folder / "config.json").is_file():
        raise HiresError(f"--controlnet {source}: the folder {folder} has no config.json: give a diffusers ControlNet")
    name = read_table(folder / "config.json").get("_class_name")
    if name != wanted.__name__:
        raise HiresError(f"--controlnet {source} holds a {name}: a {backbone.family} model takes a {wanted.__name__}")
    try:
        return wanted.from_pretrained(folder, dtype=backbone.dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise HiresError(f"--controlnet {source}: diffusers cannot load it: {str(error).splitlines()[0]}") from None


def _add_ip_adapters(backbone: "Backbone", files: Sequence[Path], encoder: Path | None, scale: float) -> None:
    """Load IP-Adapters from safetensors files, with the CLIP vision model that they were trained with."""
    from safetensors import SafetensorError
    from transformers import CLIPVisionModelWithProjection

    pipe = backbone.pipe
    if not hasattr(pipe, "load_ip_adapter"):
        raise HiresError(f"--ip-adapter: a {type(pipe).__name__} takes none: leave it or the ControlNet out")
    try:
        vision = CLIPVisionModelWithProjection.from_pretrained(encoder, dtype=pipe.dtype, use_safetensors=True)
        pipe.register_modules(image_encoder=vision)
        names = [file.name for file in files]
        pipe.load_ip_adapter([str(file.parent) for file in files], weight_name=names, subfolder="")
    except SafetensorError:
        raise HiresError(f"--ip-adapter {files[0]} is cut short or no safetensors file: fetch it again") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        told = ", ".join(map(str, files))
        raise HiresError(f"--ip-adapter {told} does not fit this model or image encoder: {reason}") from None
    pipe.set_ip_adapter_scale(scale)
