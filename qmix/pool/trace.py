"""Recording which experts a run routes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np

from qmix.pool.eviction import Key
from qmix.pool.experts import ExpertPool
from qmix.pool.stack import Array
from qmix.precision.matmul import Expert


@contextmanager
def recorded(pool: ExpertPool) -> Iterator[list[list[Key]]]:
    """Collects, while it is open, the (layer, expert) keys of each request to the pool, in order."""
    steps: list[list[Key]] = []
    get = pool.get

    def recording(layer: int, experts: Sequence[int], coming: Sequence[Key] = ()) -> Iterator[tuple[int, Expert]]:
        steps.append([(layer, expert) for expert in experts])
        return get(layer, experts, coming)

    with mock.patch.object(pool, "get", recording):
        yield steps


def as_trace(steps: Sequence[Sequence[Key]], layers: int) -> Array:
    """Recorded requests as a trace [steps, k] of experts: its first step is layer 0's, its last layer a whole pass's.

    -1 fills the steps of layers that asked the pool for nothing, and those that asked for fewer than others.
    """
    rows: list[Sequence[Key]] = []
    for step in steps:
        if step:
            rows += [()] * ((step[0][0] - len(rows)) % layers)
            rows.append(step)
    rows += [()] * (-len(rows) % layers)
    trace = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int16)
    for number, row in enumerate(rows):
        trace[number, : len(row)] = [expert for _, expert in row]
    return trace
