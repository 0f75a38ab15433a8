"""Make an image from a prompt, or from your own image, and write it as a PNG that carries its parameters.

hires generate --model tiny-flux --prompt "three red rings on a brick wall" --size 512 --out rings.png
"""

import argparse
import re
import sys
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from hires.errors import HiresError, unknown
from hires.settings import PRESETS, Sampling
from hires.variants import VARIANTS, variant

if TYPE_CHECKING:
    from PIL import Image

    from hires.additions import Additions
    from hires.generation import Request
    from hires.sizes import Size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="tiny-flux",
        help="tiny-flux, tiny-sdxl, flux-dev, flux-schnell, flux2-klein, flux2-klein-base, sdxl, a folder or hub id",
    )
    parser.add_argument("--prompt", required=True, help="what the image shows")
    parser.add_argument("--negative-prompt", help="what it should not show; FLUX.1: with --set true_cfg_scale=2")
    parser.add_argument("--size", default="512", help="HEIGHTxWIDTH in pixels, or the side of a square")
    parser.add_argument("--variant", default="scalediff", help=", ".join(VARIANTS))
    parser.add_argument("--seed", type=int, default=0, help="the image's seed, 0 or more")
    parser.add_argument("--images", type=int, default=1, help="how many, with the seeds from --seed on: <out>-<seed>")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting, listed below; e.g. tau=300; repeatable",
    )
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="PNG to write")
    parser.add_argument("--all-stages", action="store_true", help="also write every stage, as <out>-<stage>.png")
    parser.add_argument("--preview", action="store_true", help="show every stage but the last, small, in the terminal")

    own = parser.add_argument_group("your own image")
    own.add_argument("--image", type=Path, help="takes the place of the base image; of the target's aspect ratio")
    own.add_argument("--strength", type=float, help="share of it that is redrawn, above 0 and up to 1; none: tau/1000")
    own.add_argument("--crop", action="store_true", help="cut images around their centre to the target's aspect ratio")

    added = parser.add_argument_group("added to the model", "each may be given several times")
    added.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="safetensors file or folder; weight: 1"
    )
    added.add_argument("--controlnet", action="append", default=[], help="diffusers folder or hub id of a ControlNet")
    added.add_argument("--control-image", action="append", default=[], type=Path, help="one for each ControlNet")
    added.add_argument(
        "--controlnet-conditioning-scale", type=float, default=1.0, metavar="SCALE", help="weight of the ControlNets"
    )
    added.add_argument(
        "--control-guidance-start", type=float, default=0.0, metavar="SHARE", help="of the schedule, where they begin"
    )
    added.add_argument(
        "--control-guidance-end", type=float, default=1.0, metavar="SHARE", help="of the schedule, where they end"
    )
    added.add_argument("--control-mode", type=int, metavar="MODE", help="kind of image, for FLUX's union ControlNets")
    added.add_argument("--ip-adapter", action="append", default=[], type=Path, help="safetensors file of an IP-Adapter")
    added.add_argument("--image-encoder", type=Path, help="folder of the CLIP vision model that it needs")
    added.add_argument("--ip-adapter-image", action="append", default=[], type=Path, help="one for each IP-Adapter")
    added.add_argument("--ip-adapter-scale", type=float, default=1.0, metavar="SCALE", help="weight of the IP-Adapters")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="torch device; none: cuda where there is one, else cpu")
    machine.add_argument("--gpus", type=int, default=1, help="GPUs of this machine that share one image (FLUX.1, npa)")
    machine.add_argument("--dtype", help="float32, float16 or bfloat16; none: by model and device")
    machine.add_argument("--weights", default="pretrained", help="pretrained, or random to measure time and memory")
    machine.add_argument("--offload", metavar="KIND", help="parts wait in main memory: model, group or sequential")
    machine.add_argument(
        "--compile", action="store_true", help="compile blocks, replay short steps: a minute a size, then faster"
    )
    machine.add_argument(
        "--preset", help="fast: 8-bit linear layers, cheaper text rows, extrapolated steps; --set goes over it"
    )
    parser.epilog = f"settings of --set; a default that isn't told is the model's own:\n\n{_settings_help()}"


