"""The programs that are compared: every backend of hires_kernels, and what one would use without it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import hires_kernels
import torch
from hires_kernels import flex, geometry, reference, sdpa
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hires.speed.inputs import Inputs
from hires.speed.shapes import Shape

Rows = tuple[Tensor, Tensor | None]
Triple = tuple[Tensor, Tensor, Tensor]
Program = Callable[[Inputs], Any]
Alternatives = dict[str, Program]  # configuration -> program
BASELINES = ("dense", "sdpa", "sdpa-compiled")  # "reference" has nothing to do with speed, except for the pre-pass


def names() -> tuple[str, ...]:
    """All contenders; a backend of hires_kernels has its name there."""
    return (*BASELINES, *(name for name in hires_kernels.BACKENDS if name not in ("sdpa", "reference")))


def attention(shape: Shape, name: str, device: torch.device) -> AbstractContextManager[Any]:
    """PyTorch's attention through cuDNN or not at all; with a mask, and on the CPU, whatever PyTorch chooses."""
    masked = shape.method == "local" and name.startswith("sdpa")
    return nullcontext() if masked or device.type == "cpu" else sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def programs(shape: Shape, part: str, name: str, device: torch.device) -> Iterator[tuple[str, Alternatives]]:
    """(how, alternatives) of a contender, the fastest of which counts; none where it has nothing for a part."""
    library = "cuDNN" if device.type == "cuda" else "CPU"
    if part == "prologue":
        if name.startswith("sdpa"):
            yield "", {"plain PyTorch": _compiled(_plain_prologue, name)}
        elif name == "triton":
            yield "", {"": lambda inputs: _prologue(inputs, name)}
    elif name == "dense":
        if part in ("image", "all"):
            yield "", {library: lambda inputs: _dense(inputs, part)}
    elif name.startswith("sdpa"):
        attend = _compiled(_gathered, name)
        with_mask = "masked SDPA" if shape.method == "local" else library
        yield "", {f"gather, {with_mask}": lambda inputs: attend(shape, part, inputs)}
    elif name == "flex":
        if part in ("image", "all"):
            yield "permutation included", {_name(c): _flex(shape, part, c) for c in flex.CONFIGURATIONS}
            joined: dict[int, tuple[Any, Any]] = {}
            yield "excluded", {_name(c): _flex_alone(shape, part, c, joined) for c in flex.CONFIGURATIONS}
    else:
        yield "", {"": lambda inputs: _backend(shape, part, inputs, name)}


def _compiled(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if name == "sdpa-compiled" else function


def _name(configuration: flex.Configuration) -> str:
    options = " ".join(f"{name}={value}" for name, value in configuration.options)
    return f"{configuration.queries}x{configuration.keys} {options}".strip()


def _flex(shape: Shape, part: str, configuration: flex.Configuration) -> Program:
    return lambda inputs: _module(flex, shape, part, inputs, configuration=configuration)


def _flex_alone(
    shape: Shape, part: str, configuration: flex.Configuration, joined: dict[int, tuple[Any, Any]]
) -> Program:
    """FlexAttention itself, as if the model kept its tokens in that order: random ones are in any.

    The mean of the text rows of Neighborhood Patch Attention is left out too; the dense text rows of local attention
    are not. `joined` keeps the sequences, whatever the configuration.
    """
    scale = shape.head_dim**-0.5

    def program(inputs: Inputs) -> Any:
        if id(inputs) not in joined:
            joined[id(inputs)] = _joined(shape, part, inputs)
        (query, key, value), text = joined[id(inputs)]
        output = flex._attend(query, key, value, _mask(shape, part, configuration, query.device), scale, configuration)
        return output, None if text is None else flex._dense(text[0], text[1], text[2], scale)

    return program


def _mask(shape: Shape, part: str, configuration: flex.Configuration, device: torch.device) -> Any:
    text = 0 if part == "image" else shape.text
    if shape.method == "npa":
        return flex._npa_plan(shape.grid, shape.window, text, "patch", configuration, device).mask
    low = shape.guidance_grid
    return flex._local_plan(shape.grid, "radius", shape.radius, text, low, "row", "hilbert", configuration, device).mask


def _joined(shape: Shape, part: str, inputs: Inputs) -> tuple[Triple, Triple | None]:
    """Query, key and value of FlexAttention, and those of the text rows where they are apart."""
    query, key, value = inputs.image
    text = None if part == "image" else inputs.text
    if shape.method == "npa":
        if text is None:
            return inputs.image, None
        axes = [len(geometry.patches(*axis)) for axis in zip(shape.grid, shape.window)]
        copies = [x.repeat(1, axes[0] * axes[1], 1, 1) for x in text]
        query, key, value = (torch.cat(pair, 1) for pair in zip(inputs.image, copies))
        return (query, key, value), None
    assert inputs.guidance is not None
    if text is None:
        key, value = (torch.cat(pair, 1) for pair in zip(inputs.guidance, (key, value)))
        return (query, key, value), None
    key, value = (torch.cat(parts, 1) for parts in zip(inputs.guidance, (key, value), text[1:]))
    low = inputs.guidance[0].shape[1]
    return (query, key, value), (text[0], key[:, low:], value[:, low:])


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
    return _module(sdpa, shape, part, inputs, image, text)


def _module(
    module: ModuleType, shape: Shape, part: str, inputs: Inputs, image: Any = None, text: Any = None, **options: Any
) -> Rows:
    """A backend's own function, which no operator hides."""
    if image is None:
        image, text = inputs.image, None if part == "image" else inputs.text
    if shape.method == "npa":
        return module.neighborhood_patch_attention(
            *image,
            grid=shape.grid,
            window=shape.window,
            text=text,
            rope=None if text is None else inputs.rope,
            shift=None,
            text_rows="global" if part == "global" else "patch",
            scale=shape.head_dim**-0.5,
            **options,
        )
    return module.local_attention(
        *image,
        grid=shape.grid,
        form="radius",
        reach=shape.radius,
        text=text,
        guidance=inputs.guidance,
        guidance_grid=shape.guidance_grid,
        guidance_neighbours="row",
        order="hilbert",
        scale=shape.head_dim**-0.5,
        **options,
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
