"""tiny-flux (flow matching, then guidance distillation) and tiny-sdxl (v-prediction with caption dropout)."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline
from torch import Tensor, nn

from hires.models import BASE_RESOLUTION, HINTS, build_pipeline
from hires.training.data import Pool, encode_pool
from hires.training.loop import fit, frozen, write_log

DROP = 0.1  # share of training captions left out, for classifier-free guidance


def _tokens(tokenizer, texts: Sequence[str], device: torch.device) -> Tensor:
    length = tokenizer.model_max_length
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found.input_ids.to(device)


class FluxModel(nn.Module):
    """Transformer and text encoders of a FLUX pipeline as one function of latents, tokens, time and guidance."""

    def __init__(self, pipe: FluxPipeline) -> None:
        super().__init__()
        self.transformer, self.clip, self.t5 = pipe.transformer, pipe.text_encoder, pipe.text_encoder_2
        side = BASE_RESOLUTION // 16
        image = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
        self.register_buffer("image_ids", image, persistent=False)
        self.register_buffer("text_ids", torch.zeros(pipe.tokenizer_2.model_max_length, 3), persistent=False)

    def forward(self, latents: Tensor, clip_ids: Tensor, t5_ids: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
        """Velocity ε − z of noisy packed `latents` (n, tokens, 64) at time t (n,) in [0, 1]."""
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=self.t5(t5_ids)[0],
            pooled_projections=self.clip(clip_ids).pooler_output,
            timestep=t,
            guidance=guidance,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


class SDXLModel(nn.Module):
    """U-Net and text encoders of an SDXL pipeline as one function of latents, tokens, timestep and size ids."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__()
        self.unet, self.first, self.second = pipe.unet, pipe.text_encoder, pipe.text_encoder_2

    def forward(self, latents: Tensor, ids: Tensor, keep: Tensor, timestep: Tensor, time_ids: Tensor) -> Tensor:
        """v of noisy `latents` (n, 16, h, w); a caption that is not kept is replaced by zeros, as the pipeline does."""
        first = self.first(ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(ids, output_hidden_states=True)
        text = torch.cat([first, second.hidden_states[-2]], dim=-1) * keep[:, None, None]
        conditions = {"text_embeds": second.text_embeds * keep[:, None], "time_ids": time_ids}
        return self.unet(
            latents, timestep, encoder_hidden_states=text, added_cond_kwargs=conditions, return_dict=False
        )[0]


def _sample(moments: Tensor, index: Tensor, scale: float) -> Tensor:
    mean, logvar = moments[index].float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, device=mean.device)
    return (mean + torch.exp(0.5 * logvar) * noise) * scale


