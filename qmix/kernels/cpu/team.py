"""Run kernels on torch's own OpenMP thread team.

Two thread pools that spin while they wait take the cores from each other. So this module starts no thread: it passes a
kernel to GOMP_parallel of the same OpenMP library that torch uses, which wakes the threads that torch.set_num_threads
gave to the calling thread. That takes about two microseconds.

A kernel takes one address, of int64 arguments. The first is a counter that starts at zero, from which each thread
draws the number of its next piece of work until none is left. A delayed thread delays no other. One thread computes
each piece in one way, so results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


def run(kernel: int, *arguments: int) -> None:
    """Call the kernel at the address `kernel` on as many threads as torch uses, without the GIL."""
    block = (ctypes.c_int64 * (1 + len(arguments)))(0, *arguments)
    parallel = _parallel()
    if parallel is None or torch.get_num_threads() == 1:
        _ALONE(kernel)(block)
    else:
        parallel(kernel, block, 0, 0)  # 0 threads: the caller's number


_ALONE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _parallel() -> Callable[..., None] | None:
    """Return GOMP_parallel as torch's kernels find it; None where torch uses another runtime (macOS)."""
    try:  # looked up through the library that needs it, so that no second copy is loaded under another name
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function
