"""FLUX.1: flow matching, guidance embedding, latents packed 2×2 into tokens."""

import math
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor

from hires.attention import Guidance, low_resolution_pass
from hires.backbones.base import Backbone, Conditioning
from hires.backbones.schedule import Schedule
from hires.errors import HiresError
from hires.settings import Sampling


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> tokens (B, H/2 · W/2, 4C): each token holds a 2×2 patch, channel-major."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pack`; size (H, W) in latent pixels."""
    (b, _, c), (h, w) = tokens.shape, size
    return tokens.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def image_ids(size: tuple[int, int], device: torch.device) -> Tensor:
    """(H/2 · W/2, 3) positions of the tokens of (H, W) latent pixels: 0, row, column. float32: bf16 ends at 256."""
    rows, columns = (torch.arange(side // 2, device=device, dtype=torch.float32) for side in size)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    return torch.cat([torch.zeros_like(grid[..., :1]), grid], dim=-1).flatten(0, 1)


def flow_schedule(scheduler: Any, sampling: Sampling, first: int, mu: float, device: torch.device) -> Schedule:
    """σ from 1 to 1/N in even steps, shifted by exp μ, or by the stage_shift that is asked for."""
    steps, shift = sampling.num_inference_steps or 1, sampling.stage_shift
    if shift and not scheduler.config.use_dynamic_shifting:
        raise HiresError("stage_shift: this model's scheduler has a shift of its own (use_dynamic_shifting is off)")
    return Schedule(
        scheduler,
        steps,
        first,
        "flow",
        device,
        sigmas=np.linspace(1.0, 1 / steps, steps),
        mu=math.log(shift) if shift else mu,
    )


class Flux(Backbone):
    """FLUX.1-dev, FLUX.1-schnell and everything that loads as a FluxPipeline."""

    family = "flux"
    pipeline_class = FluxPipeline
    without = ("negative_prompt", "time_ids")

    @property
    def model(self):
        return self.pipe.transformer

    @property
    def latent_channels(self) -> int:
        return self.model.config.in_channels // 4

    def _trained_resolution(self) -> int:
        return self.pipe.default_sample_size * self.scale

    def _family_defaults(self) -> Sampling:
        """ScaleDiff's FLUX.1-dev setting; a transformer without guidance embedding is FLUX.1-schnell."""
        schnell = {"num_inference_steps": 4, "guidance_scale": 0.0, "tau": 500, "max_sequence_length": 256}
        dev = {"num_inference_steps": 30, "guidance_scale": 3.5, "tau": 600, "max_sequence_length": 512}
        steps = dev if self.model.config.guidance_embeds else schnell
        return Sampling.of(**steps, lfm_factor=1 / 4, sg_factor=1 / 4, gamma="sigma", local_radius=8)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], sampling: Sampling) -> Conditioning:
        config = self.model.config
        if self._without_text:
            length = sampling.max_sequence_length or 512
            shapes = {
                "prompt_embeds": (length, config.joint_attention_dim),
                "pooled": (config.pooled_projection_dim,),
            }
            return self._random_text(prompts, shapes)
        prompt_embeds, pooled, _ = self.pipe.encode_prompt(
            [prompt + sampling.prompt_suffix for prompt in prompts],
            device=self.device,
            max_sequence_length=sampling.max_sequence_length,
        )
        return {"prompt_embeds": prompt_embeds, "pooled": pooled}

    def schedule(self, sampling: Sampling, base_size: tuple[int, int], first: int = 0) -> Schedule:
        """μ is that of the base's token count at every resolution (methods: at 4096² it would otherwise reach 11.5)."""
        config = self.pipe.scheduler.config
        tokens = base_size[0] * base_size[1] // 4
        share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + share * (config.max_shift - config.base_shift)
        return flow_schedule(self.pipe.scheduler, sampling, first, mu, self.device)

    @torch.no_grad()
    def low_resolution_guidance(
        self, latents: Tensor, size: tuple[int, int], conditioning: Conditioning, sampling: Sampling
    ) -> Guidance:
        return low_resolution_pass(
            self.model,
            pack(latents).to(self.dtype),
            conditioning["pooled"],
            low_size=(latents.shape[2], latents.shape[3]),
            size=size,
            scaled=sampling.lr_anchors,
            **sampling.local_attention(),
        )

    def predict(
        self,
        latents: Tensor,
        schedule: Schedule,
        step: int,
        conditioning: Conditioning,
        sampling: Sampling,
        told_size: tuple[int, int],
    ) -> Tensor:
        """Velocity. Positions are those of the tensor's own grid, so a MultiDiffusion view has them as in training."""
        batch, _, *size = latents.shape
        prompt_embeds = conditioning["prompt_embeds"]
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = torch.full((batch,), sampling.guidance_scale or 0.0, device=latents.device)
        with self.model.cache_context("cond"):
            output = self.model(
                hidden_states=pack(latents).to(self.dtype),
                timestep=(schedule.timesteps[step] / 1000).expand(batch),
                guidance=guidance,
                pooled_projections=conditioning["pooled"],
                encoder_hidden_states=prompt_embeds,
                txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=latents.device),
                img_ids=image_ids((size[0], size[1]), latents.device),
                return_dict=False,
            )[0]
        return unpack(output.float(), (size[0], size[1]))
