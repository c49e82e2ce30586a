"""Jobs of the compute thread, and how each is stopped."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from qmix.engine.compute import ComputeThread
from qmix.errors import Cancelled, UsageError


@pytest.fixture
def thread():
    """Over a pool that only knows whether it was cancelled and closed."""
    geometry = SimpleNamespace(expert_matrices={"w1": (8, 8)})
    pool = SimpleNamespace(store=SimpleNamespace(geometry=geometry), cancelled=False, closed=False)
    pool.close = lambda: setattr(pool, "closed", True)
    thread = ComputeThread(pool)
    yield thread
    thread.close()


def until_cancelled(thread: ComputeThread, begun: threading.Event) -> None:
    begun.set()
    while not thread.pool.cancelled:
        time.sleep(0.001)
    raise Cancelled


def test_a_running_job_is_stopped_by_the_pool_and_the_next_one_runs(thread):
    begun = threading.Event()
    job = thread.start(until_cancelled, thread, begun)
    begun.wait()
    thread.stop(job)
    assert isinstance(job.exception(), Cancelled)
    assert thread.run(lambda: 5) == 5


def test_a_job_that_waits_is_stopped_without_touching_the_one_that_runs(thread):
    begun, go_on = threading.Event(), threading.Event()
    first = thread.start(lambda: begun.set() or go_on.wait())
    begun.wait()
    second = thread.start(lambda: 5)
    thread.stop(second)
    go_on.set()
    assert (second.cancelled(), first.result(), thread.pool.cancelled) == (True, True, False)


def test_closing_stops_what_runs_and_nothing_begins_afterwards(thread):
    begun = threading.Event()
    job = thread.start(until_cancelled, thread, begun)
    begun.wait()
    thread.close()
    assert isinstance(job.exception(), Cancelled)
    assert thread.pool.closed
    with pytest.raises(UsageError, match="closed"):
        thread.run(lambda: 5)
