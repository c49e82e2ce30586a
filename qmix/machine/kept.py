"""Limit what libraries keep of this process's memory after they have used it, so that a plan can count it."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
KEPT_PRODUCTS = 16
PRODUCT_CACHES = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KEPT_PRODUCTS),  # oneDNN's own
    "LRU_CACHE_CAPACITY": str(KEPT_PRODUCTS),  # that of torch's layer above it
}


def limit_kept_memory() -> None:
    """Limit the freed blocks that the C library keeps, and the generated code of products that torch keeps.

    glibc keeps freed blocks of up to 32 MiB, in which activations of changing sizes find no place: a long prefill then
    held 150 MB more than it used. Now it returns those of 1 MiB or more; where the C library has no such setting,
    nothing changes.

    With AVX-512, oneDNN generates code for every shape of a product in bf16 and keeps the last 1024, as does torch's
    layer above it: 1 MB for every number of tokens that an expert ever got. The last 16 are as many as a step uses,
    and generating takes 0.6 ms. Takes effect before the process's first product; values of the user's own stay.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    for name, value in PRODUCT_CACHES.items():
        os.environ.setdefault(name, value)