def _settings_help() -> str:
    """What every sampling setting means, may be and is by default, for a terminal of 80 columns."""
    from hires.config.keys import type_name

    lines = []
    for name, field in Sampling.model_fields.items():
        allowed = type_name(field.annotation).removesuffix(" or null")
        default = "" if field.default in (None, "") else f"; default: {str(field.default).lower()}"
        lines.append(f"{name:<22}{field.description} ({allowed}{default})")
    return "\n".join(fill(line, 79, initial_indent="  ", subsequent_indent=" " * 24) for line in lines)


def run(args: argparse.Namespace) -> int | None:
    from hires.execution.devices import without_fragments
    from hires.files.untrusted import read_picture
    from hires.sizes import parse_size

    size = parse_size(args.size)
    variant(args.variant)
    settings = _settings(args)
    _check_outputs(args)
    image = read_picture(args.image, f"--image {args.image}") if args.image else None
    if args.strength is not None and image is None:
        raise HiresError(f"--strength {args.strength:g}: how much of --image is redrawn, and there is none: name one")
    additions = _additions(args)
    additions.check()
    without_fragments()
    from hires.execution import parallel  # seconds to import, with torch: not for an argument that is wrong anyway

    if args.gpus < 1:
        raise HiresError(f"--gpus {args.gpus}: must be at least 1")
    if args.gpus > 1 and not parallel.launched():
        return parallel.launch(args.gpus, args.argv)
    _make(args, size, settings, image, additions)
    return None


def _settings(args: argparse.Namespace) -> dict[str, str]:
    """The settings given beside the preset, as text."""
    if args.preset not in (None, *PRESETS):
        raise unknown("preset", args.preset, PRESETS)
    given = parse_settings(args.set)
    if args.negative_prompt is not None:
        given["negative_prompt"] = args.negative_prompt
    Sampling.of(**given)
    return given


def _check_outputs(args: argparse.Namespace) -> None:
    """HiresError unless images and previews have where to go."""
    if args.out.suffix.lower() != ".png":
        raise HiresError(f"--out {args.out}: only PNG carries the parameters: give a name that ends with .png")
    if not args.out.parent.is_dir():
        raise HiresError(f"--out {args.out}: the folder {args.out.parent} does not exist")
    if args.images < 1:
        raise HiresError(f"--images {args.images}: allowed: 1 or more")
    if args.preview and not sys.stderr.isatty():
        raise HiresError("--preview draws in a terminal, and stderr is none: leave it out, or use --all-stages")


def _additions(args: argparse.Namespace) -> "Additions":
    from hires.additions import Additions, parse_lora

    return Additions(
        loras=[parse_lora(text) for text in args.lora],
        controlnets=args.controlnet,
        control_images=args.control_image,
        controlnet_conditioning_scale=args.controlnet_conditioning_scale,
        control_guidance_start=args.control_guidance_start,
        control_guidance_end=args.control_guidance_end,
        control_mode=args.control_mode,
        ip_adapters=args.ip_adapter,
        image_encoder=args.image_encoder,
        ip_adapter_scale=args.ip_adapter_scale,
        ip_adapter_images=args.ip_adapter_image,
        crop=args.crop,
    )


