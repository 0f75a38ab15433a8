"""Stage: reference images of one size, which the scores compare with."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hires import layout, provenance, shards
from hires.config import Config
from hires.download import fetch
from hires.errors import HiresError, redacted, unknown
from hires.shards import Item
from hires.stages import VERSIONS
from hires.stages.images import encode
from hires.storage import digest
from hires.untrusted import read_picture

if TYPE_CHECKING:
    from PIL import Image

DOWNLOADS = 8  # at a time


def run(config: Config, height: int, width: int) -> None:
    """Make the reference image of every prompt at one size (pixels); finished ones are kept.

    A scene is rendered at that size. A web address is downloaded, cut around the centre to the aspect ratio and
    resized (Lanczos); addresses that no longer answer are listed as `missing` in the manifest, and tried again by the
    next run. Declared output: `layout.reference_manifest`.
    """
    amounts = {(h, w): n for h, w, n in layout.references(config)}
    if (height, width) not in amounts:
        raise unknown("size of references", f"{height}x{width}", [f"{h}x{w}" for h, w in amounts])
    head: dict[str, Any] = {"version": VERSIONS["references"], "height": height, "width": width}
    items = [
        Item(
            prompt,
            0,
            layout.reference(config, height, width, prompt.id),
            digest({"url": prompt.url, **head}),
            VERSIONS["references"],
        )
        for prompt in shards.drawn(config)[: amounts[height, width]]
    ]
    todo = shards.unfinished(items)
    with shards.told(f"references {height}x{width}", len(items)) as made:
        made.append(sum(_make(config, todo, height, width)))
        there = [item for item in items if item.finished()]
        if not there:
            raise HiresError(
                f"none of the {len(items)} addresses of the prompts gave an image: is the network there? Your own "
                "server is asked with prompts.private_addresses = true"
            )
        head["missing"] = [item.prompt.id for item in items if item not in there]
        shards.write_manifest(layout.reference_manifest(config, height, width), head, "images", there)


def _make(config: Config, items: Sequence[Item], height: int, width: int) -> list[bool]:
    """Whether each item could be made."""
    origin = provenance.record(config)

    def make(item: Item) -> bool:
        url = item.prompt.url or ""
        picture = reference(url, height, width, config.prompts.private_addresses)
        if picture is None:
            return False
        item.finish(encode(picture, "png", {"url": redacted(url)}), provenance=origin)
        return True

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        return list(tqdm(pool.map(make, items), total=len(items), desc="references", unit="image", disable=None))


def reference(url: str, height: int, width: int, private: bool = False) -> "Image.Image | None":
    """The image at `scene://<id>`, or at a web address, at height × width pixels; None where nothing answers.

    `private`: as of `hires.download.fetch`.
    """
    if url.startswith("scene:"):
        from hires.scenes import reference_image, view_of_url

        scene_id, camera = view_of_url(url)
        return reference_image(scene_id, height, width, camera)
    from PIL import Image, ImageOps

    content = fetch(url, private)
    if content is None:
        return None
    try:
        picture = read_picture(io.BytesIO(content), url)
    except HiresError:  # no image
        return None
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
