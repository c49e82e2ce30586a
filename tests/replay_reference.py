"""Replay as one would write it down: every record held is weighed at every step, for one pool size at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence

from qmix.pool.eviction import Eviction, Key

Steps = Sequence[Sequence[Key]]


def steps_of(trace, layers: int) -> list[list[Key]]:
    """The keys of each step that asks for any."""
    rows = (
        [(number % layers, int(expert)) for expert in row if expert >= 0] for number, row in enumerate(trace.tolist())
    )
    return [row for row in rows if row]


def policy_hits(steps: Steps, slots: int, policy: Eviction) -> int:
    held: set[Key] = set()
    found = 0
    for step in steps:
        found += len(held.intersection(step))
        layer = step[0][0]
        policy.used(layer, [expert for _, expert in step])
        wanted = held.union(step)
        held = set(sorted(wanted, key=lambda key: (policy.worth(key, layer), key), reverse=True)[:slots])
    return found


def belady_hits(steps: Steps, slots: int, start: Sequence[Key] = ()) -> int:
    uses: defaultdict[Key, list[int]] = defaultdict(list)
    for time, step in enumerate(steps):
        for key in step:
            uses[key].append(time)

    def next_use(key: Key, time: int) -> float:
        position = bisect_right(uses[key], time)
        return uses[key][position] if position < len(uses[key]) else float("inf")

    held = set(sorted(start, key=lambda key: next_use(key, -1))[:slots])
    found = 0
    for time, step in enumerate(steps):
        found += len(held.intersection(step))
        wanted = held.union(step)
        held = set(sorted(wanted, key=lambda key: (next_use(key, time), key))[:slots])
    return found


def static_hits(steps: Steps, slots: int, counts: Sequence[Sequence[int]]) -> int:
    """Each record that stays is read the first time that it is asked for."""
    keys = [(layer, expert) for layer, row in enumerate(counts) for expert in range(len(row))]
    staying = sorted(keys, key=lambda key: -counts[key[0]][key[1]])[:slots]
    uses = Counter(key for step in steps for key in step)
    return sum(uses[key] - 1 for key in staying if uses[key])
