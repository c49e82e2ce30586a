"""Compile functions with Numba and keep their machine code on disk.

Numba checks cached machine code against the file of the compiled function alone, but the code also contains helpers,
tiles and constants of other files. Here all files of `qmix.kernels` count: an edit of any of them compiles anew.

The first compilation takes 100 MB of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import llvmlite
from numba import njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.ccallback import CFunc

from qmix.kernels.cpu.paths import current
from qmix.kernels.sources import source_digest

KERNEL_SIGNATURE = (types.CPointer(types.int64),), types.void


class _CachedFiles(CompileResultCacheImpl):
    """The files of one function's machine code: one set for each CPU path, valid for one state of the sources."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.locator.get_source_stamp = _stamp

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        return f"{super().get_filename_base(fullname, abiflags)}-{current().name}"


class _KernelCache(FunctionCache):
    _impl_class = _CachedFiles


def _stamp() -> str:
    """Return what compiled code depends on besides Numba's version and the processor, which Numba checks."""
    return f"{source_digest()} {llvmlite.__version__}"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled: at its first call, to run without the GIL, cached where a directory is writable."""
    return _with_cache(njit(nogil=True, error_model="numpy")(function), function)


def compiled_address(kernel: Callable[..., None], signature: Any = KERNEL_SIGNATURE) -> int:
    """Return the address of a kernel, by default of one int64 pointer, compiled now or read from the cache."""
    callback = _with_cache(CFunc(kernel, signature, {}, {"error_model": "numpy"}), kernel)
    callback.compile()
    return callback.address


def compiled_part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for compiled ones, which LLVM inlines into them; Python cannot call it.

    Each kernel that uses it compiles it again, so large ones, as are the tiles, are called by address instead.
    """
    return njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def _with_cache(compilable: Any, function: Callable[..., Any]) -> Any:
    with suppress(RuntimeError):  # neither the function's own directory nor the user's cache is writable
        compilable._cache = _KernelCache(function)
    return compilable
