"""FLUX.1: flow matching, guidance embedding, latents packed 2×2 into tokens."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    FluxControlNetImg2ImgPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from torch import Generator, Tensor

from hires.additions.extras import Control, Extras
from hires.attention import Guidance, low_resolution_pass
from hires.attention.flux import image_ids
from hires.backbones.base import Backbone, Conditioning
from hires.backbones.schedule import Schedule
from hires.errors import HiresError
from hires.settings import Resolved, Sampling

# as FluxPipeline has them where its scheduler doesn't state them
SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> tokens (B, H/2 · W/2, 4C): each token holds a 2×2 patch, channel-major."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pack`; size (H, W) in latent pixels."""
    (b, _, c), (h, w) = tokens.shape, size
    return tokens.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def flow_schedule(scheduler: Any, sampling: Resolved, first: int, mu: float, device: torch.device) -> Schedule:
    """σ from 1 to 1/N in even steps, shifted by exp μ, or by the stage_shift that is asked for."""
    steps, shift = sampling.num_inference_steps, sampling.stage_shift
    if shift and not scheduler.config.use_dynamic_shifting:
        raise HiresError(
            "stage_shift: this model's scheduler has a shift of its own (use_dynamic_shifting is off): leave it out"
        )
    return Schedule(
        scheduler,
        steps,
        first,
        "flow",
        device,
        sigmas=np.linspace(1.0, 1 / steps, steps),
        mu=math.log(shift) if shift else mu,
    )


class PackedTransformer(Backbone):
    """A transformer over latents that are packed 2×2 into tokens."""

    @property
    def model(self):
        return self.pipe.transformer

    @property
    def latent_channels(self) -> int:
        return self.model.config.in_channels // 4

    @property
    def flow_scheduler(self) -> Any:
        """The pipeline's scheduler; HiresError unless it takes the σ and μ of flow matching."""
        scheduler = self.pipe.scheduler
        takes = inspect.signature(scheduler.set_timesteps).parameters
        flow = scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"
        if not {"sigmas", "mu"} <= takes.keys() or not flow or not scheduler.config.get("use_flow_sigmas", True):
            raise HiresError(
                f"scheduler {type(scheduler).__name__} doesn't take flow matching's σ and μ as it is set up: allowed: "
                "FlowMatchEulerDiscreteScheduler, or UniPCMultistepScheduler with prediction_type='flow_prediction' "
                "and use_flow_sigmas=True"
            )
        return scheduler

    def _trained_resolution(self) -> int:
        return self.pipe.default_sample_size * self.scale


