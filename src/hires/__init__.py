"""hires: 4K and 8K images from the diffusion models you already have.

The heavy names (`load`, `generate`, `Backbone`) are imported on first use, so that `import hires` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hires.backbones import Backbone, load
    from hires.generate import generate

__version__ = "0.1.0"
__all__ = ["Backbone", "__version__", "generate", "load"]

_HOME = {"Backbone": "hires.backbones", "load": "hires.backbones", "generate": "hires.generate"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hires' has no attribute {name!r}")
