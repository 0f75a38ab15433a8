"""Features of one image set: extracted once, stored, and all that the scores are computed from."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hires.errors import HiresError
from hires.execution.threads import one_core_each
from hires.files.storage import Damaged, read_bytes, write_bytes
from hires.metrics.networks import Clip, FeatureNetwork
from hires.metrics.pixels import Pixels, Reader, Source
from hires.scenes import COLOURS, Camera, in_view, scene

VERSION = 2
CHUNK = 8  # images that one thread reads and embeds at a time
CROP_TENSORS = ("crop_features", "crop_logits")


@dataclass(frozen=True)
class Crops:
    """Crops at native resolution: side in pixels, how many of one image, seed of the boxes."""

    size: int
    per_image: int
    seed: int


@dataclass(frozen=True)
class Features:
    """What was extracted from n images.

    tensors: features (n, d), logits (n, classes), clip_image and clip_text (n, e), float32; bands (n, 3), log₁₀ power,
    float64; row_steps (n, H − 1), column_steps (n, W − 1), gradient energy across each line; low (n, 3, LOW, LOW), the
    low band; cut (n,), whether the prompt was cut; with crops crop_features (n·k, d), crop_logits (n·k, classes); for
    scenes objects and true_objects (n, colours), how many of each colour.
    metadata: networks, views, crops; SHA-256 and crop boxes (top, left) of every file by <id>-<seed>.
    """

    ids: list[str]
    seeds: list[int]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> "Features":
        """The features of some of the images."""
        per_image = self.metadata["crops"]["per_image"] if self.metadata["crops"] else 0
        index = torch.tensor(rows, dtype=torch.long)
        crop_index = (index[:, None] * per_image + torch.arange(per_image)).flatten()
        tensors = {name: t[crop_index if name in CROP_TENSORS else index] for name, t in self.tensors.items()}
        return Features([self.ids[i] for i in rows], [self.seeds[i] for i in rows], tensors, self.metadata)

    def save(self, path: Path) -> None:
        """Write safetensors, whole or not at all; the same features give the same bytes."""
        record = {"version": VERSION, "ids": self.ids, "seeds": self.seeds, **self.metadata}
        record["digest"] = _digest(record, self.tensors)
        write_bytes(path, save(self.tensors, {"hires": json.dumps(record, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; `Damaged` where the file changed since."""
        if not path.exists():
            raise HiresError(f"{path} does not exist: extract the features first (hires features)")
        data = read_bytes(path)
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            record, tensors = json.loads(header["__metadata__"]["hires"]), load(data)
            whole = record.pop("digest") == _digest(record, tensors)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{path} is damaged: no features ({error})") from None
        if not whole:
            raise Damaged(f"{path} is damaged: it is not what was written")
        if record.pop("version") != VERSION:
            raise HiresError(f"{path}: features of another version; delete the file and run `hires features` again")
        return cls(record.pop("ids"), record.pop("seeds"), tensors, record)


def _digest(record: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()


@torch.inference_mode()
def extract(
    sources: Sequence[Source],
    prompts: Sequence[str],
    network: FeatureNetwork,
    clip: Clip,
    crops: Crops | None = None,
    scenes: Sequence[tuple[int, Camera]] | None = None,
    threads: int = 1,
    aliased: bool = False,
) -> Features:
    """Read every image once and keep what the scores need.

    Args:
        sources: n images, all of one size.
        prompts: n prompts.
        crops: None leaves the patch scores out. HiresError unless their size is the network's input.
        scenes: n scene ids with their cameras where the prompts are scenes; the images are then parsed.
        threads: that read images and run the networks. The result does not depend on it.
        aliased: also the features of images that were resized without antialiasing, as some protocols have it.
    """
    if crops and crops.size != network.crop:
        raise HiresError(
            f"metrics.patch.size = {crops.size}: {network.name} takes crops of {network.crop} px, unresized"
        )
    box = (crops.size, crops.per_image, crops.seed) if crops else None
    if aliased and network.view.size is None:
        raise HiresError(
            f"scores without antialiasing: {network.name} resizes by itself; choose inception-tf1 for them"
        )
    plain = replace(network.view, antialias=False)
    reader = Reader((network.view, clip.view, *([plain] if aliased else [])), box, scenes is not None)
    sizes: set[tuple[int, int]] = set()

    @torch.inference_mode()
    def embed(chunk: Sequence[Source]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        read = [reader(source) for source in chunk]
        sizes.update(pixels.size for pixels in read)
        if len(sizes) > 1:
            listed = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
            raise HiresError(f"images of {listed}: all must be of one size (height x width)")
        return _embed(read, network, clip), [{"sha256": pixels.sha256, "boxes": pixels.boxes} for pixels in read]

    chunks = [sources[start : start + CHUNK] for start in range(0, len(sources), CHUNK)]
    with one_core_each(threads) as pool:
        parts, lists = zip(*pool.map(embed, chunks))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    files = [file for part in lists for file in part]
    different = {prompt: row for row, prompt in enumerate(sorted(set(prompts)))}
    text, cut = (values.cpu() for values in clip.text(list(different)))
    rows = torch.tensor([different[prompt] for prompt in prompts])
    tensors |= {"clip_text": text[rows], "cut": cut[rows]}
    if clip.photographs:
        tensors["clip_iqa"] = clip.quality(tensors["clip_image"]).cpu()
    if scenes is None:
        del tensors["objects"]
    else:
        tensors["true_objects"] = torch.tensor([_objects(*view) for view in scenes])
    metadata = {
        "network": network.name,
        "view": str(network.view),
        "aliased_view": str(plain) if aliased else None,
        "splits": network.splits,
        "clip": clip.name,
        "clip_view": str(clip.view),
        "clip_length": clip.length,
        "crops": crops and crops.__dict__,
        "files": {f"{source.id}-{source.seed}": file for source, file in zip(sources, files)},
    }
    return Features([s.id for s in sources], [s.seed for s in sources], tensors, metadata)


def _embed(read: Sequence[Pixels], network: FeatureNetwork, clip: Clip) -> dict[str, Tensor]:
    whole, pairs, *plain = zip(*(pixels.views for pixels in read))
    alone = network.view.size is None  # images of any size, one by one
    outputs = [network(image[None]) for image in whole] if alone else [network(torch.stack(whole))]
    values = {
        "features": torch.cat([features for features, _ in outputs]),
        "logits": torch.cat([logits for _, logits in outputs]),
        "clip_image": clip.image(torch.stack(pairs)),
        "bands": torch.tensor([pixels.bands.tolist() for pixels in read], dtype=torch.float64),
        "row_steps": torch.stack([pixels.steps[0] for pixels in read]),
        "column_steps": torch.stack([pixels.steps[1] for pixels in read]),
        "low": torch.stack([pixels.low for pixels in read]),
        "objects": torch.tensor([pixels.objects for pixels in read]),
    }
    if plain:
        values["aliased_features"], _ = network(torch.stack(plain[0]))
    crops = [pixels.crops for pixels in read if pixels.crops is not None]
    if crops:
        values["crop_features"], values["crop_logits"] = network(torch.cat(crops))
    return {name: value.cpu() for name, value in values.items()}


def _objects(scene_id: int, camera: Camera) -> list[int]:
    """How many objects of each colour the camera sees, as captions count them."""
    true = [item.colour for item, _ in in_view(scene(scene_id), camera)]
    return [true.count(name) for name in COLOURS]
