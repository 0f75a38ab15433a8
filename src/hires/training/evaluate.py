"""What a trained pipeline paints: samples of held-out captions through the stock pipeline, read back by the parser."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from hires.backbones import load
from hires.models import BASE_RESOLUTION
from hires.scenes import caption, parse, scene, scene_ids


def contact_sheet(images: torch.Tensor, columns: int) -> Image.Image:
    """(n, 3, h, w) in [0, 1] side by side, two white pixels between."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(3, rows * (h + 2), columns * (w + 2))
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        sheet[:, y * (h + 2) : y * (h + 2) + h, x * (w + 2) : x * (w + 2) + w] = image
    return Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy())


def evaluate(
    folder: Path,
    *,
    device: torch.device,
    prompts: int = 256,
    guidance: Sequence[float] = (1, 2, 4),
    out: Path | None = None,
    steps: int = 28,
    batch: int = 64,
) -> list[dict[str, float]]:
    """Count accuracy, share of images that show every named colour, and extra objects per image at each guidance.

    Seeds 0 … n-1, one CPU generator an image. Writes evaluation.json and samples.png to `out` (default: `folder`).
    """
    pipe = load(folder, device, torch.float32).pipe
    scenes = [scene(i) for i in scene_ids("held-out", prompts)]
    length = {"max_sequence_length": pipe.tokenizer_2.model_max_length} if hasattr(pipe, "transformer") else {}
    rows, sheets = [], []
    for scale in guidance:
        images = []
        for start in range(0, prompts, batch):
            some = scenes[start : start + batch]
            images.append(
                pipe(
                    prompt=[caption(s) for s in some],
                    height=BASE_RESOLUTION,
                    width=BASE_RESOLUTION,
                    num_inference_steps=steps,
                    guidance_scale=float(scale),
                    generator=[torch.Generator().manual_seed(start + i) for i in range(len(some))],
                    output_type="pt",
                    **length,
                ).images.cpu()
            )
        pixels = torch.cat(images).float()
        with ThreadPoolExecutor() as pool:
            readings = list(pool.map(parse, pixels))
        right = [r.count == len(s.objects) for r, s in zip(readings, scenes)]
        colours = [{o.colour for o in s.objects} <= set(r.colours) for r, s in zip(readings, scenes)]
        extra = [max(0, r.count - len(s.objects)) for r, s in zip(readings, scenes)]
        row = {
            "guidance": float(scale),
            "n": prompts,
            "count": sum(right) / prompts,
            "colours": sum(colours) / prompts,
            "extra": sum(extra) / prompts,
        }
        print(folder.name, row, flush=True)
        rows.append(row)
        sheets.append(pixels[:24])
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n")
    contact_sheet(torch.cat(sheets), 12).save(out / "samples.png")
    return rows
