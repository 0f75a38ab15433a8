"""ScaleDiff (arXiv 2510.25818) as blocks of Modular Diffusers, for its own FLUX and SDXL pipelines.

A stage is LFM → noise to τ → (model with NPA → SG → scheduler) × steps; all that is not in this file is diffusers' own.
`FluxScaleDiffStage` and `StableDiffusionXLScaleDiffStage` double the side of the latents that reach them: insert one or
several before "decode". docs/modular.md has an example.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.modular_pipelines import (
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.flux.before_denoise import FluxRoPEInputsStep
from diffusers.modular_pipelines.flux.decoders import FluxUnpackLatentsStep
from diffusers.modular_pipelines.flux.denoise import FluxDenoiseLoopWrapper, FluxLoopAfterDenoiser, FluxLoopDenoiser
from diffusers.modular_pipelines.modular_pipeline import BlockState, ModularPipeline, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLPrepareAdditionalConditioningStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import (
    StableDiffusionXLDenoiseLoopWrapper,
    StableDiffusionXLLoopAfterDenoiser,
    StableDiffusionXLLoopBeforeDenoiser,
    StableDiffusionXLLoopDenoiser,
)
from torch import Generator, Tensor

from hires.attention import use_attention
from hires.backbones import Backbone
from hires.backbones.flux import Flux, pack, unpack
from hires.backbones.sdxl import SDXL
from hires.cascade import seed_stage
from hires.errors import HiresError
from hires.methods import latent_frequency_mixing, resize
from hires.methods.sg import toward
from hires.settings import Resolved, Sampling

Result = tuple[ModularPipeline, Any]


class _Family:
    """What the blocks need to know of a model family."""

    model_name: str
    family: ClassVar[type[Backbone]]
    model_spec: ClassVar[ComponentSpec]
    scheduler_spec: ClassVar[ComponentSpec]

    @staticmethod
    def to_loop(latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as diffusers' loop holds them."""
        return latents

    @staticmethod
    def from_loop(tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse of `to_loop`; size (H, W)."""
        return tokens


class _Flux(_Family):
    model_name = "flux"
    family = Flux
    model_spec = ComponentSpec("transformer", FluxTransformer2DModel)
    scheduler_spec = ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler)
    to_loop = staticmethod(pack)
    from_loop = staticmethod(unpack)


class _SDXL(_Family):
    model_name = "stable-diffusion-xl"
    family = SDXL
    model_spec = ComponentSpec("unet", UNet2DConditionModel)
    scheduler_spec = ComponentSpec("scheduler", EulerDiscreteScheduler)


def _backbone(family: type[Backbone], components: ModularPipeline) -> Backbone:
    """The family's view of a modular pipeline, which has the components that it needs under the same names."""
    return family(components, "modular", {}, None)


def _generators(given: Generator | Sequence[Generator] | None, batch: int) -> list[Generator]:
    generators = [given] if isinstance(given, Generator) else list(given or [])
    if len(generators) != batch:
        raise HiresError(f"{len(generators)} generators for {batch} images: give one CPU generator per image, seeded")
    for generator in generators:
        if generator.device.type != "cpu":
            raise HiresError(f"a generator on {generator.device}: give CPU generators, which draw the same everywhere")
    return generators


def _settings(backbone: Backbone, block_state: BlockState, names: Sequence[str]) -> Resolved:
    """Inputs that are settings, on top of the family's defaults."""
    given = {name: block_state[name] for name in names if block_state[name] is not None}
    return Sampling.of(**given).over(backbone.defaults)


class _LatentFrequencyMixing(_Family, ModularPipelineBlocks):
    """Enlarge clean latents: Z_ref = z_RU + LP(z_LU) − LP(z_RU) (section 3.3).

    From here on `height` and `width` are the stage's, and `base_size` remembers the base's. Every image's generator is
    seeded for the stage as `hires.cascade.seed_stage` does, so that a stage draws its own numbers.
    """

    settings = ("low_pass", "lfm_factor", "upsampling", "posterior", "vae_tiling")

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderKL), self.model_spec]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "latents", required=True, type_hint=Tensor, description="clean latents [B, C, h, w], normalised"
            ),
            InputParam("generator", description="one CPU generator per image"),
            InputParam("scale_factor", default=2.0, type_hint=float, description="growth of each side, in (1, 2]"),
            *(InputParam(name, description=Sampling.model_fields[name].description) for name in self.settings),
            InputParam("height", type_hint=int),
            InputParam("width", type_hint=int),
            InputParam("base_size", description="(height, width) of the base in latent pixels"),
            InputParam("seeds", description="of the images; default: those of the generators"),
            InputParam("stage", default=0, type_hint=int, description="stages done"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("reference_latents", type_hint=Tensor, description="Z_ref [B, C, H, W]"),
            OutputParam("height", type_hint=int),
            OutputParam("width", type_hint=int),
            OutputParam("base_size"),
            OutputParam("seeds"),
            OutputParam("stage", type_hint=int),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> Result:
        block_state = self.get_block_state(state)
        backbone = _backbone(self.family, components)
        sampling = _settings(backbone, block_state, self.settings)
        latents = block_state.latents.float()
        generators = _generators(block_state.generator, len(latents))
        low_size = (latents.shape[2], latents.shape[3])
        block_state.base_size = block_state.base_size or low_size
        block_state.seeds = block_state.seeds or [generator.initial_seed() for generator in generators]
        block_state.stage += 1
        seed_stage(generators, block_state.seeds, block_state.stage)

        height, width = (round(side * backbone.scale * block_state.scale_factor) for side in low_size)
        for side in (height, width):
            if side % (2 * backbone.scale):
                raise HiresError(
                    f"scale_factor = {block_state.scale_factor:g} makes {height}x{width} (height x width): "
                    f"sides must be multiples of {2 * backbone.scale} px"
                )
        enlarged = resize(backbone.decode(latents, sampling.vae_tiling), (height, width), sampling.upsampling)
        block_state.reference_latents = latent_frequency_mixing(
            resize(latents, backbone.latent_size(height, width), sampling.upsampling),
            backbone.encode(enlarged, generators, sampling.posterior, sampling.vae_tiling),
            sampling.low_pass,
            sampling.lfm_factor,
        )
        block_state.height, block_state.width = height, width
        self.set_block_state(state, block_state)
        return components, state


class FluxLatentFrequencyMixingStep(_Flux, _LatentFrequencyMixing):
    __doc__ = _LatentFrequencyMixing.__doc__


class StableDiffusionXLLatentFrequencyMixingStep(_SDXL, _LatentFrequencyMixing):
    """`FluxLatentFrequencyMixingStep` for SDXL, whose size conditioning is told the stage's size."""

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [*super().intermediate_outputs, OutputParam("original_size"), OutputParam("target_size")]

    def set_block_state(self, state: PipelineState, block_state: BlockState) -> None:
        block_state.original_size = block_state.target_size = (block_state.height, block_state.width)
        super().set_block_state(state, block_state)


class _StageNoise(_Family, ModularPipelineBlocks):
    """Noise Z_ref to step τ, and set the scheduler to the steps that are left (section 4.1).

    diffusers' own image-to-image steps won't do: they shift FLUX's timesteps for the token count of the stage, where
    ScaleDiff has the base's at every size, and leave the shortened step count to the next stage.
    """

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [self.scheduler_spec]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("reference_latents", required=True, type_hint=Tensor),
            InputParam("base_size", required=True),
            InputParam("generator"),
            InputParam("tau", type_hint=float, description=Sampling.model_fields["tau"].description),
            InputParam("num_inference_steps", required=True, type_hint=int, description="steps of the whole schedule"),
            InputParam("schedule_steps", type_hint=int, description="the same, kept for the next stage"),
            InputParam("dtype", type_hint=torch.dtype),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", type_hint=Tensor, description="noisy latents of the stage"),
            OutputParam("timesteps", type_hint=Tensor),
            OutputParam("num_inference_steps", type_hint=int, description="steps of the stage"),
            OutputParam("schedule_steps", type_hint=int),
            OutputParam("schedule", description="hires.backbones.Schedule of the stage"),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> Result:
        block_state = self.get_block_state(state)
        backbone = _backbone(self.family, components)
        block_state.schedule_steps = block_state.schedule_steps or block_state.num_inference_steps
        steps = Sampling.of(num_inference_steps=block_state.schedule_steps)
        sampling = steps.over(_settings(backbone, block_state, ["tau"]))
        first = backbone.first_step(sampling)
        schedule = backbone.schedule(sampling, block_state.base_size, first)
        components.update_components(scheduler=schedule.scheduler)
        reference = block_state.reference_latents
        noise = backbone.noise(_generators(block_state.generator, len(reference)), tuple(reference.shape[2:]))
        block_state.latents = self.to_loop(schedule.add_noise(reference, noise)).to(block_state.dtype)
        block_state.schedule, block_state.timesteps = schedule, schedule.timesteps[first:]
        block_state.num_inference_steps = len(block_state.timesteps)
        self.set_block_state(state, block_state)
        return components, state


class FluxStageNoiseStep(_Flux, _StageNoise):
    __doc__ = _StageNoise.__doc__


class StableDiffusionXLStageNoiseStep(_SDXL, _StageNoise):
    __doc__ = _StageNoise.__doc__


class _StructureGuidance(_Family, ModularPipelineBlocks):
    """Between the denoiser and the scheduler's step: x̂0 + γ_t·(LP(Z_ref) − LP(x̂0)) (section 3.4)."""

    settings = ("gamma", "gamma_scale", "low_pass", "sg_factor")

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("reference_latents", required=True, type_hint=Tensor),
            InputParam("schedule", required=True, description="hires.backbones.Schedule of the stage"),
            *(InputParam(name, description=Sampling.model_fields[name].description) for name in self.settings),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, block_state: BlockState, i: int, t: Tensor) -> Result:
        reference, schedule = block_state.reference_latents, block_state.schedule
        if i == 0:
            backbone = _backbone(self.family, components)
            block_state.guide = toward(reference, schedule, _settings(backbone, block_state, self.settings))
        size = (reference.shape[2], reference.shape[3])
        output, latents = (self.from_loop(x.float(), size) for x in (block_state.noise_pred, block_state.latents))
        guided = block_state.guide(output, latents, schedule.first + i)
        block_state.noise_pred = self.to_loop(guided).to(block_state.noise_pred.dtype)
        return components, block_state


