"""The number of threads that kernels of the calling thread use. Loads no Numba."""

from __future__ import annotations

import threading

import torch

_chosen = threading.local()


def threads() -> int:
    """Return how many threads share a kernel: torch's number, unless the calling thread has chosen another."""
    return getattr(_chosen, "threads", None) or torch.get_num_threads()


def choose_threads(count: int) -> None:
    """Let kernels of the calling thread run on `count` threads, whatever torch's own operations use."""
    _chosen.threads = count
