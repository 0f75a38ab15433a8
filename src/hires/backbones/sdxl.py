"""Stable Diffusion XL: U-Net, classifier-free guidance, size conditioning, any one-call-a-step scheduler."""

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from hires.backbones.base import Backbone, Conditioning
from hires.backbones.schedule import Schedule
from hires.errors import HiresError
from hires.settings import SCALE_DIT, Sampling


class SDXL(Backbone):
    """SDXL-base and everything that loads as a StableDiffusionXLPipeline; epsilon and v-prediction."""

    family = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    cuda_dtype = torch.float16
    without = ("max_sequence_length", "text_rows", *SCALE_DIT, "stage_shift")

    @property
    def model(self):
        return self.pipe.unet

    @property
    def latent_channels(self) -> int:
        return self.model.config.in_channels

    def _trained_resolution(self) -> int:
        return self.model.config.sample_size * self.scale

    def _family_defaults(self) -> Sampling:
        """ScaleDiff's SDXL setting."""
        return Sampling.of(
            num_inference_steps=50,
            guidance_scale=7.5,
            tau=400,
            lfm_factor=1 / 8,
            sg_factor=1 / 8,
            gamma="one_minus_alpha_bar",
        )

    def _guided(self, sampling: Sampling) -> bool:
        return (sampling.guidance_scale or 0) > 1

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], sampling: Sampling) -> Conditioning:
        """No negative prompt means what the pipeline makes of None: zeros, for SDXL-base."""
        guided = self._guided(sampling)
        if self._without_text:
            config = self.model.config
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            positive_shapes = {"prompt_embeds": (77, config.cross_attention_dim), "pooled": (width,)}
            negative_shapes = {f"negative_{name}": shape for name, shape in positive_shapes.items()}
            return self._random_text(prompts, positive_shapes | (negative_shapes if guided else {}))
        positive, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            [prompt + sampling.prompt_suffix for prompt in prompts],
            device=self.device,
            do_classifier_free_guidance=guided,
            negative_prompt=sampling.negative_prompt or None,
        )
        conditioning = {"prompt_embeds": positive, "pooled": pooled}
        if guided:
            conditioning |= {"negative_prompt_embeds": negative, "negative_pooled": negative_pooled}
        return conditioning

    def schedule(self, sampling: Sampling, base_size: tuple[int, int], first: int = 0) -> Schedule:
        prediction = self.pipe.scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise HiresError(f"scheduler prediction_type {prediction!r}: allowed: epsilon, v_prediction")
        return Schedule(self.pipe.scheduler, sampling.num_inference_steps or 1, first, prediction, self.device)

    def predict(
        self,
        latents: Tensor,
        schedule: Schedule,
        step: int,
        conditioning: Conditioning,
        sampling: Sampling,
        told_size: tuple[int, int],
    ) -> Tensor:
        """CFG-combined prediction. Rows of the model's batch: all unconditional ones, then all conditional ones."""
        text, pooled = conditioning["prompt_embeds"], conditioning["pooled"]
        guided = self._guided(sampling)
        if guided:
            latents = torch.cat([latents, latents])
            text = torch.cat([conditioning["negative_prompt_embeds"], text])
            pooled = torch.cat([conditioning["negative_pooled"], pooled])
        time_ids = torch.tensor([[*told_size, 0, 0, *told_size]], dtype=text.dtype)
        time_ids = time_ids.to(latents.device, non_blocking=True)  # the host goes on
        output = self.model(
            schedule.scale_model_input(latents, step).to(self.dtype),
            schedule.timesteps[step],
            encoder_hidden_states=text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids.expand(len(latents), -1)},
            return_dict=False,
        )[0].float()
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + sampling.guidance_scale * (conditional - unconditional)
