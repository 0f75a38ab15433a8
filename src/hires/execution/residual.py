"""The residual blocks of a VAE, channels last and with fused norms.

PyTorch, channels first, reads or writes the pixels of a block 31 times: tensor cores want channels last, so cuDNN
reorders what every convolution takes and gives, and GroupNorm, SiLU, the convolutions' biases, the sum and its division
by 1 go over all of it for themselves. Here it is 13 times, of which the two convolutions have 4.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils.torch_utils import unwrap_module
from hires_kernels import Problem, add_bias, group_norm
from hires_kernels.backends import BACKENDS, choose
from torch import Tensor, nn
from torch.nn.functional import conv2d

Forward = Callable[..., Tensor]
PLAIN = (nn.GroupNorm, nn.SiLU, nn.Conv2d, nn.Dropout, nn.Identity)  # what a block may consist of


@contextmanager
def fused_blocks(vae: Any, backend: str = "auto") -> Iterator[None]:
    """Within it residual blocks and the last norms of a diffusers VAE run fused, where a backend has the kernels.

    What isn't diffusers' own, or is compiled, quantised, hooked (offloading) or trained, runs as it is.

    Args:
        vae: with an `encoder` or `decoder` as `AutoencoderKL` has them; any other is left alone.
        backend: of `hires_kernels`; "auto" changes nothing where it would choose plain PyTorch.
    """
    replaced = dict(_forwards(unwrap_module(vae), backend))
    for module, forward in replaced.items():
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _forwards(vae: nn.Module, backend: str) -> Iterator[tuple[nn.Module, Forward]]:
    """Modules and what they run instead."""
    if torch.is_grad_enabled() or vars(vae).keys() & {"encode", "decode"} or any(map(_compiled, vae.modules())):
        return
    module: Any
    for module in vae.modules():
        if _fits(module) and _plain(module, backend):
            yield module, partial(residual, module, backend=backend)
        elif type(module) in (Encoder, Decoder):
            norm, activation, first = module.conv_norm_out, module.conv_act, module.conv_in
            if all(type(x) in PLAIN and _plain(x, backend) for x in (norm, activation, first)):
                yield norm, partial(_norm, norm, silu=True, backend=backend)
                yield activation, _same
                yield first, partial(_channels_last, first.forward)


def residual(block: Any, x: Tensor, temb: None = None, *, backend: str = "auto") -> Tensor:
    """A block without time embedding: x + conv(SiLU(norm(conv(SiLU(norm(x)))))), (B, C, H, W), channels last."""
    hidden = _norm(block.norm1, x, silu=True, backend=backend)
    hidden = _convolved(block.conv1, hidden)
    hidden = _norm(block.norm2, hidden, silu=True, shift=block.conv1.bias, backend=backend)
    hidden = _convolved(block.conv2, hidden)
    kept = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return add_bias(kept, hidden, block.conv2.bias, backend=backend)


def _norm(norm: Any, x: Tensor, *, silu: bool, backend: str, shift: Tensor | None = None) -> Tensor:
    options: dict[str, Any] = {"eps": norm.eps, "silu": silu, "shift": shift, "backend": backend}
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, **options)


def _convolved(convolution: Any, x: Tensor) -> Tensor:
    """Without its bias."""
    return conv2d(x, convolution.weight, None, convolution.stride, convolution.padding)


def _channels_last(forward: Forward, x: Tensor) -> Tensor:
    return forward(x.contiguous(memory_format=torch.channels_last))


def _same(x: Tensor) -> Tensor:
    return x


def _compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _fits(module: Any) -> bool:
    """Whether a module is a residual block that does what `residual` does."""
    return (
        type(module) is ResnetBlock2D
        and module.time_emb_proj is module.upsample is module.downsample is None
        and module.time_embedding_norm != "scale_shift"
        and module.output_scale_factor == 1
        and isinstance(module.nonlinearity, nn.SiLU)
        and not (module.training and module.dropout.p)
        and all(type(child) in PLAIN for child in module.children())
    )


def _plain(module: nn.Module, backend: str) -> bool:
    """Whether nothing in it has a hook or a forward of its own, and a fused kernel takes its tensors."""
    for part in module.modules():
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            return False
    weights = [*module.parameters()]
    if not weights:
        return True
    x = weights[0]
    cudnn: Any = torch.backends.cudnn
    if x.dtype == torch.float32 and cudnn.conv.fp32_precision != "tf32":  # no tensor cores
        return False
    problem = Problem("group_norm", x.device, x.dtype, x.shape[0])
    return choose(backend, problem) is BACKENDS["triton"].module
