"""Sampling settings: every number that shapes an image beside its model, prompt, seed, variant and size.

A backbone family states its defaults (the papers' values); a model folder, the config and keyword arguments of
`hires.generate` override them, in this order. `None` means "as the layer below says"; `Resolved` has every layer in it.
"""

from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from hires.errors import HiresError, validated

Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]
LowPass = Literal["bilinear", "bicubic", "nearest", "lanczos", "fft", "wavelet"]
Gamma = Literal["one_minus_alpha_bar", "normalised", "sigma", "t_raw"]

SCALE_DIT_SETTINGS = (  # which mean nothing without joint attention of text and image
    "local_radius",
    "local_window",
    "token_order",
    "lr_ratio",
    "lr_keys",
    "lr_neighbours",
    "lr_anchors",
    "lr_adapter",
)

PRESETS: dict[str, dict[str, Any]] = {  # each setting where the model family has it
    "fast": {"linears": "fp8", "text_rows": "global", "step_cache": 3},
}

S = TypeVar("S", bound="Sampling")


class Sampling(BaseModel):
    """Settings of one image. Frozen; unknown names are refused with the nearest right one (`Sampling.of`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # schedule, prompt, guidance
    num_inference_steps: int | None = Field(None, ge=1, description="steps of the whole schedule")
    guidance_scale: float | None = Field(
        None, ge=0, description="CFG weight (SDXL, FLUX.2 base) or distilled guidance (FLUX.1)"
    )
    negative_prompt: str = Field(
        "", description="unconditional prompt of SDXL and FLUX.2 base, and of FLUX.1 under true_cfg_scale"
    )
    true_cfg_scale: float | None = Field(
        None, ge=0, description="FLUX.1: CFG weight on top of distilled guidance; above 1: two model calls a step"
    )
    prompt_suffix: str = Field("", description="appended to every prompt; the FLUX reference adds a quality suffix")
    max_sequence_length: int | None = Field(None, ge=1, description="text tokens of FLUX's T5 or language model")

    # stages above the base: noised to τ, from Z_ref (LFM), guided by it (SG)
    tau: float | None = Field(
        None, gt=0, le=1000, description="a stage is noised to τ and runs the last round(N·τ/1000) of N steps"
    )
    low_pass: LowPass = Field("bilinear", description="low-pass filter of LFM and SG")
    lfm_factor: float | None = Field(None, gt=0, le=1, description="LFM's low-pass frequency factor f")
    sg_factor: float | None = Field(None, gt=0, le=1, description="SG's low-pass frequency factor f")
    upsampling: Interpolation = Field("bicubic", description="interpolation of z_LU and of the decoded image")
    reference: Literal["rgb", "latent"] = Field(
        "rgb", description="Z_ref where LFM is off: z_RU (rgb) or z_LU (latent)"
    )
    posterior: Literal["mode", "sample"] = Field("mode", description="VAE posterior on encode")
    gamma: Gamma | None = Field(
        None, description="SG weight over the schedule: normalised, t_raw; SDXL: one_minus_alpha_bar; FLUX: sigma"
    )
    gamma_scale: float = Field(1.0, ge=0, description="multiplies the SG weight")

    # DiffuseHigh
    dwt_steps: int | None = Field(
        None,
        ge=0,
        description="DiffuseHigh: first steps of a stage that are guided; default: a third (theirs: 5 of 15)",
    )

    # Neighborhood Patch Attention
    text_rows: Literal["patch", "global"] = Field(
        "patch",
        description="NPA: text queries see each window, then the mean (patch), or the whole image once (global)",
    )
    window_scale: float = Field(1.0, gt=0, description="NPA: side of the windows over that of the base's token grid")
    window_overlap: float = Field(0.5, ge=0, lt=1, description="NPA: share that neighbouring windows overlap")
    random_shift: bool = Field(False, description="NPA query window random shifting (ScaleDiff, appendix B.1)")

    # Scale-DiT
    local_radius: int | None = Field(None, ge=1, description="Scale-DiT: tokens that a token sees to each side")
    local_window: int | None = Field(None, ge=1, description="Scale-DiT: side of fixed windows, in place of the radius")
    token_order: Literal["hilbert", "morton", "window", "raster"] = Field(
        "hilbert", description="Scale-DiT: order of the tokens in the kernel; outputs differ by rounding"
    )
    lr_ratio: float = Field(4.0, ge=1, description="Scale-DiT: side of a stage over that of the image that guides it")
    lr_keys: bool = Field(True, description="Scale-DiT: see the low-resolution image; false is an ablation")
    lr_neighbours: Literal["row", "all"] = Field(
        "row", description="Scale-DiT: windows of it beside a token's own (guidance_neighbours of the attention)"
    )
    lr_anchors: bool = Field(
        True, description="Scale-DiT: its tokens stand where their content stands; false: at (i, j)"
    )
    lr_adapter: bool = Field(True, description="Scale-DiT: the adapter is on for it; false is an ablation")

    # guidance and timesteps above the base, where they differ
    stage_guidance_scale: float | None = Field(None, ge=0, description="guidance of the stages above the base")
    stage_shift: float | None = Field(
        None, gt=0, description="FLUX: timestep shift exp μ of the stages above the base; default: that of the base"
    )

    # MultiDiffusion
    view_overlap: float = Field(0.5, ge=0, lt=1, description="share that neighbouring MultiDiffusion views overlap")
    view_batch: int = Field(8, ge=1, description="MultiDiffusion views in one model call")

    # SDXL
    time_ids: Literal["target", "base"] = Field("target", description="SDXL: original_size and target_size")

    # how it is computed
    vae_tiling: bool | None = Field(None, description="tile the VAE; default: above 4 times the base area")
    linears: Literal["full", "fp8"] = Field("full", description="fp8: linear layers of the blocks in 8 bits")
    step_cache: int | None = Field(
        None, ge=2, description="FLUX.1: compute every n-th step (and the first 3), extrapolate the others"
    )
    attention_backend: str = Field(
        "auto", description="backend of hires_kernels: auto, gluon, triton, sdpa, reference, flex"
    )

    @classmethod
    def of(cls, **fields) -> Self:
        """Build settings from keyword arguments; HiresError names a wrong field or value in one line."""
        return validated(cls, "setting", fields)

    def stage_steps(self) -> int | None:
        """Steps of a stage that starts at τ: round(N·τ/1000) of N (paper: 20 of 50); None where N or τ is not stated.

        HiresError where none is left.
        """
        if self.num_inference_steps is None or self.tau is None:
            return None
        return _stage_steps(self.num_inference_steps, self.tau)

    def attention_options(self, kind: str) -> dict[str, Any]:
        """What `use_attention` is told for a kind, but for random shifts and Scale-DiT's guidance."""
        if kind == "npa":
            return {
                "text_rows": self.text_rows,
                "backend": self.attention_backend,
                "window_scale": self.window_scale,
                "window_overlap": self.window_overlap,
            }
        if kind == "scale_dit":
            return {**self.local_attention(), "guidance_neighbours": self.lr_neighbours}
        return {}

    def local_attention(self) -> dict[str, Any]:
        """What both passes of Scale-DiT are told: radius or window, order, backend. A window replaces the radius."""
        return {
            "radius": self.local_radius if self.local_window is None else None,
            "window": self.local_window,
            "order": self.token_order,
            "backend": self.attention_backend,
        }

    def over(self, base: S) -> S:
        """These settings on top of `base`, resolved if it is: a field that was given here and is not None wins."""
        given = {k: v for k, v in self.model_dump(exclude_unset=True).items() if v is not None}
        return type(base).of(**{**base.model_dump(exclude_unset=True), **given})


