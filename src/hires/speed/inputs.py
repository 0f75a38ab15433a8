"""Random inputs of a shape, and the exact rows of attention that backends are compared with."""

from dataclasses import dataclass
from functools import cached_property

import torch
from hires_kernels import geometry, reference, rope
from torch import Tensor

from hires.speed.shapes import Shape
from hires.speed.timing import rotations

SAMPLE = 64  # image tokens whose rows are computed exactly
TEXT_SAMPLE = 4
AXES = (16, 56, 56)  # channels of FLUX's positions: none, row, column


@dataclass
class Inputs:
    """What a layer gets. The same numbers stand for queries and keys before the norm and after it."""

    image: tuple[Tensor, Tensor, Tensor]
    text: tuple[Tensor, Tensor, Tensor] | None
    guidance: tuple[Tensor, Tensor] | None
    rope: tuple[Tensor, Tensor]
    weight: tuple[Tensor, Tensor]

    @cached_property
    def joint(self) -> tuple[Tensor, ...]:
        """Text and image as one sequence."""
        assert self.text is not None
        return tuple(torch.cat(pair, 1) for pair in zip(self.text, self.image))


def make(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Standard normal numbers, drawn on the device: they are many."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)

    def draw(count: int, tokens: int) -> tuple[Tensor, ...]:
        size = (shape.batch, tokens, shape.heads, shape.head_dim)
        return tuple(torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(count))

    low = shape.guidance_grid
    weight = tuple(torch.rand(shape.head_dim, generator=generator, device=device).to(dtype) + 0.5 for _ in range(2))
    return Inputs(
        image=draw(3, shape.tokens),  # type: ignore[arg-type]
        text=draw(3, shape.text) if shape.text else None,  # type: ignore[arg-type]
        guidance=draw(2, low[0] * low[1]) if low else None,  # type: ignore[arg-type]
        rope=tuple(table.to(device) for table in positions(shape)),  # type: ignore[arg-type]
        weight=weight,  # type: ignore[arg-type]
    )


def turns(shape: Shape, device: torch.device) -> list[Inputs]:
    """Sets of inputs to take in turn (`hires.speed.timing.rotations`)."""
    first = make(shape, device, seed=0)
    size = sum(x.nbytes for x in first.image)
    return [first, *(make(shape, device, seed) for seed in range(1, rotations(size, device)))]


def positions(shape: Shape) -> tuple[Tensor, Tensor]:
    """FLUX's (cos, sin) of an image grid, float32 (tokens, head_dim)."""
    scale = shape.head_dim // 2 / (sum(AXES) // 2)
    pairs = [round(channels // 2 * scale) for channels in AXES[1:]]
    row, col = (x.flatten().double() for x in torch.meshgrid(*map(torch.arange, shape.grid), indexing="ij"))
    angles = [torch.zeros(shape.tokens, shape.head_dim // 2 - sum(pairs), dtype=torch.float64)]
    for place, count in zip((row, col), pairs):
        angles.append(place[:, None] * 10_000.0 ** (-torch.arange(count) / count))
    table = torch.cat(angles, dim=1).repeat_interleave(2, 1)
    return table.cos().float(), table.sin().float()


def sample(shape: Shape, part: str) -> tuple[Tensor, Tensor]:
    """Image and text tokens whose rows are compared."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randperm(shape.tokens, generator=generator)[:SAMPLE]
    return image, torch.randperm(0 if part == "image" else shape.text, generator=generator)[:TEXT_SAMPLE]


def rows(shape: Shape, part: str, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Output rows of the sampled tokens in plain PyTorch, one query at a time: (batch, rows, heads, head_dim)."""
    image_places, text_places = sample(shape, part)
    query, key, value = (x.to(dtype) for x in inputs.image)
    text = None if part == "image" or inputs.text is None else tuple(x.to(dtype) for x in inputs.text)
    scale = shape.head_dim**-0.5
    one = _npa_row if shape.method == "npa" else _local_row
    found = []
    for place in image_places.tolist():
        keys, values = one(shape, place, (key, value), text, inputs, dtype)
        found.append(reference.attention(query[:, place, None], keys, values, scale))
    if text is not None:
        text_query = text[0][:, text_places.to(query.device)]
        found.append(_text_rows(shape, part, text_query, (key, value), text, inputs, scale))
    return torch.cat(found, dim=1)


def _npa_row(shape, place, image, text, inputs, dtype):
    starts = []
    for at, length, window in zip(divmod(place, shape.grid[1]), shape.grid, shape.window):
        starts += [p.window for p in geometry.patches(length, window) if p.start <= at < p.stop]
    return _windowed(shape, starts, image, text, inputs)


def _windowed(shape, starts, image, text, inputs):
    """Keys and values of the window that begins at `starts`, text first."""
    seen = tuple(slice(start, start + side) for start, side in zip(starts, shape.window))
    keys, values = (x.unflatten(1, shape.grid)[:, seen[0], seen[1]].flatten(1, 2) for x in image)
    if text is None:
        return keys, values
    corner = starts[0] * shape.grid[1] + starts[1]
    text_key = rope.rotate(text[1], *(table[corner] for table in inputs.rope))
    return torch.cat([text_key, keys], 1), torch.cat([text[2], values], 1)


def _local_row(shape, place, image, text, inputs, dtype):
    spans = geometry.local_spans(shape.grid, "radius", shape.radius, shape.guidance_grid, "row")
    sources = [(image, shape.grid)]
    if inputs.guidance is not None:
        sources.append((tuple(x.to(dtype) for x in inputs.guidance), shape.guidance_grid))
    keys, values = ([], []) if text is None else ([text[1]], [text[2]])
    for (source, grid), span in zip(sources, spans):
        seen = [slice(int(axis.low[at]), int(axis.high[at])) for axis, at in zip(span, divmod(place, shape.grid[1]))]
        for found, x in zip((keys, values), source):
            found.append(x.unflatten(1, grid)[:, seen[0], seen[1]].flatten(1, 2))
    return torch.cat(keys, 1), torch.cat(values, 1)


def _text_rows(shape, part, text_query, image, text, inputs, scale):
    if shape.method == "local":
        return reference.attention(
            text_query, torch.cat([text[1], image[0]], 1), torch.cat([text[2], image[1]], 1), scale
        )
    if part == "global":
        first = [rope.rotate(x, *(table[0] for table in inputs.rope)) for x in (text_query, text[1])]
        keys, values = torch.cat([first[1], image[0]], 1), torch.cat([text[2], image[1]], 1)
        return reference.attention(first[0], keys, values, scale)
    axes = [[p.window for p in geometry.patches(*axis)] for axis in zip(shape.grid, shape.window)]
    outputs = []
    for top in axes[0]:
        for left in axes[1]:
            keys, values = _windowed(shape, (top, left), image, text, inputs)
            corner = top * shape.grid[1] + left
            turned = rope.rotate(text_query, *(table[corner] for table in inputs.rope))
            outputs.append(reference.attention(turned, keys, values, scale))
    return torch.stack(outputs).mean(0)
