"""The public operations: check the input and call the operator (`hires_kernels.library`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hires_kernels import library
from hires_kernels.backends import Problem
from hires_kernels.errors import KernelError
from hires_kernels.geometry import Grid
from hires_kernels.orders import ORDERS

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def neighborhood_patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    window: int | Grid,
    text: Triple | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    patch: int | Grid | None = None,
    shift: Tensor | None = None,
    text_rows: str = "patch",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """ScaleDiff's Neighborhood Patch Attention (arXiv 2510.25818, section 3.1): returns (image, text | None).

    Along each axis queries form patches of side window // 2, and a patch sees the window of keys that begins
    window // 4 before it, moved inwards at the border: window[0] · window[1] image keys for every query, and
    every text key. Patch outputs go back in place; nothing overlaps.

    Args:
        query, key, value: image tensors (batch, height · width, heads, head_dim), row-major, query and key already
            rotated at their global positions. Any strides.
        grid: (height, width) in tokens.
        window: side of the key window, or (rows, columns), in tokens: at least 2, at most the grid.
        text: (query, key, value) of the text, each (batch, text tokens, heads, head_dim), not rotated.
        rope: (cos, sin) of the image tokens, each (height · width, head_dim), in FLUX's layout. Text queries and
            keys of a patch are rotated to the top-left token of the patch's window. None: text is not rotated.
        patch: side of the query patches, or (rows, columns), 1 … window; half the window by default. Patches of another
            side lie in the middle of their windows; "flex" runs none of these.
        shift: integer tensor (batch, 2), (row, column) offsets in 0 … patch, best kept on the CPU. The grid
            of patches moves back by the offset and gains one patch an axis (appendix B.1). Padding has no key and
            no output, but each patch counts in the mean of the text rows, one that holds only padding as well:
            shift zero and no shift give the same image rows and different text rows.
        text_rows: "patch": text queries attend to text and window of each patch, and their outputs are averaged
            over the patches; "global": they attend once to text and all image keys, at the grid's first token.
        scale: factor of the scores, head_dim ** -0.5 by default.
        backend: "auto" or a name in `BACKENDS`.

    Raises:
        KernelError: the shapes, window, shift, names or backend don't fit.
    """
    rows, cols = (window, window) if isinstance(window, int) else window
    _check_tokens(query, key, value, grid)
    _check_text(query, text)
    if min(rows, cols) < 2:
        raise KernelError(f"window {rows}x{cols}: a side must be at least 2 tokens")
    halves = (rows // 2, cols // 2)
    sides = (patch, patch) if isinstance(patch, int) else patch or halves
    if any(not 1 <= side <= whole for side, whole in zip(sides, (rows, cols))):
        raise KernelError(f"patch {sides[0]}x{sides[1]}: sides must be 1 … the window's, {rows}x{cols}")
    if rows > grid[0] or cols > grid[1]:
        raise KernelError(f"window {rows}x{cols} is larger than the grid {grid[0]}x{grid[1]}: allowed: up to the grid")
    _check_name("text_rows", text_rows, ("patch", "global"))
    if rope is not None:
        _check_rope(rope, query)
    if shift is not None:
        _check_shift(shift, len(query))
    query, key, value, *texts = _autocast(query, key, value, *(text or ()))
    _check_alike(query, key, value, *texts)
    image, text_output = library.neighborhood_patch_attention(
        query,
        key,
        value,
        texts,
        [part.to(query.device) for part in rope or ()],
        shift,
        grid,
        (rows, cols),
        text_rows,
        query.shape[-1] ** -0.5 if scale is None else scale,
        backend,
        _needs_grad(query, key, value, *texts),
        () if sides == halves else sides,
    )
    return image, None if text is None else text_output


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    radius: int | None = None,
    window: int | None = None,
    text: Triple | None = None,
    guidance: tuple[Tensor, Tensor] | None = None,
    guidance_grid: Grid | None = None,
    guidance_neighbours: str = "row",
    order: str = "hilbert",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Scale-DiT's local attention (arXiv 2510.16325, section 3.2): returns (image, text | None).

    An image query sees all text keys, the image keys near it and the guidance keys of the same place. Text
    queries see all text and image keys and no guidance.

    Args:
        query, key, value: image tensors (batch, height · width, heads, head_dim), row-major, already rotated.
        grid: (height, width) in tokens.
        radius: image keys at most this many tokens away in row and in column: a box around the query. Or
        window: image keys of the query's own window in a fixed tiling of this side. One of the two, at least 1.
        text: (query, key, value) of the text, each (batch, text tokens, heads, head_dim), already rotated.
        guidance: (key, value) of a low-resolution image, each (batch, rows · columns, heads, head_dim), rotated.
        guidance_grid: its (rows, columns). Its windows have side max(1, r / s) tokens, r being 2 · radius or
            window and s the ratio of the grids. A query sees the guidance window that holds its place, and
        guidance_neighbours: the windows to its left and right ("row") or all eight around it ("all").
        order: order in which tokens are visited, "hilbert", "morton", "window" or "raster". Never changes the result.
        scale: factor of the scores, head_dim ** -0.5 by default.
        backend: "auto" or a name in `BACKENDS`.

    Raises:
        KernelError: the shapes, sizes, names or backend don't fit.
    """
    _check_tokens(query, key, value, grid)
    _check_text(query, text)
    if radius is not None and window is None:
        form, reach = "radius", radius
    elif window is not None and radius is None:
        form, reach = "window", window
    else:
        raise KernelError(f"radius {radius} and window {window}: give one of the two")
    if reach < 1:
        raise KernelError(f"{form} {reach}: must be at least 1 token")
    if (guidance is None) != (guidance_grid is None):
        raise KernelError("guidance and guidance_grid go together: give both or neither")
    if guidance is not None and guidance_grid is not None:
        if min(guidance_grid) < 1:
            raise KernelError(f"guidance_grid {guidance_grid}: a side must be at least 1 token")
        _check_pair("guidance", guidance, (len(query), guidance_grid[0] * guidance_grid[1], *query.shape[2:]))
    _check_name("guidance_neighbours", guidance_neighbours, ("row", "all"))
    _check_name("order", order, ORDERS)
    query, key, value, *others = _autocast(query, key, value, *(text or ()), *(guidance or ()))
    _check_alike(query, key, value, *others)
    image, text_output, _ = library.local_attention(
        query,
        key,
        value,
        others[: len(text or ())],
        others[len(text or ()) :],
        grid,
        form,
        reach,
        guidance_grid or (),
        guidance_neighbours,
        order,
        query.shape[-1] ** -0.5 if scale is None else scale,
        backend,
        _needs_grad(query, key, value, *others),
    )
    return image, None if text is None else text_output


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    weight: Pair,
    rope: Pair,
    *,
    text: Pair | None = None,
    text_weight: Pair | None = None,
    places: Tensor | None = None,
    eps: float = 1e-6,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """RMSNorm over the channels, then RoPE, of queries and keys in one pass: (query, key, text query, text key).

    What FLUX does before attention: torch's `rms_norm`, then diffusers' `apply_rotary_emb`. Double blocks give text
    with norm weights of its own; for single blocks give slices of the one tensor that holds text and image.

    Args:
        query, key: image tensors (batch, tokens, heads, head_dim). Any strides, views of a fused projection too.
        weight: the norms' weights for query and key, each (head_dim,).
        rope: (cos, sin) of the image tokens, each (tokens, head_dim), in FLUX's layout.
        text: (query, key) of the text, each (batch, text tokens, heads, head_dim). Normalised, and rotated only with
        places: integer tensor (copies,) of image tokens; text is rotated to the place of each, which makes text
            outputs (batch, copies, text tokens, heads, head_dim).
        text_weight: the norms' weights for the text, `weight` by default.
        eps: added to the mean square.
        scale: factor of both queries, so that attention needs none.
        backend: "auto" or a name in `BACKENDS`.

    Raises:
        KernelError: the shapes or the backend don't fit.
    """
    _check_image(query, key)
    head_dim = query.shape[-1]
    _check_pair("weight", weight, (head_dim,))
    _check_rope(rope, query)
    if text_weight is not None:
        _check_pair("text_weight", text_weight, (head_dim,))
    if text is not None:
        _check_text(query, text, ("query", "key"))
    if places is not None and (places.ndim != 1 or places.is_floating_point()):
        raise KernelError(f"places {places.dtype} of shape {tuple(places.shape)}: must be an integer tensor (copies,)")
    _check_alike(query, key, *(text or ()))
    inputs = query, key, *(text or ()), *weight, *(text_weight or ())
    outputs = library.qk_norm_rope(
        query,
        key,
        text or (),
        weight,
        text_weight or (),
        [part.to(query.device) for part in rope],
        places if places is None else places.to(query.device),
        eps,
        scale,
        backend,
        _needs_grad(*inputs),
    )
    return outputs if text is not None else (outputs[0], outputs[1], None, None)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    silu: bool = False,
    shift: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """GroupNorm (Wu and He 2018), and SiLU if asked, of images (batch, channels, height, width), channels last.

    torch's `group_norm(x + shift, groups, weight, bias, eps)`, in one pass over x for the sums and one for the result.

    Args:
        x: any strides; what is not channels last is copied first.
        groups: of as many channels each, next to each other.
        weight, bias: (channels,).
        eps: added to the variance.
        silu: whether SiLU follows.
        shift: (channels,), added to x: the bias of the convolution before, which then needs no pass of its own.
        backend: "auto" or a name in `BACKENDS`.

    Raises:
        KernelError: the shapes or the backend don't fit.
    """
    _check_channels(x, weight=weight, bias=bias, shift=shift)
    if groups < 1 or x.shape[1] % groups:
        raise KernelError(f"{x.shape[1]} channels in {groups} groups: must be as many in each")
    inputs = [y for y in (x, weight, bias, shift) if y is not None]
    module = library.chosen(backend, Problem("group_norm", x.device, x.dtype, x.shape[1], _needs_grad(*inputs)))
    return module.group_norm(x, groups=groups, weight=weight, bias=bias, eps=eps, silu=silu, shift=shift)


