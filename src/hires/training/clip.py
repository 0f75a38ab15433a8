"""tiny-clip: contrastive on views and captions, and on degraded views whose caption says so."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from hires.models import DEGRADED, build_clip
from hires.training.data import Pool, normalised
from hires.training.loop import fit, write_log


def degrade(x: Tensor, kind: Tensor, strength: Tensor) -> Tensor:
    """Blur (kind 1, by area down and bicubic up) or noise (kind 2) (n, 3, h, w) in [-1, 1]; kind 0 stays."""
    blurred = x
    for factor, low in ((2, 0.0), (4, 0.5)):
        small = F.avg_pool2d(x, factor)
        up = F.interpolate(small, size=x.shape[-2:], mode="bicubic", align_corners=False)
        blurred = torch.where((strength > low)[:, None, None, None], up, blurred)
    noisy = x + (0.06 + 0.24 * strength)[:, None, None, None] * torch.randn_like(x)
    kind = kind[:, None, None, None]
    return torch.where(kind == 1, blurred, torch.where(kind == 2, noisy, x)).clamp(-1, 1)


def train(
    out: Path,
    pool: Pool,
    *,
    device: torch.device,
    resume: Path | None = None,
    steps: int = 12_000,
    seconds: float = float("inf"),
    batch: int = 768,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train tiny-clip on a pool, from the weights in `resume` if given, and save model and tokenizer to `out`."""
    torch.manual_seed(seed)
    model, tokenizer = build_clip(seed)
    if resume is not None:
        model = CLIPModel.from_pretrained(resume, dtype=torch.float32, use_safetensors=True)
    model = model.to(device).train()
    pixels, texts = pool.images, pool.captions

    def tokens(prefix: str) -> Tensor:
        return tokenizer(
            [prefix + t for t in texts], padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)  # fmt: skip

    ids = torch.stack([tokens(""), *(tokens(f"{word} ") for word in DEGRADED)])
    forward = torch.compile(model, dynamic=False) if device.type == "cuda" else model

    def loss() -> Tensor:
        index = torch.randint(len(pixels), (batch,), device=device)
        draw = torch.rand(batch, 2, device=device)
        kind = (draw[:, 0] < 0.3).int() + (draw[:, 0] < 0.15).int()
        x = degrade(normalised(pixels[index]), kind, draw[:, 1])
        words = ids[kind, index]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = forward(input_ids=words, pixel_values=x)
        image, text = F.normalize(output.image_embeds.float(), dim=-1), F.normalize(output.text_embeds.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        # Views with the same caption are no negatives of each other.
        same = (words[:, None] == words[None]).all(-1) & ~torch.eye(batch, dtype=torch.bool, device=device)
        logits = logits.masked_fill(same, float("-inf"))
        target = torch.arange(batch, device=device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    log = fit(loss, [model], steps=steps, seconds=seconds, lr=lr, decay_from=0.3, weight_decay=0.1, name="tiny-clip")
    model.eval().half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    recipe = {"batch": batch, "pool": len(pixels), "lr": lr, "seed": seed, "resumed": resume is not None}
    write_log(out, recipe, log)
