"""Limit the rate of all reads of this process, as a slower disk would."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from qmix.disk.direct import DirectFile


@contextmanager
def limited(rate: float | None) -> Iterator[None]:
    """Let reads take at least the time that a disk of `rate` bytes/s takes, one after the other; None: no limit."""
    if rate is None:
        yield
        return
    read_into, lock, free_from = DirectFile.read_into, Lock(), [0.0]

    def late(file: DirectFile, pages: memoryview, offset: int, nbytes: int | None = None) -> None:
        with lock:
            free_from[0] = max(free_from[0], time.perf_counter()) + len(pages) / rate
            until = free_from[0]
        read_into(file, pages, offset, nbytes)
        time.sleep(max(0.0, until - time.perf_counter()))

    DirectFile.read_into = late  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DirectFile.read_into = read_into  # type: ignore[method-assign]
