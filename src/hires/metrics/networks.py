"""Networks that turn images into features: the embedded tiny CLIP, or Inception v3 and OpenAI's CLIP.

A feature network serves FID, KID (features) and IS (logits); a pair of encoders serves the CLIP score.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from hires.errors import HiresError
from hires.hub import download_clip
from hires.metrics.pixels import View
from hires.scenes import BACKGROUNDS, COLOURS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

# Pixels in [0, 1] → network input. OpenAI's constants go with every CLIP of the hub; tiny-clip takes [-1, 1].
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
TINY = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# Antonyms of CLIP-IQA's overall quality (Wang et al., AAAI 2023, section 3.1).
QUALITY = ("Good photo.", "Bad photo.")

# Classes of the tiny network's IS: what a view of a scene can be of.
CLASSES = tuple(
    [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    + [f"nothing but {background}" for background in BACKGROUNDS]
)


class FeatureNetwork(Protocol):
    """Images → features and class logits. `crop`: side of its input, at which crops need no resize."""

    name: str
    view: View
    crop: int
    splits: int  # of IS

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, s, s), 0 … 255 → features (b, d), logits (b, classes)."""


class Clip:
    """A pair of encoders: transformers' CLIPModel and CLIPTokenizer.

    Args:
        name: as it appears in protocols.
        normalisation: mean and standard deviation of the channels, for pixels in [0, 1].
        fit: how a whole image meets the square input (see `View`).
        photographs: whether the encoders know what a photograph is, which CLIP-IQA takes.
    """

    def __init__(
        self,
        model: "CLIPModel",
        tokenizer: "CLIPTokenizer",
        name: str = "tiny-clip",
        normalisation: tuple[Sequence[float], Sequence[float]] = TINY,
        fit: Literal["squash", "centre"] = "squash",
        photographs: bool = False,
    ):
        self.name, self.model, self.tokenizer = name, model.eval().requires_grad_(False), tokenizer
        self.size: int = model.vision_model.config.image_size
        self.view = View(self.size, fit)
        self.length: int = model.text_model.config.max_position_embeddings
        self.photographs = photographs
        self.mean, self.std = (torch.tensor(v, device=model.device).view(3, 1, 1) for v in normalisation)

    def image(self, images: Tensor) -> Tensor:
        """(b, 3, s, s), 0 … 255 → joint space (b, e), not normalised."""
        pixels = (images.to(self.model.device).float() / 255 - self.mean) / self.std
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """n prompts → joint space (n, e), not normalised, and which were cut at `length` tokens (n,)."""
        whole = self.tokenizer(list(prompts))["input_ids"]
        cut = torch.tensor([len(tokens) > self.length for tokens in whole])
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        return self.model.get_text_features(**tokens).pooler_output, cut

    def quality(self, images: Tensor) -> Tensor:
        """CLIP-IQA of embedded images (b, e): probability in (0, 1) of "Good photo." against "Bad photo." (b,)."""
        antonyms = torch.nn.functional.normalize(self.text(QUALITY)[0].float(), dim=-1)
        images = torch.nn.functional.normalize(images.to(antonyms), dim=-1)
        return (100 * images @ antonyms.T).softmax(-1)[:, 0]


class ClipFeatures:
    """The image half of a CLIP as feature network; its zero-shot logits over CLASSES serve IS."""

    splits = 1

    def __init__(self, clip: Clip, classes: Sequence[str] = CLASSES):
        self.name, self.clip, self.view, self.crop = clip.name, clip, clip.view, clip.size
        text, _ = clip.text(classes)
        self.classes = clip.model.logit_scale.exp() * text / text.norm(dim=1, keepdim=True)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.clip.image(images)
        return features, features / features.norm(dim=1, keepdim=True) @ self.classes.T


class Inception:
    """Inception v3 with torch-fidelity's weights, through torchmetrics; needs the extra [paper].

    `antialias`: torchmetrics' resize (bilinear, antialiased); false: torch-fidelity's (bilinear, TensorFlow 1).
    """

    crop, splits = 299, 10
    view = View(None)

    def __init__(self, device: torch.device, antialias: bool = True):
        from torchmetrics.image.fid import NoTrainInceptionV3
        from torchmetrics.utilities.imports import _TORCH_FIDELITY_AVAILABLE

        if not _TORCH_FIDELITY_AVAILABLE:
            raise HiresError("metrics.features = inception needs torch-fidelity: pip install -e .[paper]")
        self.name = "inception" if antialias else "inception-tf1"
        self.device = device
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], antialias=antialias)
        self.network.to(device)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network._torch_fidelity_forward(images.to(self.device))
        return features, logits


def _folder(name: str) -> Path:
    from hires.models import ASSETS

    return ASSETS / name if name == "tiny-clip" else Path(name)


def clip_files(name: str) -> list[Path]:
    """Files of a pair of encoders that lies in a local folder; none for hub ids."""
    return sorted(path for path in _folder(name).rglob("*") if path.is_file())


@lru_cache
def load_clip(name: str, device: str = "cpu") -> Clip:
    """ "tiny-clip", a transformers folder, or a hub id such as openai/clip-vit-large-patch14."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = _folder(name)
    if name == "tiny-clip" and not folder.is_dir():
        raise HiresError(f"no trained tiny-clip in {folder}: train it (`hires train`) and `hires promote` it")
    place = folder if folder.is_dir() else download_clip(name)
    try:
        model = CLIPModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(place)
    except OSError as error:
        raise HiresError(f"metrics.clip = {name}: {str(error).splitlines()[0]}") from None
    torch.nn.Module.to(model, device)
    if name == "tiny-clip":
        return Clip(model, tokenizer)
    return Clip(model, tokenizer, Path(name).name, OPENAI, "centre", photographs=True)


@lru_cache
def load_features(name: str, device: str = "cpu") -> FeatureNetwork:
    """ "tiny-clip", "inception" or "inception-tf1" (see `Inception`)."""
    if name == "tiny-clip":
        return ClipFeatures(load_clip(name, device))
    return Inception(torch.device(device), antialias=name == "inception")