class Resolved(Sampling):
    """Settings in which those that every image needs are stated: a model's defaults, or settings `over` them.

    A field that may still be None is then off, or as its description says.
    """

    num_inference_steps: int
    guidance_scale: float
    tau: float
    lfm_factor: float
    sg_factor: float
    gamma: Gamma

    @property
    def true_guidance(self) -> float:
        """Weight of classifier-free guidance on FLUX.1; 1 is none."""
        return 1.0 if self.true_cfg_scale is None else self.true_cfg_scale

    def stage_steps(self) -> int:
        return _stage_steps(self.num_inference_steps, self.tau)

    def at_base(self) -> Self:
        """Those of a whole schedule, from noise."""
        return self.model_copy(update={"stage_shift": None})

    def above_base(self, strength: float | None = None) -> Self:
        """Those of a stage above the base; `strength`, in (0, 1], takes the place of τ/1000."""
        guidance = self.guidance_scale if self.stage_guidance_scale is None else self.stage_guidance_scale
        tau = self.tau if strength is None else 1000 * strength
        return self.model_copy(update={"guidance_scale": guidance, "tau": tau})


def _stage_steps(steps: int, tau: float) -> int:
    count = int(steps * tau / 1000 + 0.5)
    if count < 1:
        raise HiresError(
            f"tau = {tau:g} of {steps} steps leaves no step: give tau (strength: its thousandth) from "
            f"{500 / steps:.4g} to 1000, or more steps"
        )
    return count
