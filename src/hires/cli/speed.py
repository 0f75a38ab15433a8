"""How fast this machine's GPU is, from 1024² to 8192²: steps, VAE, text encoders and whole images of FLUX.1-dev and
SDXL with random weights, dense, MultiDiffusion, ScaleDiff and Scale-DiT side by side (config/speed.yaml).

Each part has a file of its own, so a run that was cut goes on with the next part. Without a GPU the tiny models are
measured.

  hires speed --plan          lists the parts, and about how long each takes
  hires speed tables          writes tables and figures anew
  hires speed accuracy        compares images with and without the options that
                              change pixels: 8-bit linear layers, cheaper text
                              rows, extrapolated steps
  hires speed kernels         measures attention kernels on the layers of FLUX
                              and SDXL: a GPU's own, gathered windows with cuDNN
                              ("sdpa"), FlexAttention ("flex"), dense cuDNN
                              ("dense"), "sdpa" through torch.compile
                              ("sdpa-compiled")
  hires speed orders          compares orders of tokens for Scale-DiT's kernel,
                              with --traffic in gigabytes as well
  hires speed tune            measures other tiles, warps and stages for our own
                              kernels, and with --write commits the fastest

Examples:

  hires speed --parts flux-dev-4096,flux-dev-text
  hires speed kernels --shapes npa-flux-4096,sdxl1 --backends triton,sdpa --accuracy
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from hires.errors import HiresError

OPTIONS = {  # of what is measured, besides --device
    "models": ("out", "config", "parts", "plan", "force"),
    "tables": ("out",),
    "accuracy": ("out", "config", "images"),
    "kernels": ("out", "shapes", "backends", "repeats", "rest", "accuracy"),
    "orders": ("shapes", "repeats", "traffic"),
    "tune": ("kernels", "repeats", "write"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", default="models", choices=OPTIONS, help="what is measured (default: models)")
    parser.add_argument(
        "--device", default=None, help="cuda or cpu (default: cuda; for models and accuracy, what there is)"
    )
    parser.add_argument("--out", type=Path, help="folder (default: results/speed); of kernels: the CSV")
    models = parser.add_argument_group("models")
    models.add_argument("--config", type=Path, default=Path("config/speed.yaml"), help="default: config/speed.yaml")
    models.add_argument("--parts", default="", help="comma-separated names from --plan; default: all")
    models.add_argument("--plan", action="store_true", help="only list the parts and about how long each takes")
    models.add_argument("--force", action="store_true", help="measure finished parts again")
    models.add_argument("--images", type=int, default=8, help="accuracy: prompts (default: 8)")
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument(
        "--shapes",
        default="",
        help="comma-separated names, patterns or words, e.g. npa-flux-4096,sdxl1,*-8192; default: all",
    )
    kernels.add_argument("--backends", default="", help="comma-separated; default: all")
    kernels.add_argument("--kernels", default="", help="tune: comma-separated kernels of launches.json; default: all")
    kernels.add_argument("--write", action="store_true", help="tune: write the fastest launches into launches.json")
    kernels.add_argument("--traffic", action="store_true", help="orders: read L2 and DRAM traffic with Nsight Compute")
    kernels.add_argument("--repeats", type=int, default=50, help="calls of each, fewer beyond 3 seconds (default: 50)")
    kernels.add_argument("--rest", action="store_true", help="also the fastest 5 calls in a row after 2 idle seconds")
    kernels.add_argument("--accuracy", action="store_true", help="also the error of sampled rows against float64")
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> None:
    used = OPTIONS[args.what]
    for name in dict.fromkeys(name for names in OPTIONS.values() for name in names):
        if name not in used and getattr(args, name) != args.parser.get_default(name):
            allowed = ", ".join(f"--{name}" for name in ("device", *used))
            raise HiresError(f"--{name} means nothing to hires speed {args.what}: allowed: {allowed}")
    if args.what in ("kernels", "orders", "tune"):
        _kernels(args)
    elif args.what == "accuracy":
        _accuracy(args)
    else:
        _models(args)


def _kernels(args: argparse.Namespace) -> None:
    args.device = args.device or "cuda"
    if args.repeats < 1:
        raise HiresError(f"--repeats {args.repeats}: must be at least 1")
    if args.what != "kernels":
        return {"orders": _orders, "tune": _tune}[args.what](args)

    from hires.files.storage import write_text
    from hires.speed import kernels
    from hires.speed.settings import root

    device, shapes, names = kernels.check(args.device, _items(args.shapes), _items(args.backends))
    out = args.out or root(device.type == "cuda") / "kernels.csv"
    found = []
    print(kernels.HEADER)
    for row in kernels.measure(device, shapes, names, args.repeats, args.accuracy, args.rest):
        found.append(row)
        print(kernels.line(row), flush=True)
        write_text(out, kernels.table(found))  # after every row: a run takes minutes
    print(out, file=sys.stderr)


def _models(args: argparse.Namespace) -> None:
    from hires.execution import parallel
    from hires.execution.devices import locked_device, uses_gpu, without_fragments
    from hires.speed.settings import ROOT, choose, load_speed, parts, root

    without_fragments()  # as `hires generate` does
    speed = load_speed(args.config)
    if args.device not in (None, "cuda", "cpu"):
        raise HiresError(f"--device {args.device}: allowed: cuda, cpu")

    gpu = uses_gpu(args.device or "auto")
    folder = root(gpu, args.out or ROOT)
    models = speed.models if gpu or args.plan else speed.without_gpu
    chosen = choose(parts(models), _items(args.parts))
    if parallel.launched():
        _measure(args, speed, models, chosen, "cuda" if gpu else "cpu", folder)
        return
    if args.what == "models":
        shared = [part for part in chosen if part.kind == "gpus"]
        with locked_device(args.device or "auto") as device:  # before CUDA starts
            _measure(args, speed, models, [part for part in chosen if part.kind != "gpus"], device, folder)
        _together(args, speed, models, shared, gpu, folder)
    if args.plan:
        return

    from hires.speed import summary

    print(summary.write(folder))


def _accuracy(args: argparse.Namespace) -> None:
    if args.images < 2:
        raise HiresError(f"--images {args.images}: must be at least 2")

    from hires.analysis.tables import markdown
    from hires.execution.devices import locked_device
    from hires.files.storage import write_text
    from hires.speed import accuracy
    from hires.speed.settings import ROOT, load_speed, root

    speed, found = load_speed(args.config), []
    with locked_device(args.device or "auto") as device:
        from hires.backbones.loading import usable_device

        place = usable_device(device)
        rows = [accuracy.images(model, place, args.images) for model in speed.without_gpu]
        if place.type == "cuda":
            rows += [accuracy.outputs(name, model.dtype, place, model.sizes[1]) for name, model in speed.models.items()]
        for row in (row for part in rows for row in part):
            found.append(row)
            print(markdown(accuracy.shown([row])).splitlines()[-1], flush=True)
    folder = root(place.type == "cuda", args.out or ROOT)
    write_text(folder / "tables" / "accuracy.md", markdown(accuracy.shown(found)))
    write_text(folder / "tables" / "accuracy.csv", accuracy.shown(found).to_csv(index=False))
    print(folder / "tables" / "accuracy.md")


def _announce(part: Any, seconds: float | None) -> None:
    where = "two H200s" if part.kind == "gpus" else "an H200"
    print(f"{part.name:<22}" + ("" if seconds is None else f" about {seconds:5.0f} s on {where}"), flush=True)


def _together(
    args: argparse.Namespace, speed: Any, models: dict[str, Any], chosen: list[Any], gpu: bool, folder: Path
) -> None:
    """Parts that take two processes, on a GPU each."""
    from hires.execution import parallel
    from hires.execution.devices import gpus
    from hires.speed import parts as measuring

    for part in chosen:
        _announce(part, measuring.budget(part, speed, models[part.model]))
        key = measuring.settings_key(part, speed, models[part.model])
        if args.plan:
            continue
        if gpu and len(gpus()) < 2:
            print(f"{part.name}: needs two GPUs, left out", flush=True)
        elif not args.force and measuring.finished(folder, part, key):
            print(f"{part.name}: measured before", flush=True)
        else:
            arguments = ["speed", "--parts", part.name, "--force", "--config", str(args.config)]
            arguments += ["--out", str(args.out)] if args.out else []
            arguments += ["--device", args.device] if args.device else []
            if parallel.launch(2, arguments):
                raise HiresError(f"part {part.name} failed: see above; finished parts are kept, run it again")


def _measure(
    args: argparse.Namespace, speed: Any, models: dict[str, Any], chosen: list[Any], device: str, folder: Path
) -> None:
    from hires.backbones.loading import usable_device
    from hires.speed import parts as measuring

    gpu = device == "cuda"
    if not gpu and not args.plan:
        print("no GPU: tiny architectures, eager, in float32; their times say nothing about the methods", flush=True)
    for part in chosen:
        _announce(part, measuring.budget(part, speed, models[part.model]))
    if args.plan:
        return
    for part in chosen:
        model = models[part.model]
        if not args.force and measuring.finished(folder, part, measuring.settings_key(part, speed, model)):
            print(f"{part.name}: measured before", flush=True)
            continue
        measuring.measure(part, speed, model, usable_device(device), folder)


def _orders(args: argparse.Namespace) -> None:
    from hires.speed import orders

    device, shapes = orders.check(_items(args.shapes), args.device, args.traffic)
    print(orders.HEADER)
    for row in orders.measure(shapes, device, args.repeats, args.traffic):
        print(orders.line(row), flush=True)


def _tune(args: argparse.Namespace) -> None:
    import torch

    from hires.speed import tune

    kernels, device = tune.check(_items(args.kernels), args.device), torch.device(args.device)
    found = []
    print(tune.HEADER)
    for row in tune.tune(kernels, args.repeats, device):
        found.append(row)
        print(tune.line(row), flush=True)
    chosen = tune.better(found)
    for (kernel, head_dim), launch in chosen.items():
        print(f"{kernel} {head_dim}: faster with {launch}")
    if args.write:
        tune.write(chosen, device)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
