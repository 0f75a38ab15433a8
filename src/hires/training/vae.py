"""tiny-vae: detail by a Laplacian pyramid and local texture energy, no adversary.

Loss = Laplacian-pyramid L1 + texture energy + 0.25 × (a half-size latent decodes to the half-size image)
+ 1e-3 × mean KL. The half-size term makes latents behave like images when the cascade resamples them.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from hires.models import build_vae
from hires.training.data import Pool, normalised
from hires.training.loop import fit, write_log


def laplacian(x: Tensor, levels: int = 4) -> list[Tensor]:
    """Band-pass levels of (n, c, h, w), finest first, and the remaining low-pass image."""
    bands = []
    for _ in range(levels):
        low = F.avg_pool2d(x, 2)
        bands.append(x - F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False))
        x = low
    return [*bands, x]


def texture_energy(band: Tensor, size: int = 8) -> Tensor:
    """Local root mean square of a band over `size`² pixels: how much texture there is, wherever its phase."""
    return (F.avg_pool2d(band.square().mean(1, keepdim=True), size, stride=size // 2) + 1e-6).sqrt()


def reconstruction_loss(output: Tensor, target: Tensor, energy: float = 1.0) -> Tensor:
    """Laplacian L1 (weights grow towards the finest level) plus the difference of texture energy of the finest two."""
    ours, theirs = laplacian(output), laplacian(target)
    loss = sum(
        (weight * F.l1_loss(a, b) for weight, a, b in zip((2.0, 1.5, 1.0, 1.0, 1.0), ours, theirs)),
        start=output.new_zeros(()),
    )
    for a, b in zip(ours[:2], theirs[:2]):
        loss = loss + energy * F.l1_loss(texture_energy(a), texture_energy(b))
    return loss


def train(
    out: Path,
    pool: Pool,
    *,
    device: torch.device,
    resume: Path | None = None,
    steps: int = 40_000,
    seconds: float = float("inf"),
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> AutoencoderKL:
    """Train tiny-vae on a pool and save it to `out`; scaling_factor is 1 / std of the latents."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    vae = AutoencoderKL.from_pretrained(resume, use_safetensors=True) if resume else build_vae()
    vae = vae.to(device, memory_format=torch.channels_last).train()
    images = pool.images

    def loss() -> Tensor:
        index = torch.randint(len(images), (batch,), device=device)
        x = normalised(images[index]).contiguous(memory_format=torch.channels_last)
        soft = batch // 6  # the cascade encodes upsampled, hence blurred, images
        blurred = F.interpolate(F.avg_pool2d(x[:soft], 2), scale_factor=2, mode="bicubic", align_corners=False)
        x = torch.cat([blurred.clamp(-1, 1), x[soft:]])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + torch.exp(0.5 * posterior.logvar) * torch.randn(posterior.mean.shape, device=device)
            output = vae.decode(z).sample
            half = vae.decode(F.avg_pool2d(posterior.mean, 2)).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        equivariance = F.l1_loss(half.float(), F.avg_pool2d(x, 2))
        return reconstruction_loss(output.float(), x) + 0.25 * equivariance + 1e-3 * kl

    log = fit(loss, [vae], steps=steps, seconds=seconds, lr=lr, decay_from=0.3, weight_decay=0.0, name="tiny-vae")
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        sample = normalised(images[:2048]).split(256)
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in sample])
        error = torch.cat([(vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x) for x in sample])
    scale = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    psnr = -10 * torch.log10((error / 2).square().mean()).item()
    print(f"tiny-vae: PSNR {psnr:.2f} dB, scaling factor {scale:.4f}", flush=True)
    vae.to(memory_format=torch.contiguous_format).half().save_pretrained(out)
    recipe = {"batch": batch, "pool": len(images), "lr": lr, "seed": seed, "psnr": psnr}
    write_log(out, recipe, log)
    return vae.float()
