"""Recording which experts a run routes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from qmix.eviction import Key
from qmix.pool import ExpertPool
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
