"""What a user adds to prompt and model: images for ControlNets and IP-Adapters, named as diffusers names them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hires.additions import CONTROL_SETTINGS
from hires.errors import HiresError
from hires.sizes import Size


@dataclass(frozen=True)
class Extras:
    """Arguments of a diffusers pipeline's call, and what they mean at every stage.

    Attributes:
        control_image: one, or one for each ControlNet; resized for every stage.
        controlnet_conditioning_scale: factor of a ControlNet's residuals; one for all, or one each.
        control_guidance_start, control_guidance_end: the shares of the whole schedule between which a ControlNet acts;
            one for all, or one each. A stage that starts at τ begins at the share 1 − τ/1000.
        control_mode: what a control image shows, for union ControlNets of FLUX; one for all, or one each.
        ip_adapter_image: one, or one for each IP-Adapter.
        ip_adapter_image_embeds: in its place, one tensor for each IP-Adapter, as the pipeline's
            `prepare_ip_adapter_image_embeds` gives them for one prompt: (1, images, width), for SDXL under
            classifier-free guidance (2, images, …) with the unconditional row first.
    """

    control_image: Image.Image | Sequence[Image.Image] | None = None
    controlnet_conditioning_scale: float | Sequence[float] = 1.0
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0
    control_mode: int | Sequence[int] | None = None
    ip_adapter_image: Image.Image | Sequence[Image.Image] | None = None
    ip_adapter_image_embeds: Sequence[Tensor] | None = None

    @property
    def control_images(self) -> list[Image.Image]:
        return _pictures("control_image", self.control_image)

    @property
    def ip_adapter_images(self) -> list[Image.Image]:
        return _pictures("ip_adapter_image", self.ip_adapter_image)

    def fitted(self, height: int, width: int, crop: bool) -> "Extras":
        """With control images of the target's aspect ratio (see `fitted`)."""
        images = [fitted("control image", image, height, width, crop) for image in self.control_images]
        return replace(self, control_image=images or None)

    def check(self, controlnet: Any, adapters: int) -> None:
        """HiresError unless this is what a pipeline with this ControlNet, or several, or None, and so many
        IP-Adapters needs."""
        self._check_control(controlnet)
        if isinstance(self.ip_adapter_image_embeds, Tensor):
            raise HiresError("ip_adapter_image_embeds is one tensor: give a list of them, one for each IP-Adapter")
        given = len(self.ip_adapter_images) or len(self.ip_adapter_image_embeds or ())
        if self.ip_adapter_image is not None and self.ip_adapter_image_embeds is not None:
            raise HiresError("give ip_adapter_image or ip_adapter_image_embeds, not both")
        if given and not adapters:
            raise HiresError("an IP-Adapter image, but no IP-Adapter is loaded: call pipe.load_ip_adapter first")
        if given != adapters:
            raise HiresError(
                f"{given} IP-Adapter images for {adapters} loaded IP-Adapters: give one each, or call "
                "pipe.unload_ip_adapter()"
            )

    def _check_control(self, controlnet: Any) -> None:
        nets, images = controlnets(controlnet), self.control_images
        if images and not nets:
            raise HiresError(
                "a control image, but the pipeline has no ControlNet: make one that has, with "
                "FluxControlNetPipeline.from_pipe(pipe, controlnet=…, dtype=pipe.dtype) or its SDXL sibling"
            )
        if images and len(nets) == 1 and controlnet is not nets[0] and getattr(nets[0], "union", False):
            nets = nets * len(images)  # diffusers runs a union ControlNet in a list once for every image
        if len(images) != len(nets):
            raise HiresError(f"{len(images)} control images for {len(nets)} ControlNets: give one each")
        for name in CONTROL_SETTINGS:
            if not nets and (value := getattr(self, name)) != getattr(Extras, name):
                raise HiresError(f"{name} {value}: the pipeline has no ControlNet: leave it out")
        for net, _, start, end, mode in zip(nets, *map(self.each, CONTROL_SETTINGS), strict=True):
            if not 0 <= start < end <= 1:
                raise HiresError(
                    f"control_guidance_start {start:g} and control_guidance_end {end:g}: "
                    "allowed: 0 ≤ start < end ≤ 1, shares of the schedule"
                )
            if getattr(net, "union", False):
                if mode is None or not 0 <= mode < net.config.num_mode:
                    allowed = f"0 to {net.config.num_mode - 1}"
                    raise HiresError(f"control_mode {mode}: this union ControlNet needs one, allowed: {allowed}")
            elif mode is not None:
                raise HiresError(f"control_mode {mode}: this ControlNet knows one kind of image: leave it out")

    def each(self, name: str) -> list[Any]:
        """The setting `name` of every control image."""
        value, count = getattr(self, name), len(self.control_images)
        values = list(value) if isinstance(value, Sequence) else [value] * count
        if len(values) != count:
            raise HiresError(
                f"{len(values)} values of {name} for {count} control images: give one for all, or one each"
            )
        return values

    def record(self) -> dict[str, Any]:
        """What was given, as JSON-ready values for a record: images and embeddings as their digests."""
        found: dict[str, Any] = {}
        if self.control_images:
            found = {"control_images": [picture_record(image) for image in self.control_images]}
            found |= {name: self.each(name) for name in CONTROL_SETTINGS}
        if self.ip_adapter_images:
            found["ip_adapter_images"] = [picture_record(image) for image in self.ip_adapter_images]
        if self.ip_adapter_image_embeds is not None:
            found["ip_adapter_image_embeds"] = [
                sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                for x in self.ip_adapter_image_embeds
            ]
        return found


