"""Import bitsandbytes without warnings, without a request to a hub, and without torch's compiler.

When imported, its CPU backend tries to fetch a kernel through the `kernels` package and logs a warning if that fails.
It also wraps its fallbacks in `torch.compile`, which loads the whole compiler (1.5 s, 44 MB), though qmix never calls
them: the kernels that qmix uses are in bitsandbytes' own library. Without a GPU it would import Triton in vain (80 MB).

Where torch has CUDA, bitsandbytes loads its CUDA library, which lacks the CPU's 4-bit products. `cpu_library` is the
CPU library in either case.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """Return the function unchanged: a stand-in for torch.compile."""
    return function if function is not None else lambda wrapped: wrapped


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    was_disabled, compiler = logger.disabled, torch.compile
    hidden = ("kernels",) if torch.cuda.is_available() else ("kernels", "triton")
    before = {name: sys.modules[name] for name in hidden if name in sys.modules}
    logger.disabled = True
    torch.compile = _uncompiled  # type: ignore[assignment]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # makes importing them fail at once
    try:
        yield
    finally:
        logger.disabled, torch.compile = was_disabled, compiler
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(before)


if "bitsandbytes" in sys.modules:
    from bitsandbytes import functional
else:
    with _quiet():
        from bitsandbytes import functional

__all__ = ["cpu_library", "functional"]


@cache
def cpu_library() -> ctypes.CDLL | None:
    """Return bitsandbytes' library of CPU kernels; None if the package has none or it cannot be loaded."""
    from bitsandbytes.consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR  # after `functional`: it loads the package

    try:
        return ctypes.CDLL(str(PACKAGE_DIR / f"libbitsandbytes_cpu{DYNAMIC_LIBRARY_SUFFIX}"))
    except OSError:
        return None
