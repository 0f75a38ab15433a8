"""Stage: reference images of one size, which the scores compare with."""

import io
import sys
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hires import layout, provenance, shards
from hires.config import Config
from hires.data.pictures import Contents, Missing, contents
from hires.data.prompts import Prompt
from hires.errors import HiresError, redacted, unknown
from hires.execution.threads import one_core_each
from hires.files.storage import digest
from hires.files.untrusted import read_picture
from hires.shards import Item
from hires.stages import VERSIONS
from hires.stages.images import encode

if TYPE_CHECKING:
    from PIL import Image

DOWNLOADS = 8  # at a time


def run(config: Config, height: int, width: int) -> None:
    """Make the reference image of every prompt at one size (pixels); finished ones are kept.

    A scene is rendered at that size. A picture is downloaded, or taken from `prompts.pictures`, cut around the centre
    to the aspect ratio and resized (Lanczos). Prompts without one are listed as `missing` in the manifest, with why,
    and tried again by the next run: scores that compare with references leave them out, images are made all the same.
    Declared output: `layout.reference_manifest`.
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
    with shards.counted(f"references {height}x{width}", len(items)) as made:
        reasons = _make(config, todo, height, width)
        made.append(len(todo) - len(reasons))
        there = [item for item in items if item.finished()]
        if not there:
            raise HiresError(
                f"none of the {len(items)} prompts has a picture ({reasons[items[0].prompt.id]}): is the network "
                "there? Your own server is asked with prompts.private_addresses = true"
            )
        head["missing"] = [item.prompt.id for item in items if item not in there]
        if reasons:
            head["reasons"] = reasons
            print(f"references {height}x{width}: {len(there)} of {len(items)} survive", file=sys.stderr)
        shards.write_manifest(layout.reference_manifest(config, height, width), head, "images", there)


def _make(config: Config, items: Sequence[Item], height: int, width: int) -> dict[str, str]:
    """Make what can be made; id -> why of what can't."""
    origin = provenance.record(config)
    read = contents(config.prompts.pictures, config.prompts.private_addresses)

    def make(item: Item) -> str | None:
        try:
            picture, origins = reference(item.prompt, height, width, read)
        except Missing as missing:
            return redacted(str(missing))
        item.finish(encode(picture, "png", {"url": redacted(item.prompt.url or "")}), provenance=origin, **origins)
        return None

    with one_core_each(DOWNLOADS) as pool:
        reasons = list(tqdm(pool.map(make, items), total=len(items), desc="references", unit="image", disable=None))
    return {item.prompt.id: reason for item, reason in zip(items, reasons) if reason is not None}


def reference(prompt: Prompt, height: int, width: int, read: Contents) -> tuple["Image.Image", dict[str, str]]:
    """The image of a prompt at height × width pixels: its scene, or its picture, cut around the centre.

    Beside it what tells the picture's file from every other; nothing for a scene. Raises `Missing`.
    """
    if (prompt.url or "").startswith("scene:"):
        from hires.scenes import reference_image, view_of_url

        scene_id, camera = view_of_url(prompt.url or "")
        return reference_image(scene_id, height, width, camera), {}
    from PIL import Image, ImageOps

    content = read(prompt)
    try:
        picture = read_picture(io.BytesIO(content), prompt.url)
    except HiresError:
        raise Missing("no image, or a broken one") from None
    made = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return made, {"source_sha256": sha256(content).hexdigest()}
