"""Functions compiled by numba, which takes a tenth of a gigabyte with the first of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first call, without the GIL, and kept on disk where a directory can be written."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither the function's own directory nor the user's cache
        return njit(nogil=True, error_model="numpy")(function)
