"""Threads beside each other."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


def allowed(count: int) -> int:
    """`count` threads, or as many as OMP_NUM_THREADS allows, by which several processes are told what each may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(count, int(given)) if given.isdecimal() and int(given) else count


@contextmanager
def one_core_each(count: int) -> Iterator[ThreadPoolExecutor]:
    """`count` threads in each of which torch computes with one: teams of its own would get into each other's way."""
    import torch

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
