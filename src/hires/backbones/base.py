"""What the cascade needs to know about a model family, on the user's own diffusers pipeline."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import Generator, Tensor, nn

from hires.additions.adapters import switch_adapter
from hires.additions.extras import NO_EXTRAS, Control, Extras, controlnets
from hires.attention import Guidance
from hires.backbones.schedule import Schedule
from hires.errors import HiresError, unknown
from hires.execution.blending import whole_strips
from hires.execution.parallel import shared_tiles
from hires.execution.residual import fused_blocks
from hires.files.untrusted import read_hints
from hires.settings import PRESETS, Gamma, Resolved, Sampling

# prompt_embeds, pooled_prompt_embeds, image_prompt_0, …, and negative_… of each under guidance: the batch is first
Conditioning = dict[str, Tensor]


def draw(generators: Sequence[Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal (B, *shape) in float32: each image from its own CPU generator."""
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators]).to(device)


class Backbone(ABC):
    """A loaded pipeline and what its family adds. Latents are (B, C, H, W) float32, in the model's scaling.

    Attributes:
        pipe: the diffusers pipeline, as the user set it up: LoRAs, dtype, offloading, compiled modules stay.
        name, revision: where the weights come from; revision is None for a pipeline that was made elsewhere.
        base_resolution: side in pixels of the square that the model was trained at.
        size_multiple: every side of a stage is a multiple of it, in pixels.
        defaults: sampling settings that hold where a call gives none.
        adapters: where the LoRAs of variants lie (name → folder or file) that aren't in the model's own folder.
        vae_backend: of hires_kernels, for the VAE's residual blocks; "reference" leaves them to diffusers.
    """

    families: ClassVar[dict[str, type["Backbone"]]] = {}  # by name; a subclass that states its `family` is added

    # What a family states, beside the abstract methods.
    family: ClassVar[str]
    pipeline_class: ClassVar[type]
    siblings: ClassVar[tuple[type, ...]] = ()  # pipelines with the same components, under the same names
    unused_settings: tuple[str, ...] = ()  # settings that mean nothing to the family
    gammas: ClassVar[tuple[Gamma, ...]] = ("sigma", "normalised", "t_raw")  # weights of Structure Guidance
    cuda_dtype: ClassVar[torch.dtype] = torch.bfloat16  # what its weights are loaded in on a GPU
    controlnet_class: ClassVar[Any] = None
    controlnet_pipeline: ClassVar[Any] = None
    controlnet_facts: ClassVar[tuple[str, ...]] = ()  # what its configuration shares with the model's

    def __init_subclass__(cls) -> None:
        if "family" in vars(cls):  # what families share has none
            Backbone.families[cls.family] = cls

    def __init__(self, pipe: Any, name: str, hints: dict[str, Any], revision: str | None):
        self.pipe = pipe
        self.name = name
        self.revision = revision
        self._hints = hints
        self._without_text = revision == "random" and pipe.text_encoder is None
        self.base_resolution = int(hints.get("base_resolution", self._trained_resolution()))
        self.size_multiple = int(hints.get("size_multiple", 64))
        self.defaults = Sampling.of(**hints.get("sampling", {})).over(self._family_defaults())
        self.adapters: dict[str, Path] = {}
        self.vae_backend = "auto"
        self._check_pipeline()
        if not self._without_text:
            self._check_text()

    def __repr__(self) -> str:
        base = f"{self.base_resolution}x{self.base_resolution}"
        return (
            f"<{type(self).__name__} {self.name!r}: base {base}, sides in multiples of {self.size_multiple}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}>"
        )

    @classmethod
    def from_pipeline(
        cls, pipe: Any, name: str | None = None, hints: dict[str, Any] | None = None, revision: str | None = None
    ) -> Self:
        """The backbone of a loaded pipeline, which it keeps and never copies.

        Args:
            pipe: a pipeline of a known family, or its ControlNet or image-to-image sibling, or of a subclass;
                HiresError names those that are known.
            name: what records call the model; default: where the pipeline was loaded from.
            hints: {"base_resolution", "size_multiple", "sampling"}; default: `hires.json` in the pipeline's folder, and
                what the model's configuration says: 1024 for FLUX. {"base_resolution": 512} is for one trained at 512².
        """
        source = getattr(pipe, "name_or_path", "") or type(pipe).__name__
        if hints is None:
            hints = read_hints(Path(source))
        for family in Backbone.families.values():
            if isinstance(pipe, (family.pipeline_class, *family.siblings)):
                return family(pipe, name or source, hints, revision)  # type: ignore[return-value]
        known = ", ".join(
            kind.__name__ for family in Backbone.families.values() for kind in (family.pipeline_class, *family.siblings)
        )
        raise HiresError(f"pipeline class {type(pipe).__name__} is not supported: allowed: {known}")

    # --- what a family says -------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def model(self) -> Any:
        """The transformer or U-Net."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of unpacked latents."""

    @abstractmethod
    def _trained_resolution(self) -> int: ...

    @abstractmethod
    def _family_defaults(self) -> Resolved: ...

    @abstractmethod
    def encode_prompt(self, prompts: list[str], sampling: Resolved) -> Conditioning:
        """Everything that the model is told beside latents, time and size, one row per prompt."""

    @abstractmethod
    def schedule(self, sampling: Resolved, base_size: tuple[int, int], first: int = 0) -> Schedule:
        """The schedule of a stage that starts at step `first`; base_size (latent pixels) sets FLUX's shift μ."""

    @abstractmethod
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
        """Model output (B, C, H, W) in float32, guidance applied.

        `target_size`: (height, width) in pixels, which SDXL's conditioning is told as its original and target size.
        """

    def low_resolution_guidance(
        self, latents: Tensor, size: tuple[int, int], conditioning: Conditioning, sampling: Resolved
    ) -> Guidance:
        """What Scale-DiT's steps at `size` (latent pixels) see of clean low-resolution `latents` (B, C, h, w)."""
        raise HiresError(
            f"attention 'scale_dit' needs joint attention of text and image: allowed: flux, got {self.family}"
        )

    def _random_text(self, prompts: list[str], shapes: dict[str, tuple[int, ...]]) -> Conditioning:
        """Stand-in for text encoders that a random-weight model lacks: noise seeded by the prompt."""
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7]) for prompt in prompts]
        generators = [Generator().manual_seed(seed) for seed in seeds]
        return {name: draw(generators, shape, self.device).to(self.dtype) for name, shape in shapes.items()}

    def control_maps(
        self, images: list[Any], size: tuple[int, int], n: int, generators: Sequence[Generator], sampling: Resolved
    ) -> list[Tensor]:
        """What the ControlNets read of control images, at a size in pixels: one (n, C, h, w) each (see `Control`)."""
        raise HiresError(f"ControlNets of {self.family} models are not known here: leave the control image out")

    def image_prompts(self, extras: Extras, n: int, sampling: Resolved) -> Conditioning:
        """Embeddings of the IP-Adapters' images for n prompts, to go beside those of the text."""
        raise HiresError(f"IP-Adapters of {self.family} models are not known here: unload it")

    # --- shared -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model runs, which under offloading is not where its weights rest."""
        return torch.device(self.pipe._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def scale(self) -> int:
        """Pixels a latent pixel, per side."""
        return self.pipe.vae_scale_factor

    @property
    def controlnets(self) -> list[Any]:
        """The pipeline's ControlNets."""
        return controlnets(getattr(self.pipe, "controlnet", None))

    @property
    def ip_adapters(self) -> int:
        """How many IP-Adapters are loaded."""
        return getattr(getattr(self.model, "encoder_hid_proj", None), "num_ip_adapters", 0)

    def _check_pipeline(self) -> None:
        """Raise HiresError for a model of another task, and a ControlNet of another model."""
        theirs = self.pipe.vae.config.latent_channels
        if self.latent_channels != theirs:
            raise HiresError(
                f"the model reads latents of {self.latent_channels} channels and the VAE makes {theirs}: inpainting "
                "and control models take more than noise, which is not known here: give a text-to-image model"
            )
        for net in self.controlnets:
            self._check_controlnet(net)

    def _check_text(self) -> None:
        """Raise HiresError for a pipeline that was loaded without what encodes prompts."""
        text = ("text_encoder", "tokenizer")
        missing = [name for name, part in self.pipe.components.items() if part is None and name.startswith(text)]
        if missing:
            raise HiresError(
                f"the pipeline has no {', '.join(missing)}: load it whole, as prompts are encoded here; "
                "pipe.enable_model_cpu_offload() takes text encoders off the GPU when they are done"
            )

    def _check_controlnet(self, net: Any) -> None:
        """Raise HiresError unless a ControlNet belongs to this model."""
        wanted, net = self.controlnet_class, unwrap_module(net)
        if wanted is None or not isinstance(net, wanted):
            allowed = "none" if wanted is None else wanted.__name__
            raise HiresError(f"a {type(net).__name__} on a {self.family} model: allowed: {allowed}")
        for fact in self.controlnet_facts:
            theirs, ours = net.config.get(fact), self.model.config.get(fact)
            if json.dumps(theirs) != json.dumps(ours):
                raise HiresError(
                    f"the ControlNet is of another architecture: its {fact} is {theirs}, this model's {ours}"
                )

    def with_controlnets(self, nets: list[Any]) -> Self:
        """The same model in its family's ControlNet pipeline; HiresError for a ControlNet of another model."""
        given = nets[0] if len(nets) == 1 else nets
        pipe = self.controlnet_pipeline.from_pipe(self.pipe, controlnet=given, dtype=self.pipe.dtype)
        return type(self)(pipe, self.name, self._hints, self.revision)

    def check_extras(self, extras: Extras) -> None:
        """Raise HiresError unless the pipeline has a ControlNet and an IP-Adapter for these images, and just those."""
        extras.check(getattr(self.pipe, "controlnet", None), self.ip_adapters)

    def conditioning(self, prompts: list[str], sampling: Resolved, extras: Extras = NO_EXTRAS) -> Conditioning:
        """Text and image prompts together, in the model's dtype."""
        with self.full_precision():
            text = self.encode_prompt(prompts, sampling)
            both = text | self.image_prompts(extras, len(prompts), sampling) if self.ip_adapters else text
        return {name: value.to(self.dtype) for name, value in both.items()}  # encoders may have a dtype of their own

    def control(
        self, extras: Extras, size: tuple[int, int], generators: Sequence[Generator], sampling: Resolved
    ) -> Control | None:
        """What the ControlNets see at a stage of `size` (height, width) in pixels, for an image per generator."""
        if not extras.control_images:
            return None
        with self.full_precision():
            maps = self.control_maps(extras.control_images, size, len(generators), generators, sampling)
        return Control(maps, extras)

    def require_adapter(self, name: str) -> None:
        """Have the LoRA `name` loaded: by the user, or now, switched off, from where `adapters` says, else from
        adapters/<name> in the model's folder.

        HiresError where it is in none of these places.
        """
        if name in {loaded for names in self.pipe.get_list_adapters().values() for loaded in names}:
            return
        source = self.pipe.name_or_path
        place = self.adapters.get(name, Path(source) / "adapters" / name if source else None)
        if place is None or not place.exists():
            missing = "" if place is None else f", and {place} isn't there"
            raise HiresError(
                f"the variant needs the adapter {name!r}{missing}: load it with "
                f"pipe.load_lora_weights(path, adapter_name={name!r}), or train one with hires train scale-dit"
            )
        from hires.additions.lora import load_lora  # peft: slow to import

        load_lora(self.pipe, place, name)
        switch_adapter(self.model, name, on=False)

    def noise(self, generators: Sequence[Generator], size: tuple[int, int]) -> Tensor:
        """Standard normal latents (B, C, H, W), each image's from its own generator, drawn as its pipeline draws."""
        return draw(generators, (self.latent_channels, *size), self.device)

    def free(self) -> None:
        """What a pipeline does after a call: take offloaded parts off the device, and forget what hooks cached."""
        self.pipe.maybe_free_model_hooks()

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in latent pixels of a size in pixels."""
        return height // self.scale, width // self.scale

    def preset(self, name: str | None) -> dict[str, Any]:
        """The settings of `hires.settings.PRESETS` that mean something to this family; none without a name."""
        if name is None:
            return {}
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        return {key: value for key, value in PRESETS[name].items() if key not in self.unused_settings}

    def check_settings(self, sampling: Sampling) -> None:
        """Raise HiresError where a setting is given that this family has no use for."""
        for name in self.unused_settings:
            given = getattr(sampling, name)
            if name in sampling.model_fields_set and given != Sampling.model_fields[name].default:
                raise HiresError(f"setting {name} = {given!r} means nothing to a {self.family} model: leave it out")
        if sampling.gamma not in (None, *self.gammas):
            raise HiresError(
                f"setting gamma = {sampling.gamma!r}: the schedule of a {self.family} model knows no such weight: "
                f"allowed: {', '.join(self.gammas)}"
            )

    def first_step(self, sampling: Resolved) -> int:
        """Index of the first step of a stage: the last round(N·τ/1000) of N steps are run (paper: 20 of 50)."""
        return sampling.num_inference_steps - sampling.stage_steps()

    @torch.no_grad()
    def encode(
        self,
        pixels: Tensor,
        generators: Sequence[Generator] = (),
        posterior: Literal["mode", "sample"] = "mode",
        tiling: bool | None = None,
    ) -> Tensor:
        """Clean latents of images (B, 3, H, W) in [−1, 1]; `generators` are used by posterior "sample" only."""
        latents = []
        with self._vae(pixels, tiling) as vae:
            drawing = iter(generators)
            for images in pixels.split(self._at_once(pixels.shape[2] * pixels.shape[3])):
                distribution = vae.encode(images.to(self.device, vae.dtype)).latent_dist
                latent = distribution.mode().float()
                if posterior == "sample":
                    noise = draw([*islice(drawing, len(images))], latent.shape[1:], latent.device)
                    latent = latent + distribution.std.float() * noise
                latents.append(latent)
        return self._normalise(torch.cat(latents))

    @torch.no_grad()
    def decode(self, latents: Tensor, tiling: bool | None = None) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1], float32, of clean latents."""
        with self._vae(latents, tiling, self.scale) as vae:
            images = [
                vae.decode(self._denormalise(z).to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1)
                for z in latents.to(self.device, torch.float32).split(
                    self._at_once(latents.shape[2] * latents.shape[3] * self.scale**2)
                )
            ]
        return torch.cat(images)

    def _at_once(self, pixels: int) -> int:
        """Images of so many pixels that the VAE takes in one call, in the memory of one of 1024² with 128 channels. On
        a CPU one: there is no launch to save, and convolutions of a batch round otherwise."""
        if self.device.type == "cpu":
            return 1
        return max(1, 2**27 // (pixels * self.pipe.vae.config.block_out_channels[0]))

    def _normalise(self, z: Tensor) -> Tensor:
        """The model's latents of those that the VAE encodes to."""
        mean, scale = self.latent_statistics()
        return (z - mean) * scale

    def _denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `_normalise`."""
        mean, scale = self.latent_statistics()
        return latents / scale + mean

    def latent_statistics(self) -> tuple[Tensor | float, Tensor | float]:
        """(mean, scale) with latents = (z − mean)·scale; per channel where the VAE has them so. Not of FLUX.2."""
        config = self.pipe.vae.config
        scale = config.scaling_factor
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean, std = (
                torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
            )
            return mean, scale / std
        return config.shift_factor or 0.0, scale

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Convolutions of a float32 model in float32, as on a CPU, and not in TF32's 10 bits."""
        cudnn: Any = torch.backends.cudnn
        if self.dtype != torch.float32 or cudnn.conv.fp32_precision != "tf32":
            yield
            return
        recurrent = cudnn.rnn.fp32_precision
        cudnn.allow_tf32 = False  # of both kinds: where they differ, reading it raises
        try:
            yield
        finally:
            cudnn.allow_tf32 = True
            cudnn.rnn.fp32_precision = recurrent

    @contextmanager
    def _vae(self, x: Tensor, tiling: bool | None, factor: int = 1) -> Iterator[Any]:
        """The VAE, in float32 where float16 overflows (SDXL), tiled above 4 times the base area or as asked."""
        vae = self.pipe.vae
        dtype, was_tiled = vae.dtype, vae.use_tiling
        upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        if tiling is None:
            tiling = self.defaults.vae_tiling
        if tiling is None:
            tiling = was_tiled or x.shape[2] * x.shape[3] * factor**2 > 4 * self.base_resolution**2
        vae.use_tiling = tiling
        if upcast:
            nn.Module.to(vae, torch.float32)  # not diffusers' own, which warns each time
        try:
            fused = fused_blocks(vae, self.vae_backend)
            with self.full_precision(), shared_tiles(vae, x.shape[2:], factor), whole_strips(vae), fused:
                yield vae
        finally:
            vae.use_tiling = was_tiled
            if upcast:
                nn.Module.to(vae, dtype)
