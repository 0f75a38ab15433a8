"""Regional compilation: one graph for each kind of repeated block and each size, changes nothing but rounding."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = (  # PyTorch's own order has cuDNN, the fastest on Hopper, behind its FlashAttention 2
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
GRAPHS = 256  # of one kind of block: sizes, attention kinds, batches; torch allows 8
COMPILED: WeakSet[nn.Module] = WeakSet()  # the models after `compile_blocks`


def fastest_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Within it `scaled_dot_product_attention` prefers cuDNN on a GPU, and what PyTorch prefers elsewhere."""
    return sdpa_kernel(list(ATTENTION), set_priority=True) if device.type == "cuda" else nullcontext()


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> nn.Module:
    """Compile the repeated blocks of a diffusers model in place, and a U-Net's residual blocks; returns the model.

    Shapes are static: the attention operators' geometry is, so a dynamic graph would be compiled anew for each size
    all the same, and run slower. A cascade of three sizes makes three graphs a size on FLUX. Not one block may break
    its graph. Hooks and caches of diffusers that are put on later run around the compiled blocks.
    """
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * GRAPHS)
    names = (*getattr(model, "_repeated_blocks", ()), "ResnetBlock2D")
    for module in model.modules():
        if type(module).__name__ in names:
            module.forward = _with_attention(  # type: ignore[method-assign]
                torch.compile(module.forward, fullgraph=True, dynamic=False, backend=backend)
            )
    COMPILED.add(model)
    return model


def _with_attention(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with the fastest attention; the choice is made when a graph is traced."""

    def call(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        with fastest_attention(device):
            return forward(*args, **kwargs)

    return call
