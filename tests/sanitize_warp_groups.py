"""A Gluon kernel whose warp groups share nothing, for compute-sanitizer: what it reports here is the compiler's own."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _write(target, PLACE: gl.constexpr):
    gl.store(target + PLACE, PLACE + 1)


@gluon.jit
def _apart(target):
    gl.warp_specialize([(_write, (target, 0)), (_write, (target, 1))], worker_num_warps=[4], worker_num_regs=[24])


if __name__ == "__main__":
    found = torch.zeros(2, dtype=torch.int32, device="cuda")
    _apart[(2,)](found, num_warps=4)
    assert found.tolist() == [1, 2]
    print("ran")
