"""4K and 8K images from the diffusion models you already have.

    backbone = hires.load("tiny-flux")  # or hires.Backbone.from_pipeline(pipe)
    images = hires.generate(backbone, "three red rings on a brick wall", height=512, width=512)
    hires.save(images[0], "rings.png")

Public names are imported on first use, so that `import hires` stays cheap.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hires.backbones import Backbone, load
    from hires.errors import HiresError
    from hires.generation import generate
    from hires.provenance.records import save
    from hires.variants import Variant

__version__ = "0.1.0"
__all__ = ["Backbone", "HiresError", "Variant", "__version__", "generate", "load", "save"]

# Image processors of pipelines that hires never feeds; the default installation does without torchvision.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

_HOME = {
    "Backbone": "hires.backbones",
    "HiresError": "hires.errors",
    "Variant": "hires.variants",
    "load": "hires.backbones",
    "generate": "hires.generation",
    "save": "hires.provenance.records",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hires' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