def _make(
    args: argparse.Namespace,
    size: "Size",
    settings: dict[str, str],
    image: "Image.Image | None",
    additions: "Additions",
) -> None:
    """Load the model, and make one image after the other."""
    from hires.backbones import Backbone, load
    from hires.execution import parallel
    from hires.files.storage import sha256
    from hires.generation import Request

    def sampled(backbone: Backbone) -> Sampling:
        return Sampling.of(**{**backbone.preset(args.preset), **settings})

    def prepare(backbone: Backbone) -> Backbone:
        backbone = additions.add(backbone)
        if sampled(backbone).linears == "fp8":
            from hires.execution.fp8 import only_8_bits

            only_8_bits(backbone.model)
        if args.compile:
            from hires.execution.compilation import compile_blocks

            for model in (backbone.model, *backbone.controlnets):
                compile_blocks(model)
        return backbone

    picture = {"file": args.image.name, "sha256": sha256(args.image)} if args.image else None
    with parallel.joined(args.device) as device, ProgressBar() as progress:
        backbone = load(args.model, device, args.dtype, args.weights, args.offload, prepare)
        if parallel.first() and args.weights == "pretrained":
            _tell_strange_words(backbone.name, args.prompt)
        request = Request(
            backbone, args.variant, *size, sampled(backbone), image, args.strength, additions.extras(), additions.crop
        )
        told = {"picture": picture, "additions": additions.record()}
        for seed in range(args.seed, args.seed + args.images):
            out = args.out if args.images == 1 else args.out.with_stem(f"{args.out.stem}-{seed}")
            _write(args, request, seed, out, told, progress)
            backbone.free()
            if parallel.first():
                print(out)


def _tell_strange_words(model: str, prompt: str) -> None:
    """The small models take every word, and make nothing of those that they never saw."""
    from hires.models import HINTS
    from hires.scenes.captions import VOCABULARY

    strange = [word for word in re.findall(r"[^\W\d_]+", prompt) if word.lower() not in VOCABULARY]
    if model in HINTS and strange:
        known = ", ".join(VOCABULARY)
        print(f"note: {model} never saw {', '.join(strange)}; it knows: {known}", file=sys.stderr)


def _write(
    args: argparse.Namespace, request: "Request", seed: int, out: Path, told: dict[str, Any], progress: "ProgressBar"
) -> None:
    """Make one image and write it, with its stages where they are asked for."""
    from hires.cascade import Stage, small_images
    from hires.execution.parallel import first
    from hires.provenance.records import save

    def write(stage: Stage, path: Path) -> None:
        (image,) = request.images(stage, [args.prompt], [seed], **told)
        if first():
            save(image, path)

    for stage in request.stages([args.prompt], [seed], progress.update):
        if args.all_stages:
            write(stage, out.with_stem(f"{out.stem}-{stage.name}"))
        if args.preview and first() and not request.ends_with(stage):
            progress.close()
            print(blocks(small_images(request.backbone, stage)[0]), file=sys.stderr)
    write(stage, out)


def blocks(image: "Image.Image", columns: int = 64) -> str:
    """An image in characters, two pixels each, one above the other: colours of 24 bits by ANSI escape sequences."""
    import numpy as np

    rows = max(1, round(image.height * columns / image.width / 2))
    pixels = np.asarray(image.convert("RGB").resize((columns, 2 * rows)))

    def cell(x: int, y: int) -> str:
        upper, lower = (";".join(map(str, pixels[2 * y + half, x])) for half in (0, 1))
        return f"\x1b[38;2;{upper};48;2;{lower}m▀"

    return "\n".join("".join(cell(x, y) for x in range(columns)) + "\x1b[0m" for y in range(rows))


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """["tau=300", "low_pass=fft"] -> {"tau": "300", "low_pass": "fft"}: `Sampling` reads the values as its types.

    HiresError without a "=".
    """
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise HiresError(f"--set {pair}: give NAME=VALUE, such as tau=300")
        settings[name.strip()] = value
    return settings


class ProgressBar:
    """A tqdm bar per stage on stderr, silent where that is no terminal."""

    def __enter__(self) -> "ProgressBar":
        self.bar: Any = None
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, stage: str, step: int, steps: int, latents: object) -> None:
        from tqdm import tqdm

        if step == 1:
            self.close()
            self.bar = tqdm(total=steps, desc=stage, unit="step", file=sys.stderr, disable=None)
        self.bar.update()
