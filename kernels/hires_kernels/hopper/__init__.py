"""Backend "gluon": kernels written out for sm_90 in Gluon, the language below Triton. Imported at the first call."""

from torch import Tensor


def neighborhood_patch_attention(*tensors: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    from hires_kernels.fused import npa
    from hires_kernels.hopper.npa import attend

    return npa.neighborhood_patch_attention(*tensors, **options, run=attend)
