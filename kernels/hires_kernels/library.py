"""The operations as operators of PyTorch, `torch.ops.hires.*`: a compiler sees one node in place of a graph break.

An operator chooses the backend, runs it and gives contiguous outputs; input is checked before, by the public
functions. Tuples of tensors are lists here and empty where there is none; a text output is empty without text.

Gradients: a backend may bring `<operation>_backward`. Its forward is then `<operation>_with_logsumexp`, with a third
output, float32 (batch, heads, image tokens + text tokens), which its backward is given together with both outputs.
For any other backend the forward is repeated with "sdpa" ("reference" with itself) and differentiated there.

After `register_flop_formulas()`, `torch.utils.flop_counter` counts what the methods need (`hires_kernels.flops`),
whatever a backend does.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op
from torch.utils._pytree import tree_flatten, tree_unflatten

from hires_kernels import backends, flops, reference, sdpa, watching
from hires_kernels.backends import Problem, choose
from hires_kernels.errors import KernelError


def _problem(operation: str, query: Tensor, needs_grad: bool, own_patches: bool = False) -> Problem:
    return Problem(operation, query.device, query.dtype, query.shape[-1], needs_grad, own_patches)


def chosen(backend: str, problem: Problem) -> ModuleType:
    """`choose`, and tell it to those who watch."""
    module = choose(backend, problem)
    name = next(name for name, entry in backends.BACKENDS.items() if entry.module is module)
    watching.operation(problem.operation, name)
    return module


def _optional(items: Sequence[Any]) -> Any:
    return tuple(items) or None


def _without_autocast(query: Tensor) -> torch.autocast:
    """Outputs keep the inputs' dtype, as a compiler is told; autocast has its say in the public functions."""
    return torch.autocast(query.device.type, enabled=False)


