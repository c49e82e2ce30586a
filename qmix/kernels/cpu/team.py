"""Kernels run by torch's own team of threads.

Two pools of threads that wait for work by spinning take the cores from each other. So nothing here starts a thread:
a kernel is handed to GOMP_parallel of the very OpenMP library that torch's products use, and wakes the threads that
torch.set_num_threads gave to the calling thread. That costs some two microseconds.

A kernel takes one address, of int64 arguments whose first is a counter that starts at zero. Each thread draws from it
the number of the next piece of work until none is left: a thread that is held up holds up nobody, and as each piece
is computed by one thread in one way, results do not depend on how many there are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


def run(kernel: int, *arguments: int) -> None:
    """Call the kernel at the address `kernel`, on as many threads as torch would take, without the GIL."""
    block = (ctypes.c_int64 * (1 + len(arguments)))(0, *arguments)
    parallel = _parallel()
    if parallel is None or torch.get_num_threads() == 1:
        _ALONE(kernel)(block)
    else:
        parallel(kernel, block, 0, 0)  # 0 threads: as many as the caller has been given


_ALONE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _parallel() -> Callable[..., None] | None:
    """GOMP_parallel as torch's kernels find it; None where torch uses another runtime (macOS)."""
    try:  # looked up through the library that needs it, so that no second copy is loaded under another name
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function
