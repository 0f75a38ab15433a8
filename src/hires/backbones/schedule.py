"""The noise schedule of one stage: levels, clean estimates, re-noising and steps, on a copy of the user's scheduler."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import EulerDiscreteScheduler
from torch import Generator, Tensor

from hires.errors import HiresError

Prediction = Literal["flow", "epsilon", "v_prediction"]


class Schedule:
    """N steps, of which a stage runs `first` … N − 1. A noisy latent at step i is x = alphas[i]·x0 + sigmas[i]·noise.

    α and σ are in the scheduler's own scaling: (1 − σ, σ) for flow matching, (1, σ) for Euler, (√ᾱ, √(1 − ᾱ)) for
    DDIM and DPM-Solver. All formulas below hold in each of them.
    """

    def __init__(
        self,
        scheduler: Any,
        num_inference_steps: int,
        first: int = 0,
        prediction: Prediction = "epsilon",
        device: torch.device | str = "cpu",
        **timestep_options: Any,
    ):
        """Copy `scheduler` and set it to `first`; `timestep_options` go to its `set_timesteps`.

        HiresError where the scheduler calls the model more than once a step: such a schedule can't start anywhere.
        """
        self.scheduler = copy.deepcopy(scheduler)
        if "sigmas" in timestep_options:
            self.scheduler.set_timesteps(device=device, **timestep_options)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device, **timestep_options)
        self.timesteps: Tensor = self.scheduler.timesteps
        if len(self.timesteps) != num_inference_steps or self.scheduler.order != 1:
            raise HiresError(
                f"scheduler {type(scheduler).__name__} takes {len(self.timesteps)} model calls for "
                f"{num_inference_steps} steps, so a stage can't start in the middle: use one with a call a step, "
                "for example EulerDiscreteScheduler, DDIMScheduler or DPMSolverMultistepScheduler"
            )
        self.num_inference_steps = num_inference_steps
        self.first = first
        self.prediction = prediction
        self.alphas, self.sigmas = self._levels()
        self._cancels = isinstance(scheduler, EulerDiscreteScheduler) and scheduler.config.rescale_betas_zero_snr
        self._takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        self._begin(first)

    def _begin(self, step: int) -> None:
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(step)

    def _levels(self) -> tuple[list[float], list[float]]:
        """Signal and noise shares of every step: `add_noise` of (one, zero) and of (zero, one)."""
        if self.prediction == "flow":
            sigmas = self.scheduler.sigmas[: self.num_inference_steps].tolist()
            return [1 - sigma for sigma in sigmas], sigmas
        probe = copy.deepcopy(self.scheduler)
        one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        alphas, sigmas = [], []
        for step, timestep in enumerate(self.timesteps.cpu()):
            if hasattr(probe, "set_begin_index"):
                probe.set_begin_index(step)
            alphas.append(probe.add_noise(one, zero, timestep[None]).item())
            sigmas.append(probe.add_noise(zero, one, timestep[None]).item())
        return alphas, sigmas

    @property
    def noise_shares(self) -> list[float]:
        """1 − ᾱ_t of every step (DDPM), or σ_t (flow matching)."""
        if self.prediction == "flow":
            return self.sigmas
        return [sigma**2 / (alpha**2 + sigma**2) for alpha, sigma in zip(self.alphas, self.sigmas, strict=True)]

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the latents that a full schedule starts from."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def add_noise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The noisy latents (B, C, H, W) that the stage's first step sees."""
        return self.alphas[self.first] * x0 + self.sigmas[self.first] * noise

    def scale_model_input(self, latents: Tensor, step: int) -> Tensor:
        """Latents as the model wants to see them."""
        if hasattr(self.scheduler, "scale_model_input"):
            return self.scheduler.scale_model_input(latents, self.timesteps[step])
        return latents

    def to_x0(self, output: Tensor, latents: Tensor, step: int) -> Tensor:
        """The clean estimate x̂0 that a model output implies at this step."""
        alpha, sigma = self.alphas[step], self.sigmas[step]
        if self.prediction == "flow":
            return latents - sigma * output
        if self.prediction == "epsilon":
            return (latents - sigma * output) / alpha
        square = alpha**2 + sigma**2
        return (alpha / square) * latents - (sigma / square**0.5) * output

    def from_x0(self, x0: Tensor, latents: Tensor, step: int) -> Tensor:
        """The model output that implies the clean estimate x̂0: the inverse of `to_x0`."""
        alpha, sigma = self.alphas[step], self.sigmas[step]
        if self.prediction == "flow":
            return (latents - x0) / sigma
        if self.prediction == "epsilon":
            return (latents - alpha * x0) / sigma
        square = alpha**2 + sigma**2
        return ((alpha / square) * latents - x0) * (square**0.5 / sigma)

    def step(self, output: Tensor, latents: Tensor, step: int, generators: Sequence[Generator]) -> Tensor:
        """The latents after this step. Steps are taken in order, each once; one generator per image.

        diffusers' Euler step, x + (x − x̂0)/σ·(σ' − σ), cancels where σ = 4096 stands for pure noise: float32 loses four
        digits, and others on a GPU than on a CPU. There it is taken as x̂0 + σ'/σ·(x − x̂0).
        """
        options: dict[str, Any] = {"generator": list(generators)} if self._takes_generator else {}
        following = self.scheduler.step(output, self.timesteps[step], latents, return_dict=False, **options)[0]
        if not self._cancels:
            return following
        x0, ratio = self.to_x0(output, latents, step), float(self.scheduler.sigmas[step + 1]) / self.sigmas[step]
        return x0 + ratio * (latents - x0)
