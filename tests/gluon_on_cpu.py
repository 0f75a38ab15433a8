"""An interpreter for the part of Gluon that `hires_kernels.hopper` uses: the kernel's own text runs on the CPU.

Partitions are threads and barriers count arrivals and bytes, so that a deadlock or a wrong phase shows. Asynchronous
work is done at a random moment between its start and the wait for it, and fresh shared memory holds NaN: a buffer that
is read too early or overwritten too early gives wrong numbers. Layouts are ignored, what they cost or refuse is not
seen here.
"""

import builtins
import importlib.util
import random
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import torch
import triton.experimental.gluon.nvidia.hopper
from torch import Tensor

PROGRAMS = 3  # multiprocessors
local = threading.local()
memory = threading.Lock()
chance = random.Random()


def pause():
    if chance.random() < 0.1:
        time.sleep(chance.random() * 1e-3)


def block(x):
    return x if isinstance(x, Tensor) else torch.tensor(x)


class Pointer:
    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset)

    def unsqueeze(self, dim):
        return Pointer(self.memory, self.offset.unsqueeze(dim))

    def read(self, mask):
        offset, mask = torch.broadcast_tensors(self.offset, mask)
        values = torch.zeros(offset.shape, dtype=self.memory.dtype)
        values[mask] = self.memory[offset[mask]]
        return values

    def write(self, values, mask):
        offset, values, mask = torch.broadcast_tensors(self.offset, values, mask)
        self.memory[offset[mask]] = values[mask].to(self.memory.dtype)


def argument(x):
    """What a kernel sees of an argument."""
    if isinstance(x, Tensor):
        tokens = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return Pointer(x.as_strided((tokens,), (1,)), torch.tensor(0))
    if isinstance(x, tuple):
        return tuple(map(argument, x))
    return torch.tensor(x) if type(x) is int else x


class Kernel:
    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **constants):
            for program in range(grid[0]):
                local.program, local.programs = program, grid[0]
                self.function(*map(argument, arguments), **constants)

        return launch


class Shared:
    def __init__(self, data):
        self.data = data
        self.shape, self.dtype = getattr(data, "shape", None), getattr(data, "dtype", None)

    def index(self, i):
        return self.data[int(i)] if isinstance(self.data, list) else Shared(self.data[int(i)])

    def reshape(self, shape):
        return Shared(self.data.view(shape))

    def store(self, values):
        self.data.copy_(values)

    def load(self, layout):
        return self.data.clone()

    def permute(self, order):
        return Shared(self.data.permute(order))


class Barrier:
    def __init__(self):
        self.changed, self.phase, self.missing_bytes = threading.Condition(), 0, 0

    def init(self, count):
        self.count = self.missing = count

    def progress(self, arrivals=0, expected=0):
        with self.changed:
            self.missing -= arrivals
            self.missing_bytes += expected
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == self.missing_bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity):
        pause()
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != int(parity), timeout=20):
                raise RuntimeError("deadlock")


class Product:
    """A matrix product under way."""

    def __init__(self, left, right, sums, use_acc):
        self.operands, self.sums, self.use_acc, self.value = (left, right), sums, use_acc, None

    def finish(self):
        if self.value is None:
            left, right = (x.data if isinstance(x, Shared) else x for x in self.operands)
            sums = self.sums.value if isinstance(self.sums, Product) else self.sums
            self.value = left.float() @ right.float() + (sums if self.use_acc else 0)


def under_way(kind):
    if not hasattr(local, kind):
        setattr(local, kind, [])
    return getattr(local, kind)


def warpgroup_mma(left, right, sums, use_acc=True, is_async=False):
    under_way("products").append(Product(left, right, sums, use_acc))
    if chance.random() < 0.3:
        for product in under_way("products"):
            product.finish()
    return under_way("products")[-1]


def warpgroup_mma_wait(left, results):
    while len(under_way("products")) > left:
        under_way("products").pop(0).finish()
    pause()
    values = tuple(x.value if isinstance(x, Product) else x for x in results)
    assert all(x is not None for x in values), "a product is used before the wait for it"
    return values if len(values) > 1 else values[0]


def copy_queries(target, source, mask):
    def copy():
        target.data.copy_(source.read(mask))

    under_way("copies").append(copy)
    if chance.random() < 0.5:
        copy()


def finish_copies(left):
    while len(under_way("copies")) > left:
        under_way("copies").pop(0)()


