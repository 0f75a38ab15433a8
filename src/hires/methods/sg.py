"""Structure Guidance (ScaleDiff, arXiv 2510.25818, section 3.4)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hires.methods.frequency import low_pass
from hires.methods.guides import Guide, Guided
from hires.settings import Gamma, LowPass, Resolved

if TYPE_CHECKING:
    from hires.backbones import Schedule


def structure_guidance(
    x0: Tensor, low_reference: Tensor, weight: float, kernel: LowPass = "bilinear", factor: float = 1 / 8
) -> Tensor:
    """x̂0' = x̂0 + γ_t · (LP(Z_ref) − LP(x̂0)).

    Args:
        x0: the clean estimate of this step (B, C, H, W).
        low_reference: LP(Z_ref) with the same filter; constant over a stage, so computed once by the caller.
        weight: γ_t, see `gamma`.
    """
    return x0 + weight * (low_reference - low_pass(x0, kernel, factor))


def gamma(kind: Gamma, noise_shares: Sequence[float], first: int, step: int) -> float:
    """The guidance weight γ_t at `step` of a stage that starts at step `first` of the whole schedule.

    Args:
        kind: "one_minus_alpha_bar" (the paper, DDPM) and "sigma" (flow matching) are the noise share itself;
            "normalised" divides it by its value at `first`, so that a stage starts at 1 (the reference's SDXL);
            "t_raw" is 1 − step/N, the time before any timestep shift.
        noise_shares: 1 − ᾱ_t (DDPM) or σ_t (flow matching) of all N steps.
    """
    if kind == "t_raw":
        return 1 - step / len(noise_shares)
    if kind == "normalised":
        return noise_shares[step] / noise_shares[first]
    return noise_shares[step]


def guide(stage: Guided) -> Guide:
    """Structure Guidance of a stage of the cascade."""
    return toward(stage.reference, stage.schedule, stage.run.sampling)


def toward(reference: Tensor, schedule: "Schedule", sampling: Resolved) -> Guide:
    """Structure Guidance toward Z_ref (B, C, H, W), with the settings' weight and filter."""
    kind, factor, shares = sampling.gamma, sampling.sg_factor, schedule.noise_shares
    low = low_pass(reference, sampling.low_pass, factor)

    def act(output: Tensor, latents: Tensor, step: int) -> Tensor:
        weight = sampling.gamma_scale * gamma(kind, shares, schedule.first, step)
        x0 = schedule.to_x0(output, latents, step)
        x0 = structure_guidance(x0, low, weight, sampling.low_pass, factor)
        return schedule.from_x0(x0, latents, step)

    return act