class Flux(PackedTransformer):
    """FLUX.1-dev, FLUX.1-schnell and everything that loads as a FluxPipeline."""

    family = "flux"
    pipeline_class = FluxPipeline
    siblings = (FluxControlNetPipeline, FluxImg2ImgPipeline, FluxControlNetImg2ImgPipeline)
    unused_settings = ("time_ids",)
    controlnet_class = FluxControlNetModel
    controlnet_pipeline = FluxControlNetPipeline
    controlnet_facts = (
        "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim",
        "axes_dims_rope",
    )  # fmt: skip

    def _family_defaults(self) -> Resolved:
        """ScaleDiff's FLUX.1-dev setting, but for the text length: the model's own 512 (theirs: 256).

        A transformer without guidance embedding is FLUX.1-schnell.
        """
        schnell = {"num_inference_steps": 4, "guidance_scale": 0.0, "tau": 500, "max_sequence_length": 256}
        dev = {"num_inference_steps": 30, "guidance_scale": 3.5, "tau": 600, "max_sequence_length": 512}
        steps = dev if self.model.config.guidance_embeds else schnell
        return Resolved.of(**steps, lfm_factor=1 / 4, sg_factor=1 / 4, gamma="sigma", local_radius=8)

    def check_settings(self, sampling: Sampling) -> None:
        super().check_settings(sampling)
        if sampling.negative_prompt and sampling.over(self.defaults).true_guidance <= 1:
            raise HiresError(
                f"negative_prompt = {sampling.negative_prompt!r} means nothing to distilled guidance: leave it out, or "
                "set true_cfg_scale above 1, at twice the time"
            )

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], sampling: Resolved) -> Conditioning:
        names = ("prompt_embeds", "pooled_prompt_embeds")
        negative_names = tuple(f"negative_{name}" for name in names) if sampling.true_guidance > 1 else ()
        length: Any = sampling.max_sequence_length  # stated by every FLUX
        if self._without_text:
            config = self.model.config
            shapes = ((length, config.joint_attention_dim), (config.pooled_projection_dim,))
            return self._random_text(prompts, dict(zip(names + negative_names, 2 * shapes, strict=False)))

        def embeddings(texts: list[str]) -> tuple[Tensor, Tensor]:
            return self.pipe.encode_prompt(texts, None, device=self.device, max_sequence_length=length)[:2]

        conditioning = dict(zip(names, embeddings([prompt + sampling.prompt_suffix for prompt in prompts])))
        if negative_names:
            conditioning |= zip(negative_names, embeddings([sampling.negative_prompt] * len(prompts)))
        return conditioning

    @torch.no_grad()
    def image_prompts(self, extras: Extras, n: int, sampling: Resolved) -> Conditioning:
        """Under true guidance the unconditional side sees a black image, as in the pipeline."""

        def embeddings(prefix: str, images: list[Any] | None, embeds: Sequence[Tensor] | None) -> Conditioning:
            found = self.pipe.prepare_ip_adapter_image_embeds(images, embeds and list(embeds), self.device, n)
            return {f"{prefix}image_prompt_{index}": value for index, value in enumerate(found)}

        conditioning = embeddings("", extras.ip_adapter_images, extras.ip_adapter_image_embeds)
        if sampling.true_guidance > 1:
            if self.pipe.image_encoder is None:
                raise HiresError("true_cfg_scale beside an IP-Adapter needs its image encoder: load it with one")
            black = np.zeros((self.base_resolution, self.base_resolution, 3), dtype=np.uint8)
            conditioning |= embeddings("negative_", [black] * self.ip_adapters, None)
        return conditioning

    @torch.no_grad()
    def control_maps(
        self, images: list[Any], size: tuple[int, int], n: int, generators: Sequence[Generator], sampling: Resolved
    ) -> list[Tensor]:
        """Latents, but pixels for a ControlNet that has an input block of its own (XLabs)."""
        maps = []
        for image in images:
            pixels = self.pipe.image_processor.preprocess(image, height=size[0], width=size[1]).expand(n, -1, -1, -1)
            if self.controlnets[0].input_hint_block is None:
                maps.append(self.encode(pixels, generators, sampling.posterior, sampling.vae_tiling))
            else:
                maps.append(pixels.to(self.device))
        return maps

    def schedule(self, sampling: Resolved, base_size: tuple[int, int], first: int = 0) -> Schedule:
        """μ is that of the base's token count at every resolution, as in ScaleDiff; that of 4096² would be 11.5."""
        scheduler = self.flow_scheduler
        config = SHIFT | dict(scheduler.config)
        tokens = base_size[0] * base_size[1] // 4
        share = (tokens - config["base_image_seq_len"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
        mu = config["base_shift"] + share * (config["max_shift"] - config["base_shift"])
        return flow_schedule(scheduler, sampling, first, mu, self.device)

    @torch.no_grad()
    def low_resolution_guidance(
        self, latents: Tensor, size: tuple[int, int], conditioning: Conditioning, sampling: Resolved
    ) -> Guidance:
        return low_resolution_pass(
            self.model,
            pack(latents).to(self.dtype),
            conditioning["pooled_prompt_embeds"],
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
        sampling: Resolved,
        target_size: tuple[int, int],
        control: Control | None = None,
    ) -> Tensor:
        """Velocity. Positions are those of the tensor's own grid, so a MultiDiffusion view has them as in training."""
        batch, _, *size = latents.shape
        tokens = pack(latents).to(self.dtype)
        guidance = torch.full((batch,), sampling.guidance_scale, device=latents.device)

        def call(model: Any, config: Any, prefix: str = "", **more: Any) -> Any:
            """The transformer, or the ControlNets."""
            prompt_embeds = conditioning[f"{prefix}prompt_embeds"]
            return model(
                hidden_states=tokens,
                timestep=(schedule.timesteps[step] / 1000).expand(batch),
                guidance=guidance if config.guidance_embeds else None,
                pooled_projections=conditioning[f"{prefix}pooled_prompt_embeds"],
                encoder_hidden_states=prompt_embeds,
                txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=latents.device),
                img_ids=image_ids((size[0] // 2, size[1] // 2), latents.device),
                return_dict=False,
                **more,
            )

        residuals: dict[str, Any] = {}
        if control and any(scales := control.scales(step, schedule.num_inference_steps)):
            net = self.controlnets[0]
            blocks, single_blocks = call(self.pipe.controlnet, net.config, **self._control(control, scales, batch))
            residuals = {
                "controlnet_block_samples": blocks,
                "controlnet_single_block_samples": single_blocks,
                "controlnet_blocks_repeat": net.input_hint_block is not None,
            }

        def velocity(prefix: str) -> Tensor:
            names = [f"{prefix}image_prompt_{index}" for index in range(self.ip_adapters)]
            images = {"ip_adapter_image_embeds": [conditioning[name] for name in names]} if names else None
            output = call(self.model, self.model.config, prefix, joint_attention_kwargs=images, **residuals)
            return unpack(output[0].float(), (size[0], size[1]))

        with self.model.cache_context("cond"):
            output = velocity("")
        if sampling.true_guidance <= 1:
            return output
        with self.model.cache_context("uncond"):
            negative = velocity("negative_")
        return negative + sampling.true_guidance * (output - negative)

    def _control(self, control: Control, scales: list[float], batch: int) -> dict[str, Any]:
        """The arguments of the ControlNet alone, or lists of them for diffusers' wrapper of several."""
        modes = control.extras.each("control_mode")
        hint = self.controlnets[0].input_hint_block is not None
        maps = [(chart if hint else pack(chart)).to(self.dtype) for chart in control.maps]
        if self.pipe.controlnet is self.controlnets[0]:
            mode = None if modes[0] is None else torch.full((batch, 1), modes[0], device=self.device)
            return {"controlnet_cond": maps[0], "controlnet_mode": mode, "conditioning_scale": scales[0]}
        rows = [torch.full((batch,), -1 if mode is None else mode, device=self.device) for mode in modes]
        return {"controlnet_cond": maps, "controlnet_mode": rows, "conditioning_scale": scales}
