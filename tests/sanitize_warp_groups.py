"""A Gluon kernel whose warp groups share nothing, for compute-sanitizer: what it reports here is the compiler's own."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def _write(target, times, PLACE: gl.constexpr):
    for _ in range(times):
        gl.store(target + PLACE, PLACE + 1)


@gluon.jit
def _apart(target, times):
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(2):
        mbarrier.init(barriers.index(k), 1)
    gl.warp_specialize([
        (_write, (target, times, 0)),
        (_write, (target, times, 1)),
        (_write, (target, times, 2)),
    ], worker_num_warps=[4, 1], worker_num_regs=[240, 24])  # fmt: skip


if __name__ == "__main__":
    found = torch.zeros(3, dtype=torch.int32, device="cuda")
    _apart[(264,)](found, 3, num_warps=4)
    assert found.tolist() == [1, 2, 3]
    print("ran")
