"""Routing replayed through caches: how often an expert is in memory, for a policy and a number of slots.

A trace is a list of steps, each the keys that one layer's step needs at once. Those stay until the step is over, so
a step's own experts never push each other out where there are slots enough for them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

from qmix.eviction import Eviction, Key

Trace = Sequence[Sequence[Key]]


def hits(trace: Trace, slots: int, policy: Eviction) -> int:
    """Requests found in a pool of so many slots under an eviction policy.

    What a step asks for takes a slot at once; when there are too many, what is worth least goes, be it of the step
    itself once it is computed.
    """
    held: set[Key] = set()
    found = 0
    for step in trace:
        found += len(held.intersection(step))
        layer = step[0][0]
        policy.used(layer, [expert for _, expert in step])
        wanted = held.union(step)
        held = set(sorted(wanted, key=lambda key: (policy.worth(key, layer), key), reverse=True)[:slots])
    return found


def belady_hits(trace: Trace, slots: int) -> int:
    """Requests found in a cache that knows the future: no cache of this size finds more.

    It drops what is needed again furthest ahead, and may choose not to keep what it has just read (L. A. Belady,
    "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5, 1966).
    """
    uses: defaultdict[Key, list[int]] = defaultdict(list)
    for time, step in enumerate(trace):
        for key in step:
            uses[key].append(time)

    def next_use(key: Key, time: int) -> float:
        position = bisect_right(uses[key], time)
        return uses[key][position] if position < len(uses[key]) else float("inf")

    held: set[Key] = set()
    hits = 0
    for time, step in enumerate(trace):
        hits += len(held.intersection(step))
        wanted = held.union(step)
        held = set(sorted(wanted, key=lambda key: (next_use(key, time), key))[:slots])
    return hits


def requests(trace: Trace) -> int:
    return sum(len(step) for step in trace)
