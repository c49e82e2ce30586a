"""Compile functions with Numba and keep their machine code on disk.

Numba checks cached machine code against the file of the compiled function alone, but the code also contains helpers,
tiles and constants of other files. Here all files of `qmix.kernels` count: an edit of any of them compiles anew.

Each function has a file for each set of constants, processor and CPU path. It is replaced in one step and contains its
own checksum: processes may compile at the same time, and code of which only a part was written is compiled again.

The first compilation takes 100 MB of memory.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.ccallback import CFunc
from numba.core.serialize import dumps

from qmix.files import write_whole
from qmix.kernels.cpu.paths import current
from qmix.kernels.sources import source_digest

_LOG = logging.getLogger(__name__)

KERNEL_SIGNATURE = (types.CPointer(types.int64),), types.void


class _CodeFiles:
    """The files of one function, in place of Numba's, which share an index that is written before the code is."""

    def __init__(self, directory: str, name: str) -> None:
        self._directory, self._name = Path(directory), name

    def load(self, key: Any) -> Any:
        """Return what was saved with a key; None unless it is whole and from the same sources."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        digest, stamped = content[:32], content[32:]
        if digest != hashlib.sha256(stamped).digest() or stamped[:32] != self._stamp(key):
            return None  # before anything is unpickled: another Numba's classes may be gone
        return pickle.loads(stamped[32:])

    def save(self, key: Any, code: Any) -> None:
        """Keep code for a key; where it cannot be written, it is compiled again next time."""
        stamped = self._stamp(key) + dumps(code)
        try:
            write_whole(self._path(key), hashlib.sha256(stamped).digest() + stamped)
        except OSError as error:
            _warn_of(self._directory, error.strerror)

    def _path(self, key: Any) -> Path:
        signature, processor, (_, constants) = key
        identity = repr((str(signature), processor, constants, current().name))
        return self._directory / f"{self._name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.nbc"

    def _stamp(self, key: Any) -> bytes:
        """Return the digest of what compiled code depends on besides what the path is made of."""
        bytecode = key[2][0]
        depends = source_digest(), llvmlite.__version__, numba.__version__, bytecode
        return hashlib.sha256(repr(depends).encode()).digest()


class _KernelCache(FunctionCache):
    _impl_class = CompileResultCacheImpl

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _CodeFiles(self.cache_path, self._impl.filename_base)


@cache
def _warn_of(directory: Path | None, reason: str) -> None:
    where = f"{directory} cannot be written ({reason})" if directory else "no directory for them can be written"
    _LOG.warning("kernels are compiled again at the next start, in up to 20 s: %s", where)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled: at its first call, to run without the GIL, cached where a directory is writable."""
    return _with_cache(njit(nogil=True, error_model="numpy")(function), function)


def compiled_address(kernel: Callable[..., None], signature: Any = KERNEL_SIGNATURE) -> int:
    """Return the address of a kernel, by default of one int64 pointer, compiled now or read from the cache."""
    callback = _with_cache(CFunc(kernel, signature, {}, {"error_model": "numpy"}), kernel)
    callback.compile()
    return callback.address


def compiled_part(function: Callable[..., Any]) -> Any:
    """Return a function for compiled ones, which LLVM inlines into them; Python calls its `py_func`.

    Each kernel that uses it compiles it again, so large ones, as are the tiles, are called by address instead.
    """
    return njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def _with_cache(compilable: Any, function: Callable[..., Any]) -> Any:
    try:
        compilable._cache = _KernelCache(function)
    except RuntimeError:  # neither the function's own directory nor the user's cache is writable
        _warn_of(None, "")
    return compilable
