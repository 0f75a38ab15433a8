"""Make an image from a prompt, or from your own image, and write it as a PNG that carries its parameters.

Example: hires generate --model tiny-flux --prompt "three red rings on a brick wall" --size 512 --out rings.png
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hires.errors import HiresError, unknown
from hires.variants import VARIANTS, variant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="tiny-flux",
        help="tiny-flux, tiny-sdxl, flux-dev, flux-schnell, flux2-klein, flux2-klein-base, sdxl, a folder or hub id",
    )
    parser.add_argument("--prompt", required=True, help="what the image shows")
    parser.add_argument("--size", default="512", help="HEIGHTxWIDTH in pixels, or the side of a square")
    parser.add_argument("--variant", default="scalediff", help=", ".join(VARIANTS))
    parser.add_argument("--seed", type=int, default=0, help="the image's seed, 0 or more")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a sampling setting, e.g. tau=300; repeatable"
    )
    parser.add_argument("--image", type=Path, help="your own image, in the place of the base image")
    parser.add_argument("--strength", type=float, help="share of your image that is redrawn, above 0 and up to 1")
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="PNG to write")
    parser.add_argument("--all-stages", action="store_true", help="also write every stage, as <out>-<stage>.png")
    parser.add_argument("--device", help="torch device; default: cuda where there is one, else cpu")
    parser.add_argument(
        "--gpus", type=int, default=1, help="GPUs of this machine that share one image (FLUX.1 with npa; default: 1)"
    )
    parser.add_argument(
        "--preset", help="fast: 8-bit linear layers, cheaper text rows, extrapolated steps; --set goes over it"
    )
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; default: by model and device")
    parser.add_argument("--weights", default="pretrained", help="pretrained, or random to measure time and memory")


def run(args: argparse.Namespace) -> int | None:
    from PIL import PngImagePlugin

    from hires.settings import PRESETS, Sampling
    from hires.sizes import parse_size
    from hires.storage import replacing, sha256
    from hires.untrusted import read_picture

    height, width = parse_size(args.size)
    chosen = variant(args.variant)
    if args.preset not in (None, *PRESETS):
        raise unknown("preset", args.preset, PRESETS)
    given = parse_settings(args.set)
    Sampling.of(**given)
    if args.out.suffix.lower() != ".png":
        raise HiresError(f"--out {args.out}: only PNG carries the parameters: give a name that ends with .png")
    if not args.out.parent.is_dir():
        raise HiresError(f"--out {args.out}: the folder {args.out.parent} does not exist")
    image, picture = None, None
    if args.image:
        image = read_picture(args.image, f"--image {args.image}")
        picture = {"file": args.image.name, "sha256": sha256(args.image)}

    from hires import parallel

    if args.gpus < 1:
        raise HiresError(f"--gpus {args.gpus}: must be at least 1")
    if args.gpus > 1 and not parallel.launched():
        return parallel.launch(args.gpus, args.argv)

    from hires.backbones import Backbone, load  # seconds to import: not for an argument that is wrong anyway
    from hires.cascade import Stage, decode
    from hires.generation import record
    from hires.generation import run as stages

    def save(backbone: Backbone, stage: Stage, path: Path) -> None:
        info = PngImagePlugin.PngInfo()
        parameters = record(backbone, args.prompt, args.seed, args.variant, stage, sampling, args.strength, picture)
        info.add_text("parameters", json.dumps(parameters))
        made = decode(backbone, stage, sampling.vae_tiling)[0]
        if parallel.first():
            with replacing(path) as temporary:
                made.save(temporary, "PNG", pnginfo=info)

    with parallel.joined(args.device) as device, ProgressBar() as progress:
        backbone = load(args.model, device, args.dtype, args.weights)
        sampling = Sampling.of(**{**backbone.preset(args.preset), **given})
        stage = None
        for stage in stages(
            backbone, [args.prompt], [args.seed], chosen, height, width, sampling, image, args.strength, progress.update
        ):
            if args.all_stages:
                save(backbone, stage, args.out.with_stem(f"{args.out.stem}-{stage.name}"))
        assert stage is not None
        save(backbone, stage, args.out)
    print(args.out)
    return None


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """["tau=300", "low_pass=fft"] -> {"tau": "300", "low_pass": "fft"}: `Sampling` reads the values as its types.

    HiresError without a "=".
    """
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise HiresError(f"--set {pair}: give NAME=VALUE, for example --set tau=300")
        settings[name.strip()] = value
    return settings


class ProgressBar:
    """A tqdm bar per stage on stderr, silent where that is no terminal."""

    def __enter__(self) -> "ProgressBar":
        self.bar: Any = None
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, stage: str, step: int, steps: int, latents: object) -> None:
        from tqdm import tqdm

        if step == 1:
            if self.bar is not None:
                self.bar.close()
            self.bar = tqdm(total=steps, desc=stage, unit="step", file=sys.stderr, disable=None)
        self.bar.update()
