"""The number of threads that kernels of the calling thread use, and torch's own number. Loads no Numba."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GRAIN = 2**15  # elements of a tensor that torch gives to one thread

_chosen = threading.local()


def threads() -> int:
    """Return how many threads share a kernel: torch's number, unless the calling thread has chosen another."""
    return getattr(_chosen, "threads", None) or torch.get_num_threads()


def choose_threads(count: int | None) -> None:
    """Let kernels of the calling thread run on `count` threads, whatever torch's operations use; None undoes it."""
    _chosen.threads = count


@contextmanager
def one_for_torch(elements: int) -> Iterator[None]:
    """Run torch's operations on one thread if their tensors have fewer `elements` than GRAIN; kernels keep all.

    So few are no work for several threads, and OpenMP's threads wait for each other at each operation: for
    milliseconds beside other programs.
    """
    before, chosen = torch.get_num_threads(), getattr(_chosen, "threads", None)
    if before == 1 or elements >= GRAIN:
        yield
        return
    choose_threads(chosen or before)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        choose_threads(chosen)
