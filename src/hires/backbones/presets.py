"""Models by name: where their weights are, and the architecture that random weights are drawn for."""

from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Preset:
    """A named model: `source` is a hub id, or the name of a folder that the package carries (`embedded`)."""

    source: str
    embedded: bool = False


PRESETS = {
    "tiny-flux": Preset("tiny-flux", embedded=True),
    "tiny-sdxl": Preset("tiny-sdxl", embedded=True),
    "flux-dev": Preset("black-forest-labs/FLUX.1-dev"),
    "flux-schnell": Preset("black-forest-labs/FLUX.1-schnell"),
    "sdxl": Preset("stabilityai/stable-diffusion-xl-base-1.0"),
}
