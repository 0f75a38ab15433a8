"""Stage: crops of the first images of a set, small enough to be kept where the images are not."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hires import layout, shards
from hires.config import Config, ImageSet
from hires.files.storage import replacing
from hires.files.untrusted import read_picture

SIDE = 128  # pixels, of a crop and of the reduced image beside it
PROMPTS = 2


def run(config: Config, images: ImageSet) -> None:
    """Write `layout.crops` of one image set, and those of its references where they are missing."""
    ids = [prompt.id for prompt in shards.drawn(config)[: min(PROMPTS, images.n)]]
    size = images.height, images.width
    target = layout.reference_crops(config, *size)
    if not target.exists():
        _write(target, [layout.reference(config, *size, prompt) for prompt in ids])
    _write(layout.crops(config, images), [layout.image(config, images, prompt, images.seeds[0]) for prompt in ids])


def _write(target: Path, files: Sequence[Path]) -> None:
    with replacing(target) as temporary:
        strip([read_picture(file, file) for file in files if file.exists()]).save(
            temporary, "WEBP", quality=75, method=4
        )


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Each picture reduced to SIDE pixels a side, and next to it the SIDE × SIDE pixels of its centre, unresized."""
    sheet = Image.new("RGB", (2 * SIDE * len(pictures), SIDE))
    for index, picture in enumerate(pictures):
        left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (2 * index * SIDE, 0))
        sheet.paste(picture.crop((left, top, left + SIDE, top + SIDE)), ((2 * index + 1) * SIDE, 0))
    return sheet
