"""The configuration: one typed model of everything that a reproduction is made from.

`load_config` reads a YAML file, validates it once and turns every mistake into one line that says where it is, what was
given and what is allowed.
"""

from hires.config.model import (
    BackboneEntry,
    Columns,
    Compute,
    Config,
    Filters,
    ImageSet,
    Metrics,
    Name,
    Names,
    Patch,
    Prompts,
    ScenePool,
    Section,
    Size,
    Study,
)
from hires.config.reading import load_config, load_section

__all__ = [
    "BackboneEntry",
    "Columns",
    "Compute",
    "Config",
    "Filters",
    "ImageSet",
    "Metrics",
    "Name",
    "Names",
    "Patch",
    "Prompts",
    "ScenePool",
    "Section",
    "Size",
    "Study",
    "load_config",
    "load_section",
]