class FluxLoopStructureGuidance(_Flux, _StructureGuidance):
    __doc__ = _StructureGuidance.__doc__


class StableDiffusionXLLoopStructureGuidance(_SDXL, _StructureGuidance):
    __doc__ = _StructureGuidance.__doc__


class _NeighborhoodPatchAttention(_Family, LoopSequentialPipelineBlocks):
    """A denoising loop in which self-attention is Neighborhood Patch Attention (section 3.1)."""

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [
            *super().loop_inputs,
            InputParam("reference_latents", required=True, type_hint=Tensor, description="says the stage's size"),
            InputParam("base_size", required=True, description="(height, width) in latent pixels: the window"),
            InputParam("text_rows", default="patch", description=Sampling.model_fields["text_rows"].description),
            InputParam(
                "attention_backend", default="auto", description=Sampling.model_fields["attention_backend"].description
            ),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> Result:
        block_state = self.get_block_state(state)
        model = getattr(components, self.model_spec.name)
        size = tuple(block_state.reference_latents.shape[2:])
        options = {"text_rows": block_state.text_rows, "backend": block_state.attention_backend}
        with use_attention(model, "npa", size, block_state.base_size, **options):
            return super().__call__(components, state)


class FluxNeighborhoodPatchAttentionLoop(_Flux, _NeighborhoodPatchAttention, FluxDenoiseLoopWrapper):
    __doc__ = _NeighborhoodPatchAttention.__doc__


class StableDiffusionXLNeighborhoodPatchAttentionLoop(
    _SDXL, _NeighborhoodPatchAttention, StableDiffusionXLDenoiseLoopWrapper
):
    __doc__ = _NeighborhoodPatchAttention.__doc__


class FluxScaleDiffDenoiseStep(FluxNeighborhoodPatchAttentionLoop):
    """diffusers' FLUX loop with NPA around it and SG in it."""

    block_classes: ClassVar = [FluxLoopDenoiser, FluxLoopStructureGuidance, FluxLoopAfterDenoiser]
    block_names: ClassVar = ["denoiser", "structure_guidance", "after_denoiser"]


class StableDiffusionXLScaleDiffDenoiseStep(StableDiffusionXLNeighborhoodPatchAttentionLoop):
    """diffusers' SDXL loop with NPA around it and SG in it."""

    block_classes: ClassVar = [
        StableDiffusionXLLoopBeforeDenoiser,
        StableDiffusionXLLoopDenoiser,
        StableDiffusionXLLoopStructureGuidance,
        StableDiffusionXLLoopAfterDenoiser,
    ]
    block_names: ClassVar = ["before_denoiser", "denoiser", "structure_guidance", "after_denoiser"]


class FluxScaleDiffStage(SequentialPipelineBlocks):
    """One stage of ScaleDiff's cascade on FLUX: clean latents [B, C, h, w] in, twice the side out."""

    model_name = "flux"
    block_classes: ClassVar = [
        FluxLatentFrequencyMixingStep,
        FluxStageNoiseStep,
        FluxRoPEInputsStep,
        FluxScaleDiffDenoiseStep,
        FluxUnpackLatentsStep,
    ]
    block_names: ClassVar = [
        "latent_frequency_mixing",
        "stage_noise",
        "prepare_rope_inputs",
        "denoise",
        "unpack_latents",
    ]


class StableDiffusionXLScaleDiffStage(SequentialPipelineBlocks):
    """One stage of ScaleDiff's cascade on SDXL: clean latents [B, C, h, w] in, twice the side out."""

    model_name = "stable-diffusion-xl"
    block_classes: ClassVar = [
        StableDiffusionXLLatentFrequencyMixingStep,
        StableDiffusionXLStageNoiseStep,
        StableDiffusionXLPrepareAdditionalConditioningStep,
        StableDiffusionXLScaleDiffDenoiseStep,
    ]
    block_names: ClassVar = ["latent_frequency_mixing", "stage_noise", "prepare_add_cond", "denoise"]
