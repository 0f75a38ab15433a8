"""A procedural, captioned world: pictures of any size in which more pixels show more detail.

A scene follows from its id; it can be captioned, rendered at any size through any camera, and read back
from a picture (how many objects, which colours).
"""

from hires.scenes.captions import VOCABULARY, caption, in_view
from hires.scenes.parquet import scene_of_url, view_of_url, write_parquet
from hires.scenes.parser import Found, Reading, parse, parse_batch
from hires.scenes.render import reference_image, render
from hires.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    MATERIALS,
    SHAPES,
    SIZES,
    WHOLE,
    Camera,
    Object,
    Scene,
    close_up,
    random_camera,
    scene,
    scene_ids,
    split,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "MATERIALS",
    "SHAPES",
    "SIZES",
    "VOCABULARY",
    "WHOLE",
    "Camera",
    "Found",
    "Object",
    "Reading",
    "Scene",
    "caption",
    "close_up",
    "in_view",
    "parse",
    "parse_batch",
    "random_camera",
    "reference_image",
    "render",
    "scene",
    "scene_ids",
    "scene_of_url",
    "split",
    "view_of_url",
    "write_parquet",
]
