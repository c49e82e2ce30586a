"""The thread that computes: torch's pool of compute threads belongs to it, and it lives as long as its model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from qmix.engine.stream import compute_threads
from qmix.pool.experts import ExpertPool

P = ParamSpec("P")
T = TypeVar("T")


class ComputeThread:
    """Runs one piece of work after another over a pool."""

    def __init__(self, pool: ExpertPool) -> None:
        self.pool = pool
        self._thread = ThreadPoolExecutor(
            1, "qmix-compute", torch.set_num_threads, (compute_threads(pool.store.geometry),)
        )

    def run(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """What `work` gives. What interrupts the caller ends it within an expert's time."""
        job = self._thread.submit(work, *arguments, **options)
        try:
            return job.result()
        except BaseException:
            if not job.done():
                self.pool.cancelled = True
                job.exception()
                self.pool.cancelled = False
            raise

    def close(self) -> None:
        """End it, and let go of the pool's files; harmless to repeat."""
        self._thread.shutdown()
        self.pool.close()
