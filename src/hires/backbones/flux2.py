"""FLUX.2 [klein]: flow matching, text from a language model, 32-channel latents whose 2×2 patches are normalised."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Generator, Tensor

from hires.additions.extras import Control
from hires.attention.flux import image_ids
from hires.backbones.base import Conditioning, draw
from hires.backbones.flux import PackedTransformer, flow_schedule, pack, unpack
from hires.backbones.schedule import Schedule
from hires.settings import SCALE_DIT_SETTINGS, Resolved


class Flux2Klein(PackedTransformer):
    """FLUX.2 [klein], distilled (4 steps, no guidance) or base (classifier-free guidance).

    Latents are patches of the pipeline put back in their places: 8 pixels each, so that an upsampled latent has the
    neighbours that its picture has.
    """

    family = "flux2"
    pipeline_class = Flux2KleinPipeline
    unused_settings: tuple[str, ...] = ("time_ids", "true_cfg_scale", "step_cache", *SCALE_DIT_SETTINGS)

    def __init__(self, pipe: Any, name: str, hints: dict[str, Any], revision: str | None):
        super().__init__(pipe, name, hints, revision)
        if pipe.config.is_distilled:
            self.unused_settings += ("guidance_scale", "stage_guidance_scale", "negative_prompt")

    def _family_defaults(self) -> Resolved:
        """The model cards' steps and guidance. τ is the project's choice, on no image of these models yet: with the
        base's shift of exp 2.02 the last 20 of 50 steps start at σ = 0.83, as ScaleDiff's stages do on FLUX.1-dev.
        """
        steps = {"num_inference_steps": 50, "guidance_scale": 4.0, "tau": 400}
        if self.pipe.config.is_distilled:
            steps = {"num_inference_steps": 4, "guidance_scale": 1.0, "tau": 500}
        return Resolved.of(**steps, max_sequence_length=512, lfm_factor=1 / 4, sg_factor=1 / 4, gamma="sigma")

    def _guided(self, sampling: Resolved) -> bool:
        return sampling.guidance_scale > 1 and not self.pipe.config.is_distilled

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], sampling: Resolved) -> Conditioning:
        guided = self._guided(sampling)
        length: Any = sampling.max_sequence_length  # stated by every FLUX
        if self._without_text:
            shape = (length, self.model.config.joint_attention_dim)
            names = ["prompt_embeds", "negative_prompt_embeds"] if guided else ["prompt_embeds"]
            return self._random_text(prompts, dict.fromkeys(names, shape))
        texts = {"prompt_embeds": [prompt + sampling.prompt_suffix for prompt in prompts]}
        if guided:
            texts["negative_prompt_embeds"] = [sampling.negative_prompt] * len(prompts)
        return {
            name: self.pipe.encode_prompt(text, device=self.device, max_sequence_length=length)[0]
            for name, text in texts.items()
        }

    def schedule(self, sampling: Resolved, base_size: tuple[int, int], first: int = 0) -> Schedule:
        """μ is that of the base's token count and the number of steps, at every resolution."""
        mu = compute_empirical_mu(base_size[0] * base_size[1] // 4, sampling.num_inference_steps)
        return flow_schedule(self.flow_scheduler, sampling, first, mu, self.device)

    def noise(self, generators: Sequence[Generator], size: tuple[int, int]) -> Tensor:
        """Drawn patch by patch, as the pipeline does."""
        patches = draw(generators, (4 * self.latent_channels, size[0] // 2, size[1] // 2), self.device)
        return F.pixel_shuffle(patches, 2)

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
        """Velocity, combined by classifier-free guidance where the model has it."""
        batch, _, *sides = latents.shape
        size = (sides[0], sides[1])
        tokens = pack(latents).to(self.dtype)
        image = F.pad(image_ids((size[0] // 2, size[1] // 2), latents.device), (0, 1))

        def velocity(context: str, text: Tensor) -> Tensor:
            index = torch.arange(text.shape[1], device=latents.device, dtype=torch.float32)
            with self.model.cache_context(context):
                output = self.model(
                    hidden_states=tokens,
                    timestep=(schedule.timesteps[step] / 1000).expand(batch),
                    encoder_hidden_states=text,
                    txt_ids=F.pad(index[:, None], (3, 0)),
                    img_ids=image,
                    return_dict=False,
                )[0]
            return unpack(output.float(), size)

        conditional = velocity("cond", conditioning["prompt_embeds"])
        if not self._guided(sampling):
            return conditional
        unconditional = velocity("uncond", conditioning["negative_prompt_embeds"])
        return unconditional + sampling.guidance_scale * (conditional - unconditional)

    def _patch_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel of a 2×2 patch: the running ones of the VAE's batch norm."""
        vae = self.pipe.vae
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        mean, std = (x.view(1, -1, 1, 1).to(self.device, torch.float32) for x in (vae.bn.running_mean, std))
        return mean, std

    def _normalise(self, z: Tensor) -> Tensor:
        mean, std = self._patch_statistics()
        return F.pixel_shuffle((F.pixel_unshuffle(z, 2) - mean) / std, 2)

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._patch_statistics()
        return F.pixel_shuffle(F.pixel_unshuffle(latents, 2) * std + mean, 2)