def _filled(x: Tensor | None, query: Tensor) -> Tensor:
    return query.new_empty(0) if x is None else x.contiguous()


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _differentiated(function: Callable[..., Any], tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of `tensors`, the arguments of `function`. Inside an operator autograd is off, torch.func is not."""
    backward: Callable[..., tuple[Tensor, ...]] = torch.func.vjp(function, *tensors)[1]
    return [x.contiguous() for x in backward(tuple(grads))]


def _differentiable(backend: str) -> ModuleType:
    return reference if backend == "reference" else sdpa


def _no_grad(argument: Any) -> Any:
    """None, in a list for each of a list of tensors."""
    tensors = isinstance(argument, list) and all(isinstance(x, Tensor) for x in argument)
    return [None] * len(argument) if tensors else None


def _register_autograd(operator: CustomOpDef, backward: CustomOpDef, leading: int, outputs: int = 0) -> None:
    """The first `leading` arguments, tensors and lists of tensors, get gradients from the operator `backward`.

    Its arguments are the outputs' gradients, the first `outputs` outputs and the forward's arguments.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        leaves, ctx.structure = tree_flatten(inputs)
        ctx.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        ctx.save_for_backward(*output[:outputs], *(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # asked for once: gradient checkpointing gives them once
        saved = iter(tensors[outputs:])
        leaves = [next(saved) if constant is None else constant[0] for constant in ctx.constants]
        inputs = tree_unflatten(leaves, ctx.structure)
        given = iter(backward(grads, tensors[:outputs], *inputs))
        parts = [next(given) if isinstance(x, Tensor) else [next(given) for _ in x] for x in inputs[:leading]]
        return *parts, *(_no_grad(x) for x in inputs[leading:])

    operator.register_autograd(differentiate, setup_context=setup_context)


# Neighborhood Patch Attention


@custom_op("hires::neighborhood_patch_attention", mutates_args=())
def neighborhood_patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: Sequence[Tensor],
    rope: Sequence[Tensor],
    shift: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int],
    text_rows: str,
    scale: float,
    backend: str,
    needs_grad: bool,
    patch: Sequence[int],
) -> tuple[Tensor, Tensor]:
    if shift is not None:
        _check_shift(shift, patch or [side // 2 for side in window])
    module = chosen(backend, _problem("neighborhood_patch_attention", query, needs_grad, bool(patch)))
    with _without_autocast(query):
        image, text_output = module.neighborhood_patch_attention(
            query,
            key,
            value,
            grid=tuple(grid),
            window=tuple(window),
            text=_optional(text),
            rope=_optional(rope),
            shift=shift,
            text_rows=text_rows,
            scale=scale,
            **_patch(patch),
        )
    return _filled(image, query), _filled(text_output, query)


def _check_shift(shift: Tensor, patch: Sequence[int]) -> None:
    """Here and not in the public function: a compiler can't follow a decision that depends on values."""
    most = shift.new_tensor(patch)
    if ((shift < 0) | (shift > most)).any():
        raise KernelError(f"shift {shift.tolist()}: allowed: 0 … {most.tolist()} per (row, column)")


def _patch(sides: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The option of those backends that run patches of another side than half the window's."""
    return {"patch": tuple(sides)} if sides else {}


@neighborhood_patch_attention.register_fake
def _(query, key, value, text, *_):
    return _like(query), _like(text[0]) if text else query.new_empty(0)


@custom_op("hires::neighborhood_patch_attention_backward", mutates_args=())
def neighborhood_patch_attention_backward(
    grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: Sequence[Tensor],
    rope: Sequence[Tensor],
    shift: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int],
    text_rows: str,
    scale: float,
    backend: str,
    needs_grad: bool,
    patch: Sequence[int],
) -> list[Tensor]:
    def forward(query: Tensor, key: Tensor, value: Tensor, *text: Tensor) -> tuple[Tensor, ...]:
        image, text_output = _differentiable(backend).neighborhood_patch_attention(
            query,
            key,
            value,
            grid=tuple(grid),
            window=tuple(window),
            text=_optional(text),
            rope=_optional(rope),
            shift=shift,
            text_rows=text_rows,
            scale=scale,
            **_patch(patch),
        )
        return (image, text_output) if text else (image,)

    return _differentiated(forward, (query, key, value, *text), grads[: 2 if text else 1])


@neighborhood_patch_attention_backward.register_fake
def _(grads, outputs, query, key, value, text, *_):
    return [_like(x) for x in (query, key, value, *text)]


_register_autograd(neighborhood_patch_attention, neighborhood_patch_attention_backward, leading=4)


def _neighborhood_patch_attention_flops(
    query, key, value, text, rope, shift, grid, window, text_rows, scale, backend, needs_grad, patch, *_, **__
) -> int:
    batch, _, heads, head_dim = query
    image, text_part = flops.neighborhood_patch_attention(
        tuple(grid),
        tuple(window),
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        text=text[0][1] if text else 0,
        text_rows=text_rows,
        shifted=shift is not None,
        patch=tuple(patch) or None,
    )
    return image + text_part


# Local attention


@custom_op("hires::local_attention", mutates_args=())
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: Sequence[Tensor],
    guidance: Sequence[Tensor],
    grid: Sequence[int],
    form: str,
    reach: int,
    guidance_grid: Sequence[int],
    guidance_neighbours: str,
    order: str,
    scale: float,
    backend: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    module = chosen(backend, _problem("local_attention", query, needs_grad))
    options = {
        "grid": tuple(grid),
        "form": form,
        "reach": reach,
        "text": _optional(text),
        "guidance": _optional(guidance),
        "guidance_grid": _optional(guidance_grid),
        "guidance_neighbours": guidance_neighbours,
        "order": order,
        "scale": scale,
    }
    with _without_autocast(query):
        if _brings_backward(module):
            image, text_output, logsumexp = module.local_attention_with_logsumexp(query, key, value, **options)
        else:
            image, text_output = module.local_attention(query, key, value, **options)
            logsumexp = query.new_empty(0, dtype=torch.float32)
    return _filled(image, query), _filled(text_output, query), logsumexp


def _brings_backward(module: ModuleType) -> bool:
    return hasattr(module, "local_attention_backward")


@local_attention.register_fake
def _(query, key, value, text, *options):
    backend, needs_grad = options[-2:]
    shape: tuple[int, ...] = (0,)
    if _brings_backward(choose(backend, _problem("local_attention", query, needs_grad))):
        shape = (query.shape[0], query.shape[2], query.shape[1] + (text[0].shape[1] if text else 0))
    logsumexp = query.new_empty(shape, dtype=torch.float32)
    return _like(query), _like(text[0]) if text else query.new_empty(0), logsumexp


@custom_op("hires::local_attention_backward", mutates_args=())
def local_attention_backward(
    grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: Sequence[Tensor],
    guidance: Sequence[Tensor],
    grid: Sequence[int],
    form: str,
    reach: int,
    guidance_grid: Sequence[int],
    guidance_neighbours: str,
    order: str,
    scale: float,
    backend: str,
    needs_grad: bool,
) -> list[Tensor]:
    options = {
        "grid": tuple(grid),
        "form": form,
        "reach": reach,
        "guidance_grid": _optional(guidance_grid),
        "guidance_neighbours": guidance_neighbours,
        "order": order,
        "scale": scale,
    }
    tensors = (query, key, value, *text, *guidance)
    module = choose(backend, _problem("local_attention", query, needs_grad))
    if _brings_backward(module):
        own = module.local_attention_backward(
            *grads[:2], *outputs, query, key, value, text=_optional(text), guidance=_optional(guidance), **options
        )
        return [x.contiguous() for x in own]

    def forward(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        text_part, guidance_part = others[: len(text)], others[len(text) :]
        image, text_output = _differentiable(backend).local_attention(
            query, key, value, text=_optional(text_part), guidance=_optional(guidance_part), **options
        )
        return (image, text_output) if text else (image,)

    return _differentiated(forward, tensors, grads[: 2 if text else 1])


@local_attention_backward.register_fake
def _(grads, outputs, query, key, value, text, guidance, *_):
    return [_like(x) for x in (query, key, value, *text, *guidance)]


_register_autograd(local_attention, local_attention_backward, leading=5, outputs=3)


def _local_attention_flops(
    query, key, value, text, guidance, grid, form, reach, guidance_grid, guidance_neighbours, *_, **__
) -> int:
    batch, _, heads, head_dim = query
    image, text_part = flops.local_attention(
        tuple(grid),
        form,
        reach,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        text=text[0][1] if text else 0,
        guidance_grid=_optional(guidance_grid),
        guidance_neighbours=guidance_neighbours,
    )
    return image + text_part


# RMSNorm and RoPE


@custom_op("hires::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    text: Sequence[Tensor],
    weight: Sequence[Tensor],
    text_weight: Sequence[Tensor],
    rope: Sequence[Tensor],
    places: Tensor | None,
    eps: float,
    scale: float,
    backend: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = chosen(backend, _problem("qk_norm_rope", query, needs_grad))
    with _without_autocast(query):
        image_query, image_key, text_query, text_key = module.qk_norm_rope(
            query,
            key,
            text=_optional(text),
            weight=tuple(weight),
            text_weight=_optional(text_weight),
            rope=tuple(rope),
            places=places,
            eps=eps,
            scale=scale,
        )
    return image_query, image_key, _filled(text_query, query), _filled(text_key, query)


@qk_norm_rope.register_fake
def _(query, key, text, weight, text_weight, rope, places, *_):
    texts = [x if places is None else x[:, None].expand(-1, len(places), -1, -1, -1) for x in text]
    return *map(_like, (query, key, *texts)), *(query.new_empty(0) for _ in range(2 - len(texts)))


@custom_op("hires::qk_norm_rope_backward", mutates_args=())
def qk_norm_rope_backward(
    grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    text: Sequence[Tensor],
    weight: Sequence[Tensor],
    text_weight: Sequence[Tensor],
    rope: Sequence[Tensor],
    places: Tensor | None,
    eps: float,
    scale: float,
    backend: str,
    needs_grad: bool,
) -> list[Tensor]:
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        query, key, *others = tensors
        text_part, weights = others[: len(text)], others[len(text) :]
        given: tuple[Any, ...] = reference.qk_norm_rope(
            query,
            key,
            text=_optional(text_part),
            weight=(weights[0], weights[1]),
            text_weight=_optional(weights[2:]),
            rope=(rope[0], rope[1]),
            places=places,
            eps=eps,
            scale=scale,
        )
        return given if text else given[:2]

    return _differentiated(forward, (query, key, *text, *weight, *text_weight), grads[: 4 if text else 2])


@qk_norm_rope_backward.register_fake
def _(grads, outputs, query, key, text, weight, text_weight, *_):
    return [_like(x) for x in (query, key, *text, *weight, *text_weight)]


_register_autograd(qk_norm_rope, qk_norm_rope_backward, leading=5)


# FLOPs


@cache
def register_flop_formulas() -> None:
    """Teach `torch.utils.flop_counter` the operators. Not done on import: that module imports triton."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.hires.neighborhood_patch_attention)(_neighborhood_patch_attention_flops)
    register_flop_formula(torch.ops.hires.local_attention)(_local_attention_flops)
