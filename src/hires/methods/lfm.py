"""Latent Frequency Mixing (ScaleDiff, arXiv 2510.25818, section 3.3)."""

from torch import Tensor

from hires.methods.frequency import low_pass
from hires.settings import LowPass


def latent_frequency_mixing(
    latent_upsampled: Tensor, rgb_upsampled: Tensor, kernel: LowPass = "bilinear", factor: float = 1 / 8
) -> Tensor:
    """Z_ref = z_RU + LP(z_LU) − LP(z_RU): low frequencies of the upsampled latent, high ones of the upsampled image.

    LP is linear, so it is applied once, to the difference.

    Args:
        latent_upsampled: z_LU (B, C, H, W), the clean latent, upsampled.
        rgb_upsampled: z_RU (B, C, H, W), the VAE's encoding of the decoded, upsampled image.
        kernel, factor: the low-pass filter; the paper has bilinear, 1/8 for SDXL and 1/4 for FLUX.
    """
    return rgb_upsampled + low_pass(latent_upsampled - rgb_upsampled, kernel, factor)
