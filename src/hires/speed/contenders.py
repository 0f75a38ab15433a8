"""The programs that are compared: every backend of hires_kernels, and what one would use without it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hires_kernels
import torch
from hires_kernels import reference, sdpa
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hires.speed.inputs import Inputs
from hires.speed.shapes import Shape

Rows = tuple[Tensor, Tensor | None]
Program = Callable[[Inputs], Any]
BASELINES = ("dense", "sdpa", "sdpa-compiled")  # "reference" has nothing to do with speed, except for the pre-pass


def names() -> tuple[str, ...]:
    """All contenders; a backend of hires_kernels has its name there."""
    return (*BASELINES, *(name for name in hires_kernels.BACKENDS if name not in ("sdpa", "reference")))


def cudnn(device: torch.device) -> AbstractContextManager[Any]:
    """PyTorch's attention through cuDNN or not at all; on the CPU whatever there is."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else nullcontext()


def programs(shape: Shape, part: str, name: str, device: torch.device) -> Iterator[tuple[str, Program]]:
    """(configuration, program) of a contender; none where it has nothing to offer for a part."""
    library = "cuDNN" if device.type == "cuda" else "CPU"
    if part == "prologue":
        yield from _prologues(name)
    elif name == "dense":
        if part in ("image", "all"):
            yield library, lambda inputs: _dense(inputs, part)
    elif name.startswith("sdpa"):
        compiled = name == "sdpa-compiled"
        attend = torch.compile(_gathered, dynamic=False) if compiled else _gathered
        yield f"gather, {library}", lambda inputs: attend(shape, part, inputs)
    else:
        yield "", lambda inputs: _backend(shape, part, inputs, name)


def _prologues(name: str) -> Iterator[tuple[str, Program]]:
    if name.startswith("sdpa"):
        run = torch.compile(_plain_prologue, dynamic=False) if name == "sdpa-compiled" else _plain_prologue
        yield "plain PyTorch", run
    elif name == "triton":
        yield "", lambda inputs: _prologue(inputs, name)


def _plain_prologue(inputs: Inputs) -> Any:
    return reference.qk_norm_rope(
        *inputs.image[:2],
        text=None if inputs.text is None else inputs.text[:2],
        weight=inputs.weight,
        text_weight=None,
        rope=inputs.rope,
        places=None,
        eps=1e-6,
        scale=1.0,
    )


def _prologue(inputs: Inputs, backend: str) -> Any:
    text = None if inputs.text is None else inputs.text[:2]
    return hires_kernels.qk_norm_rope(*inputs.image[:2], inputs.weight, inputs.rope, text=text, backend=backend)


def _dense(inputs: Inputs, part: str) -> Tensor:
    joint = inputs.image if part == "image" else inputs.joint
    query, key, value = (x.transpose(1, 2) for x in joint)
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _gathered(shape: Shape, part: str, inputs: Inputs) -> Rows:
    """The module and not the operator: a compiler can't look into that."""
    image, text = inputs.image, None if part == "image" else inputs.text
    if part == "layer":
        image, text = _after(_plain_prologue(inputs), inputs)
    if shape.method == "npa":
        return sdpa.neighborhood_patch_attention(
            *image,
            grid=shape.grid,
            window=shape.window,
            text=text,
            rope=None if text is None else inputs.rope,
            shift=None,
            text_rows="global" if part == "global" else "patch",
            scale=shape.head_dim**-0.5,
        )
    return sdpa.local_attention(
        *image,
        grid=shape.grid,
        form="radius",
        reach=shape.radius,
        text=text,
        guidance=inputs.guidance,
        guidance_grid=shape.guidance_grid,
        guidance_neighbours="row",
        order="raster",
        scale=shape.head_dim**-0.5,
    )


def _backend(shape: Shape, part: str, inputs: Inputs, backend: str) -> Rows:
    image, text = inputs.image, None if part == "image" else inputs.text
    if part == "layer":
        image, text = _after(_prologue(inputs, "auto"), inputs)
    if shape.method == "npa":
        return hires_kernels.neighborhood_patch_attention(
            *image,
            grid=shape.grid,
            window=shape.window,
            text=text,
            rope=None if text is None else inputs.rope,
            text_rows="global" if part == "global" else "patch",
            backend=backend,
        )
    return hires_kernels.local_attention(
        *image,
        grid=shape.grid,
        radius=shape.radius,
        text=text,
        guidance=inputs.guidance,
        guidance_grid=shape.guidance_grid,
        backend=backend,
    )


def _after(prologue: Any, inputs: Inputs) -> tuple[Any, Any]:
    """Image and text as attention takes them."""
    query, key, text_query, text_key = prologue
    assert inputs.text is not None
    return (query, key, inputs.image[2]), (text_query, text_key, inputs.text[2])