def _flux_losses(pipe, moments, captions, batch, device):
    clip_ids = _tokens(pipe.tokenizer, [*captions, ""], device)
    t5_ids = _tokens(pipe.tokenizer_2, [*captions, ""], device)
    scale, empty = pipe.vae.config.scaling_factor, len(captions)
    model = FluxModel(pipe).to(device).train()
    forward = torch.compile(model, dynamic=False) if device.type == "cuda" else model

    def draw(drop: float):
        index = torch.randint(len(captions), (batch,), device=device)
        z = _sample(moments, index, scale)
        z = FluxPipeline._pack_latents(z, *z.shape)
        noise = torch.randn(z.shape, device=device)
        t = torch.sigmoid(0.7 + torch.randn(batch, device=device))
        words = torch.where(torch.rand(batch, device=device) < drop, empty, index)
        noisy = torch.lerp(z, noise, t[:, None, None])
        return noisy, noise - z, t, words

    one = torch.ones(batch, device=device)

    def matching() -> Tensor:
        noisy, velocity, t, words = draw(DROP)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = forward(noisy, clip_ids[words], t5_ids[words], t, one)
        return F.mse_loss(output.float(), velocity)

    def distillation(low: float, high: float):
        teacher = frozen(model)
        teach = torch.compile(teacher, dynamic=False) if device.type == "cuda" else teacher
        blank = torch.full((batch,), empty, device=device)

        def loss() -> Tensor:
            noisy, _, t, words = draw(0.0)
            g = low + (high - low) * torch.rand(batch, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                with torch.no_grad():
                    with_text = teach(noisy, clip_ids[words], t5_ids[words], t, one).float()
                    without = teach(noisy, clip_ids[blank], t5_ids[blank], t, one).float()
                output = forward(noisy, clip_ids[words], t5_ids[words], t, g)
            return F.mse_loss(output.float(), torch.lerp(without, with_text, g[:, None, None]))

        return loss

    return model, matching, distillation


def _sdxl_loss(pipe, moments, captions, batch, device):
    ids = _tokens(pipe.tokenizer, captions, device)
    scale = pipe.vae.config.scaling_factor
    alphas = pipe.scheduler.alphas_cumprod.to(device)
    model = SDXLModel(pipe).to(device).train()
    forward = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    sizes = torch.tensor([1.0, 2.0, 4.0, 8.0], device=device) * BASE_RESOLUTION

    def loss() -> Tensor:
        index = torch.randint(len(captions), (batch,), device=device)
        z = _sample(moments, index, scale)
        noise = torch.randn(z.shape, device=device)
        timestep = torch.randint(len(alphas), (batch,), device=device)
        alpha = alphas[timestep][:, None, None, None]
        size = sizes[torch.randint(len(sizes), (batch,), device=device)][:, None]
        corner = torch.zeros_like(size)
        time_ids = torch.cat([size, size, corner, corner, size, size], dim=1)
        keep = (torch.rand(batch, device=device) >= DROP).float()
        noisy, velocity = alpha.sqrt() * z + (1 - alpha).sqrt() * noise, alpha.sqrt() * noise - (1 - alpha).sqrt() * z
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = forward(noisy, ids[index], keep, timestep, time_ids)
        return F.mse_loss(output.float(), velocity)

    return model, loss


def save(name: str, pipe: DiffusionPipeline, out: Path) -> None:
    """Write a pipeline folder with fp16 weights and `hires.json`.

    Its text encoders are said to be float32: stock `from_pretrained` then gives every part the same dtype.
    """
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.half()
    pipe.save_pretrained(out)
    for config in out.glob("text_encoder*/config.json"):
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    (out / "hires.json").write_text(json.dumps(HINTS[name], indent=1) + "\n")


def train(
    name: str,
    out: Path,
    pool: Pool,
    *,
    vae: Path,
    device: torch.device,
    resume: Path | None = None,
    steps: int = 40_000,
    seconds: float = float("inf"),
    distil_steps: int = 1_500,
    distil_seconds: float = float("inf"),
    batch: int = 512,
    lr: float = 1e-3,
    ema: float = 0.999,
    seed: int = 0,
) -> None:
    """Train `name` ("tiny-flux" or "tiny-sdxl") on the latents of a pool and save its pipeline folder to `out`.

    Args:
        vae: folder of tiny-vae.
        resume: pipeline folder whose transformer or U-Net and text encoders to start from.
        distil_steps, distil_seconds: tiny-flux's guidance distillation from its own EMA (g uniform in [1, 4]).
    """
    torch.manual_seed(seed)
    pipe = (
        type(build_pipeline(name)).from_pretrained(resume, use_safetensors=True)
        if resume
        else build_pipeline(name, seed)
    )
    pipe.vae = AutoencoderKL.from_pretrained(vae, use_safetensors=True).eval().requires_grad_(False).to(device)
    for part in ("transformer", "unet", "text_encoder", "text_encoder_2"):
        if part in pipe.components:
            pipe.components[part].float().requires_grad_(True).to(device)
    moments, captions = encode_pool(pipe.vae, pool), pool.captions
    print(f"{name}: {len(captions)} views encoded", flush=True)
    recipe = {"batch": batch, "pool": len(captions), "lr": lr, "ema": ema, "seed": seed, "resumed": resume is not None}
    if name == "tiny-flux":
        model, matching, distillation = _flux_losses(pipe, moments, captions, batch, device)
        log = fit(matching, [model], steps=steps, seconds=seconds, lr=lr, ema=ema, name=name)
        more = fit(
            distillation(1.0, 4.0), [model], steps=distil_steps, seconds=distil_seconds, lr=2e-4, decay_from=0.5,
            ema=0.995, name=f"{name} guidance",
        )  # fmt: skip
        log += [{**row, "phase": 1} for row in more]
    else:
        model, loss = _sdxl_loss(pipe, moments, captions, batch, device)
        log = fit(loss, [model], steps=steps, seconds=seconds, lr=lr, ema=ema, name=name)
    model.eval().requires_grad_(False)
    save(name, pipe, out)
    write_log(out, recipe, log)