NO_EXTRAS = Extras()


@dataclass(frozen=True)
class Control:
    """What the ControlNets see at one stage.

    Attributes:
        maps: for each, (B, C, k·H, k·W) for latents of (H, W): pixels, or latents where the ControlNet reads those.
        extras: where the scales, shares and modes stand.
    """

    maps: list[Tensor]
    extras: Extras

    def scales(self, step: int, steps: int) -> list[float]:
        """The scale of every ControlNet at a step of the whole schedule, 0 outside its share, as diffusers has it."""
        shares = zip(self.extras.each("control_guidance_start"), self.extras.each("control_guidance_end"), strict=True)
        acts = [start <= step / steps and (step + 1) / steps <= end for start, end in shares]
        return [
            float(scale) if on else 0.0
            for scale, on in zip(self.extras.each("controlnet_conditioning_scale"), acts, strict=True)
        ]

    def views(self, places: Sequence[tuple[int, int, int]], view: Size, canvas: Size) -> "Control":
        """The crops that belong to views of (height, width) on a canvas, in latent pixels.

        places: (row, column, image) of the top left pixel of each view.
        """
        height, width = view

        def crops(chart: Tensor) -> Tensor:
            k = chart.shape[2] // canvas[0]
            rows = [chart[n, :, k * i : k * (i + height), k * j : k * (j + width)] for i, j, n in places]
            return torch.stack(rows)

        return Control([crops(chart) for chart in self.maps], self.extras)


def controlnets(controlnet: Any) -> list[Any]:
    """The models in a pipeline's `controlnet`: none, itself, or those of diffusers' wrapper of several."""
    return [] if controlnet is None else list(getattr(controlnet, "nets", [controlnet]))


def fitted(what: str, image: Image.Image, height: int, width: int, crop: bool = False) -> Image.Image:
    """An image in RGB whose aspect ratio is that of height × width within 1%.

    crop: cut its centre to that ratio. Without it, HiresError tells the nearest crop.
    """
    (checked,) = _pictures(what, [image])
    rgb = checked.convert("RGB")
    if abs(rgb.height * width - rgb.width * height) <= 0.01 * rgb.width * height:
        return rgb
    scale = min(rgb.height / height, rgb.width / width)
    rows, columns = max(round(height * scale), 1), max(round(width * scale), 1)
    if not crop:
        raise HiresError(
            f"the {what} is {rgb.height}x{rgb.width} (height x width) and the target {height}x{width}: their aspect "
            f"ratios must agree within 1%: ask for its centre of {rows}x{columns} (crop=True, --crop), or choose "
            "another size"
        )
    top, left = (rgb.height - rows) // 2, (rgb.width - columns) // 2
    return rgb.crop((left, top, left + columns, top + rows))


def picture_record(image: Image.Image) -> dict[str, str]:
    """A picture in memory, for a record: its size (height x width), and the SHA-256 of its RGB values."""
    return {"size": f"{image.height}x{image.width}", "sha256": sha256(image.convert("RGB").tobytes()).hexdigest()}


def _pictures(name: str, given: Image.Image | Sequence[Image.Image] | None) -> list[Image.Image]:
    images = [] if given is None else [given] if isinstance(given, Image.Image) else list(given)
    for image in images:
        if not isinstance(image, Image.Image):
            raise HiresError(f"{name} of type {type(image).__name__}: give a PIL image")
    return images
