"""Backend "triton": fused kernels in the Triton language. Triton is imported at the first call."""

from torch import Tensor


def neighborhood_patch_attention(*tensors: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    from hires_kernels.fused import npa

    return npa.neighborhood_patch_attention(*tensors, **options)


def qk_norm_rope(*tensors: Tensor, **options) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    from hires_kernels.fused import prologue

    return prologue.qk_norm_rope(*tensors, **options)


def local_attention(*tensors: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    from hires_kernels.fused import local

    return local.local_attention(*tensors, **options)


def local_attention_with_logsumexp(*tensors: Tensor, **options) -> tuple[Tensor, Tensor | None, Tensor]:
    from hires_kernels.fused import local

    return local.local_attention_with_logsumexp(*tensors, **options)


def local_attention_backward(*tensors: Tensor, **options) -> list[Tensor]:
    from hires_kernels.fused import local

    return local.local_attention_backward(*tensors, **options)


def group_norm(x: Tensor, **options) -> Tensor:
    from hires_kernels.fused import images

    return images.group_norm(x, **options)


def add_bias(x: Tensor, y: Tensor, *, bias: Tensor) -> Tensor:
    from hires_kernels.fused import images

    return images.add_bias(x, y, bias=bias)
