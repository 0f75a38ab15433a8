"""Train the embedded models on camera views of scenes (tiny-vae, tiny-flux, tiny-sdxl, tiny-clip), or a Scale-DiT
adapter for any FLUX model on your images (scale-dit, by a recipe: --config).

A run ends after --steps or --seconds, whichever comes first; weights and log go to --out. Sizes in pixels, times in
seconds. tiny-flux and tiny-sdxl need a trained tiny-vae; `hires train evaluate` reads samples of a pipeline back.
Of the options below scale-dit knows --config, --out, --steps, --seconds, --batch, --lr, --seed, --workers, --device
and --resume; those that the recipe has too replace its values.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from hires.errors import HiresError, unknown

TARGETS = ("pool", "tiny-vae", "tiny-flux", "tiny-sdxl", "tiny-clip", "evaluate", "scale-dit")
VIEWS = 262_144
RECIPE = Path("config/training/scale-dit.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=", ".join(TARGETS))
    parser.add_argument("--out", type=Path, help="folder of the result (default results/train/MODEL)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after this long")
    parser.add_argument("--batch", type=int, help="views a step (default: the recipe's)")
    parser.add_argument("--views", type=int, default=VIEWS, help="rendered views to draw from")
    parser.add_argument("--pool", type=Path, help="folder of views rendered by `hires train pool` (default: render)")
    parser.add_argument("--lr", type=float, help="learning rate (default: the recipe's)")
    parser.add_argument("--seed", type=int, help="seed (default: 0, or the recipe's)")
    parser.add_argument("--workers", type=int, help="processes that prepare data (default: 0, or the recipe's)")
    parser.add_argument("--device", default=None, help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--vae", type=Path, default=Path("results/train/tiny-vae"), help="tiny-vae's folder")
    parser.add_argument(
        "--resume", type=Path, help="folder to continue from: its weights alone; scale-dit: its checkpoint, exactly"
    )
    parser.add_argument("--config", type=Path, default=RECIPE, help="scale-dit: the recipe, keys in docs/training.md")
    parser.add_argument("--distil-seconds", type=float, default=math.inf, help="tiny-flux: end of the second phase")
    parser.add_argument("--model-folder", type=Path, help="evaluate: the pipeline folder to read back")
    parser.add_argument("--prompts", type=int, default=256, help="evaluate: number of held-out captions")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 2, 4], help="evaluate: guidance scales")


def run(args: argparse.Namespace) -> None:
    if args.model not in TARGETS:
        raise unknown("model", args.model, TARGETS)
    import torch

    from hires.backbones.loading import usable_device

    device = usable_device(args.device)
    # cuDNN's attention gave NaN in training at small head dimensions.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")
    if args.model == "evaluate":
        from hires.training.evaluate import evaluate

        if args.model_folder is None:
            raise HiresError("evaluate needs --model-folder, a pipeline folder such as results/train/tiny-flux")
        evaluate(args.model_folder, device=device, prompts=args.prompts, guidance=args.guidance, out=args.out)
        return
    out = args.out or Path("results/train") / args.model
    if args.model == "scale-dit":
        _scale_dit(args, out, device)
        return
    args.seed, args.workers = args.seed or 0, args.workers or 0
    from hires.models import BASE_RESOLUTION
    from hires.training.data import Pool, render_pool

    def pool() -> Pool:
        if args.pool is not None:
            return Pool.load(args.pool, args.views, device)
        return render_pool(args.views, BASE_RESOLUTION, args.seed, args.workers, device)

    if args.model == "pool":
        pool().save(out)
        return
    options = {k: v for k in ("steps", "batch", "lr") if (v := getattr(args, k)) is not None}
    options |= {"seconds": args.seconds, "seed": args.seed, "device": device}
    if args.resume is not None:
        if not args.resume.is_dir():
            raise HiresError(f"--resume {args.resume}: no such folder; give one that `hires train` wrote")
        options["resume"] = args.resume
    if args.model == "tiny-vae":
        from hires.training import vae

        vae.train(out, pool(), **options)
    elif args.model == "tiny-clip":
        from hires.training import clip

        clip.train(out, pool(), **options)
    else:
        from hires.training import diffusion

        if not (args.vae / "config.json").is_file():
            raise HiresError(f"--vae {args.vae}: no tiny-vae there; make one with `hires train tiny-vae`")
        diffusion.train(args.model, out, pool(), vae=args.vae, distil_seconds=args.distil_seconds, **options)


def _scale_dit(args: argparse.Namespace, out: Path, device: Any) -> None:
    from hires.training.scale_dit.recipe import Recipe
    from hires.training.scale_dit.trainer import train

    given: dict[str, Any] = {key: getattr(args, key) for key in ("steps", "batch", "seed")}
    given["optimizer"], given["data"] = {"lr": args.lr}, {"workers": args.workers}
    recipe = Recipe.load(args.config, **_stated(given))
    train(recipe, out, device=device, resume=args.resume, seconds=args.seconds)


def _stated(options: dict[str, Any]) -> dict[str, Any]:
    """Without what was not given, sections too."""
    kept = {key: _stated(value) if isinstance(value, dict) else value for key, value in options.items()}
    return {key: value for key, value in kept.items() if value not in (None, {})}
