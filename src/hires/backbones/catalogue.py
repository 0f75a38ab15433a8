"""Models by name: where their weights are, and the architecture that random weights are drawn for.

`configs` holds the published configurations, as diffusers reads them: transformer/config.json, vae/config.json and
scheduler/scheduler_config.json of the models' own repositories. flux2-klein is FLUX.2-klein-4B, whose transformer has
3.88 billion parameters and whose VAE is that of all FLUX.2 models; the text encoders are left out.
"""

from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Named:
    """A model with a name: `source` is a hub id, or the name of a folder that the package carries (`embedded`).

    `download`: gigabytes that the hub sends; `parameters`: billions, text encoders and VAE included; `gated`: whether
    the hub asks for a login and the owner's consent.
    """

    source: str
    embedded: bool = False
    download: float = 0.0
    parameters: float = 0.0
    gated: bool = False


MODELS = {
    "tiny-flux": Named("tiny-flux", embedded=True),
    "tiny-sdxl": Named("tiny-sdxl", embedded=True),
    "flux-dev": Named("black-forest-labs/FLUX.1-dev", download=33.7, parameters=16.87, gated=True),
    "flux-schnell": Named("black-forest-labs/FLUX.1-schnell", download=33.7, parameters=16.86, gated=True),
    "flux2-klein": Named("black-forest-labs/FLUX.2-klein-4B", download=16.0, parameters=7.98),
    "flux2-klein-base": Named("black-forest-labs/FLUX.2-klein-base-4B", download=16.0, parameters=7.98),
    "sdxl": Named("stabilityai/stable-diffusion-xl-base-1.0", download=13.9, parameters=3.47),
}
