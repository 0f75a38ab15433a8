"""Threads beside each other."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


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
