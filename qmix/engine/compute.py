"""The thread that computes with a model, and the one way to stop what it does."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import torch

from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.kernels.cpu.threads import choose_threads
from qmix.pool.experts import ExpertPool

SHARED_WEIGHTS = 2**19  # in an expert's largest matrix: from here on cores share a product

P = ParamSpec("P")
T = TypeVar("T")


def compute_threads(geometry: Geometry) -> int:
    """Return how many threads share one product: all that torch has, or one where that is faster.

    Waking the others costs some 20 microseconds; a matrix of half a million weights takes one core about that long.
    """
    largest = max(rows * cols for rows, cols in geometry.expert_matrices.values())
    return torch.get_num_threads() if largest >= SHARED_WEIGHTS else 1


class ComputeThread:
    """Runs one job after another over a pool of experts.

    It lives as long as its model: torch keeps a team of threads for each thread that computes.
    """

    def __init__(self, pool: ExpertPool) -> None:
        self.pool, self.closed = pool, False
        self.threads = compute_threads(pool.store.geometry)
        self._worked: tuple[float, float | None] = 0.0, None  # seconds of jobs before, and since when one runs
        self._executor = ThreadPoolExecutor(1, "qmix-compute", _use_threads, (self.threads,))

    def start(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
        """Begin a job when those before it are done. Raises UsageError after `close`."""
        if self.closed:
            raise UsageError("this runner is closed; load the model again")
        return self._executor.submit(self._timed, partial(work, *arguments, **options))

    @property
    def busy(self) -> float:
        """The seconds in which a job ran."""
        seconds, since = self._worked
        return seconds if since is None else seconds + time.perf_counter() - since

    def _timed(self, work: Callable[[], T]) -> T:
        before, since = self._worked[0], time.perf_counter()
        self._worked = before, since
        try:
            return work()
        finally:
            self._worked = before + time.perf_counter() - since, None

    def run(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Return the result of a job. An exception that interrupts the caller stops the job."""
        job = self.start(work, *arguments, **options)
        try:
            return job.result()
        finally:
            self.stop(job)

    def stop(self, job: Future[T]) -> None:
        """End a job and wait for its end: at the next expert or token if it runs, at once if not."""
        if not job.done() and not job.cancel():
            self.pool.cancelled = True
            job.exception()
            self.pool.cancelled = self.closed

    def close(self) -> None:
        """Stop what runs and close the pool; harmless to repeat."""
        self.closed = self.pool.cancelled = True
        self._executor.shutdown(cancel_futures=True)
        self.pool.close()


def _use_threads(count: int) -> None:
    torch.set_num_threads(count)
    choose_threads(count)