class Descriptor:
    def __init__(self, base, shape, strides, block_shape, layout):
        self.memory, self.shape, self.strides, self.block_shape = argument(base), shape, strides, block_shape
        self.dtype, self.layout = base.dtype, layout

    def load(self, place, barrier, target):
        assert list(target.shape) == list(self.block_shape)

        def copy():
            pause()
            offset, inside = torch.tensor(0), torch.tensor(True)
            for dim, (first, size) in enumerate(zip(place, self.block_shape, strict=True)):
                index = (int(first) + torch.arange(size)).view([-1 if i == dim else 1 for i in range(len(place))])
                offset = offset + index * self.strides[dim]
                inside = inside & (index >= 0) & (index < self.shape[dim])
            target.data.copy_((self.memory + offset).read(inside))
            barrier.progress(expected=-target.data.nbytes)

        threading.Thread(target=copy).start()


def warp_specialize(partitions, worker_num_warps, worker_num_regs):
    place, failures = (local.program, local.programs), []

    def run(function, arguments):
        local.program, local.programs = place
        try:
            function(*arguments)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def atomic(combine, pointer, value):
    with memory:
        before = pointer.read(torch.tensor(True))
        pointer.write(combine(before, block(value)), torch.tensor(True))
    return before


def allocate(dtype, shape, layout):
    if layout == "barriers":
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


def no_layout(*_):
    return None


language = SimpleNamespace(
    constexpr=lambda x: x, float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32, int64=torch.int64,
    BlockedLayout=no_layout, SliceLayout=no_layout, NVMMADistributedLayout=no_layout, DotOperandLayout=no_layout,
    DistributedLinearLayout=no_layout, reshape=torch.reshape,
    NVMMASharedLayout=SimpleNamespace(get_default_for=no_layout),
    allocate_shared_memory=allocate, static_range=range, thread_barrier=lambda: None, to_tensor=block,
    program_id=lambda axis: torch.tensor(local.program), num_programs=lambda axis: torch.tensor(local.programs),
    arange=lambda start, end, layout: torch.arange(start, end), zeros=lambda shape, dtype, _: torch.zeros(shape),
    full=lambda shape, value, dtype, _: torch.full(shape, value),
    where=lambda condition, a, b: torch.where(block(condition), block(a), block(b)),
    maximum=lambda a, b: torch.maximum(block(a), block(b)), minimum=lambda a, b: torch.minimum(block(a), block(b)),
    max=Tensor.amax, min=Tensor.amin, sum=Tensor.sum, exp2=torch.exp2, cdiv=lambda a, b: -(-a // b),
    expand_dims=lambda x, dim: x.unsqueeze(dim), convert_layout=lambda x, layout: x,
    load=lambda pointer: pointer.read(torch.tensor(True)),
    store=lambda pointer, values, mask=True: pointer.write(block(values), block(mask)),
    atomic_or=partial(atomic, torch.bitwise_or), atomic_add=partial(atomic, torch.add),
    warp_specialize=warp_specialize,
    inline_asm_elementwise=lambda asm, operands, factors, *_: factors[0] * factors[1],  # all that there is
)  # fmt: skip
hopper = SimpleNamespace(
    async_copy=SimpleNamespace(
        async_copy_global_to_shared=copy_queries, commit_group=lambda: None, wait_group=finish_copies
    ),
    fence_async_shared=lambda: None,
    mbarrier=SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=Barrier.init,
        wait=lambda barrier, phase, pred=True: barrier.wait(phase) if pred else None,
        arrive=lambda barrier, pred=True: barrier.progress(arrivals=1) if pred else None,
        expect=lambda barrier, size: barrier.progress(arrivals=1, expected=size),
    ),
    tma=SimpleNamespace(async_copy_global_to_shared=Descriptor.load),
    warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=warpgroup_mma_wait,
)


def interpret(name, monkeypatch, seed):
    """The module `name` of Gluon kernels, interpreted; `seed` sets the moments of asynchronous work."""
    chance.seed(seed)
    gluon = SimpleNamespace(jit=Kernel, language=language)
    monkeypatch.setattr(triton.experimental, "gluon", gluon)
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", gluon)
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.hopper", hopper)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=PROGRAMS))
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    module.range = lambda *bounds: map(torch.tensor, builtins.range(*map(int, bounds)))
    spec.loader.exec_module(module)
    module.TensorDescriptor = Descriptor
    return module