def add_bias(x: Tensor, y: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """x + y + bias in one pass: what ends a residual block whose last convolution left its bias out. Channels last.

    Args:
        x, y: images (batch, channels, height, width), any strides.
        bias: (channels,).
        backend: "auto" or a name in `BACKENDS`.

    Raises:
        KernelError: the shapes or the backend don't fit.
    """
    _check_channels(x, bias=bias)
    if x.shape != y.shape:
        raise KernelError(f"images of shapes {tuple(x.shape)} and {tuple(y.shape)}: must be the same")
    _check_alike(x, y)
    problem = Problem("add_bias", x.device, x.dtype, x.shape[1], _needs_grad(x, y, bias))
    return library.chosen(backend, problem).add_bias(x, y, bias=bias)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, attention runs in its dtype, as PyTorch's own does."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch before 2.13 can't trace is_autocast_available
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)


def _check_pair(name: str, pair: Pair, allowed: tuple[int, ...]) -> None:
    if len(pair) != 2 or any(x.shape != allowed for x in pair):
        shapes = ", ".join(str(tuple(x.shape)) for x in pair)
        raise KernelError(f"{name} of shapes {shapes}: must be two of shape {allowed}")


def _check_rope(rope: Pair, query: Tensor) -> None:
    _check_pair("rope", rope, (query.shape[1], query.shape[3]))
    if query.shape[3] % 2:
        raise KernelError(f"head_dim {query.shape[3]}: rope turns pairs of channels: must be even")


