"""Stable Diffusion XL: U-Net, classifier-free guidance, size conditioning, any one-call-a-step scheduler."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from torch import Generator, Tensor

from hires.additions.extras import Control, Extras
from hires.backbones.base import Backbone, Conditioning
from hires.backbones.schedule import Schedule
from hires.errors import HiresError
from hires.settings import SCALE_DIT_SETTINGS, Resolved


class SDXL(Backbone):
    """SDXL-base and everything that loads as a StableDiffusionXLPipeline; epsilon and v-prediction."""

    family = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    cuda_dtype = torch.float16
    siblings = (
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
    )
    gammas = ("one_minus_alpha_bar", "normalised", "t_raw")
    unused_settings = (
        "max_sequence_length", "text_rows", *SCALE_DIT_SETTINGS, "stage_shift", "true_cfg_scale", "step_cache",
    )  # fmt: skip
    controlnet_class = ControlNetModel
    controlnet_pipeline = StableDiffusionXLControlNetPipeline
    controlnet_facts = (
        "in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type",
        "projection_class_embeddings_input_dim",
    )  # fmt: skip

    @property
    def model(self):
        return self.pipe.unet

    @property
    def latent_channels(self) -> int:
        return self.model.config.in_channels

    def _trained_resolution(self) -> int:
        return self.model.config.sample_size * self.scale

    def _family_defaults(self) -> Resolved:
        """ScaleDiff's SDXL setting."""
        return Resolved.of(
            num_inference_steps=50,
            guidance_scale=7.5,
            tau=400,
            lfm_factor=1 / 8,
            sg_factor=1 / 8,
            gamma="one_minus_alpha_bar",
        )

    def _guided(self, sampling: Resolved) -> bool:
        return sampling.guidance_scale > 1

    def _ever_guided(self, sampling: Resolved) -> bool:
        """At the base or above."""
        return self._guided(sampling) or self._guided(sampling.above_base())

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], sampling: Resolved) -> Conditioning:
        """No negative prompt means what the pipeline makes of None: zeros, for SDXL-base."""
        guided = self._ever_guided(sampling)
        if self._without_text:
            config = self.model.config
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            positive_shapes = {"prompt_embeds": (77, config.cross_attention_dim), "pooled_prompt_embeds": (width,)}
            negative_shapes = {f"negative_{name}": shape for name, shape in positive_shapes.items()}
            return self._random_text(prompts, positive_shapes | (negative_shapes if guided else {}))
        positive, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            [prompt + sampling.prompt_suffix for prompt in prompts],
            device=self.device,
            do_classifier_free_guidance=guided,
            negative_prompt=sampling.negative_prompt or None,
        )
        conditioning = {"prompt_embeds": positive, "pooled_prompt_embeds": pooled}
        if guided:
            conditioning |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
        return conditioning

    @torch.no_grad()
    def image_prompts(self, extras: Extras, n: int, sampling: Resolved) -> Conditioning:
        guided = self._ever_guided(sampling)
        images, embeds = extras.ip_adapter_images, extras.ip_adapter_image_embeds
        for given in embeds or ():
            if guided and len(given) != 2:
                raise HiresError(
                    f"ip_adapter_image_embeds of shape {tuple(given.shape)}: classifier-free guidance needs two rows, "
                    "unconditional and conditional"
                )
        found = self.pipe.prepare_ip_adapter_image_embeds(images, embeds, self.device, n, guided)
        conditioning = {f"image_prompt_{index}": value[-n:] for index, value in enumerate(found)}
        if guided:
            conditioning |= {f"negative_image_prompt_{index}": value[:n] for index, value in enumerate(found)}
        return conditioning

    def control_maps(
        self, images: list[Any], size: tuple[int, int], n: int, generators: Sequence[Generator], sampling: Resolved
    ) -> list[Tensor]:
        preprocess = self.pipe.control_image_processor.preprocess
        return [
            preprocess(image, height=size[0], width=size[1]).expand(n, -1, -1, -1).to(self.device) for image in images
        ]

    def _check_pipeline(self) -> None:
        super()._check_pipeline()
        if self.model.config.time_cond_proj_dim is not None:
            raise HiresError("the U-Net is told its guidance (time_cond_proj_dim), which is not known here")
        if self.pipe.config.get("requires_aesthetics_score"):
            raise HiresError("this is SDXL's refiner, which makes no image of its own: give the base model")

    def _check_controlnet(self, net: Any) -> None:
        super()._check_controlnet(net)
        if net.config.global_pool_conditions:
            raise HiresError("the ControlNet pools its residuals (global_pool_conditions), which is not known here")

    def schedule(self, sampling: Resolved, base_size: tuple[int, int], first: int = 0) -> Schedule:
        scheduler = self.pipe.scheduler
        if not hasattr(scheduler, "add_noise"):
            raise HiresError(
                f"scheduler {type(scheduler).__name__} is not of SDXL's kind (it has no add_noise): use, for example, "
                "EulerDiscreteScheduler, DDIMScheduler or DPMSolverMultistepScheduler"
            )
        prediction = scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise HiresError(f"scheduler prediction_type {prediction!r}: allowed: epsilon, v_prediction")
        return Schedule(scheduler, sampling.num_inference_steps, first, prediction, self.device)

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
        """CFG-combined prediction. Rows of the model's batch: all unconditional ones, then all conditional ones."""
        guided = self._guided(sampling)

        def rows(name: str) -> Tensor:
            return torch.cat([conditioning[f"negative_{name}"], conditioning[name]]) if guided else conditioning[name]

        if guided:
            latents = torch.cat([latents, latents])
        text = rows("prompt_embeds")
        time_ids = torch.tensor([[*target_size, 0, 0, *target_size]], dtype=text.dtype)
        time_ids = time_ids.to(latents.device, non_blocking=True)  # the host goes on
        added: dict[str, Any] = {
            "text_embeds": rows("pooled_prompt_embeds"),
            "time_ids": time_ids.expand(len(latents), -1),
        }
        inputs = schedule.scale_model_input(latents, step).to(self.dtype)
        residuals: dict[str, Any] = {}
        if control and any(scales := control.scales(step, schedule.num_inference_steps)):
            maps = [torch.cat([chart, chart]) if guided else chart for chart in control.maps]
            maps = [chart.to(self.controlnets[0].dtype) for chart in maps]
            alone = self.pipe.controlnet is self.controlnets[0]
            down, mid = self.pipe.controlnet(
                inputs,
                schedule.timesteps[step],
                encoder_hidden_states=text,
                controlnet_cond=maps[0] if alone else maps,
                conditioning_scale=scales[0] if alone else scales,
                added_cond_kwargs=added,
                return_dict=False,
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        if self.ip_adapters:
            added["image_embeds"] = [rows(f"image_prompt_{index}") for index in range(self.ip_adapters)]
        output = self.model(
            inputs,
            schedule.timesteps[step],
            encoder_hidden_states=text,
            added_cond_kwargs=added,
            return_dict=False,
            **residuals,
        )[0].float()
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + sampling.guidance_scale * (conditional - unconditional)
