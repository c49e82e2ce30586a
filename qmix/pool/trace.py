"""Record which experts a run routes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from qmix.pool.eviction import Eviction, Key
from qmix.pool.experts import ExpertPool
from qmix.pool.stack import Array


@contextmanager
def recorded(pool: ExpertPool) -> Iterator[list[list[Key]]]:
    """Collect the (layer, expert) keys of each request to the pool inside the block, in order."""
    policy = pool.policy
    pool.policy = recorder = _Recorder(policy)
    try:
        yield recorder.steps
    finally:
        pool.policy = policy


class _Recorder:
    """An eviction policy that notes each use and leaves the rest to another."""

    def __init__(self, policy: Eviction) -> None:
        self.worth, self._used = policy.worth, policy.used
        self.steps: list[list[Key]] = []

    def used(self, layer: int, experts: Sequence[int]) -> None:
        self.steps.append([(layer, expert) for expert in experts])
        self._used(layer, experts)


def as_trace(steps: Sequence[Sequence[Key]], layers: int) -> Array:
    """Return recorded requests as a trace [steps, k] of experts, from layer 0 of the first pass to the last layer.

    -1 fills the steps of layers that requested nothing or fewer experts than others.
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