def _check_channels(x: Tensor, **values: Tensor | None) -> None:
    if x.ndim != 4 or min(x.shape) < 1:
        raise KernelError(f"x of shape {tuple(x.shape)}: must be (batch, channels, height, width), each at least 1")
    for name, value in values.items():
        if value is not None and value.shape != x.shape[1:2]:
            raise KernelError(f"{name} of shape {tuple(value.shape)}: must be ({x.shape[1]},), one for each channel")
    _check_alike(x, *(value for value in values.values() if value is not None))


def _check_name(kind: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise KernelError(f"unknown {kind} {given!r}: allowed: {', '.join(allowed)}")


def _check_image(*tensors: Tensor) -> None:
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 4 or min(shapes[0]) < 1:
        raise KernelError(
            f"query, key, … of shapes {shapes}: must share one (batch, tokens, heads, head_dim), each at least 1"
        )


def _check_tokens(query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> None:
    _check_image(query, key, value)
    if min(grid) < 1 or query.shape[1] != grid[0] * grid[1]:
        raise KernelError(
            f"{query.shape[1]} image tokens: a grid of {grid[0]}x{grid[1]} has {grid[0] * grid[1]}; "
            "tensors are (batch, tokens, heads, head_dim)"
        )


def _check_alike(*tensors: Tensor) -> None:
    kinds = {x.dtype for x in tensors}
    if len(kinds) > 1 or not tensors[0].is_floating_point():
        given = ", ".join(sorted(str(kind) for kind in kinds))
        raise KernelError(f"tensors of {given}: must share one floating-point dtype")
    if any(x.device != tensors[0].device for x in tensors):
        places = ", ".join(sorted({str(x.device) for x in tensors}))
        raise KernelError(f"tensors on {places}: must be on one device")


def _check_text(query: Tensor, text: Sequence[Tensor] | None, names: Sequence[str] = ("query", "key", "value")) -> None:
    if text is None:
        return
    batch, _, heads, head_dim = query.shape
    shapes = [tuple(x.shape) for x in text]
    alike = len(shapes) == len(names) and len(set(shapes)) == 1 and len(shapes[0]) == 4
    if not alike or shapes[0] != (batch, shapes[0][1], heads, head_dim):
        allowed = f"({batch}, text tokens, {heads}, {head_dim})"
        raise KernelError(f"text of shapes {shapes}: must be ({', '.join(names)}), each {allowed}")


def _check_shift(shift: Tensor, batch: int) -> None:
    if shift.shape != (batch, 2) or shift.is_floating_point():
        raise KernelError(f"shift {shift.dtype} of shape {tuple(shift.shape)}: must be an integer tensor ({batch}, 2)")
