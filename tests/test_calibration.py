"""Recording and replaying routing."""

from __future__ import annotations

from itertools import product

import pytest
from checkpoints import TINY_CONFIG, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from stores import make_pool, make_store

from calibration.replay import belady_hits, hits, requests
from calibration.trace import recorded
from qmix.eviction import POLICIES, LeastRecentlyUsed
from qmix.geometry import Geometry


def steps(text: str) -> list[list[tuple[int, int]]]:
    """'01 2' is a step with experts 0 and 1, then one with expert 2, all of layer 0."""
    return [[(0, int(expert)) for expert in step] for step in text.split()]


def lru_hits(trace, slots):
    return hits(trace, slots, LeastRecentlyUsed())


def test_by_hand():
    trace = steps("0 1 2 0 1 2")
    # two slots, going round three: the least recently used is always the one that comes next
    assert lru_hits(trace, 2) == 0
    # knowing that, keep 0 and 1 while 2 passes through, then whatever
    assert belady_hits(trace, 2) == 2
    assert lru_hits(trace, 3) == belady_hits(trace, 3) == 3


def test_a_steps_own_experts_do_not_push_each_other_out():
    assert lru_hits(steps("01 12 01"), 2) == 2


traces = st.lists(
    st.sets(st.integers(0, 4), min_size=1, max_size=2).map(lambda s: [(0, e) for e in sorted(s)]), max_size=9
)


GEOMETRY = Geometry.from_config(TINY_CONFIG | {"num_hidden_layers": 1, "num_local_experts": 5})


@pytest.mark.parametrize("name", POLICIES)
@given(traces, st.integers(2, 5))
def test_belady_bounds_every_policy_and_grows_with_slots(name, trace, slots):
    found = hits(trace, slots, POLICIES[name](GEOMETRY))
    assert found <= belady_hits(trace, slots) <= belady_hits(trace, slots + 1) <= requests(trace)


@given(traces.filter(lambda trace: len(trace) <= 5))
def test_belady_is_the_best_of_all_choices(trace):
    """Against every possible content after each step, for two slots."""
    best = {frozenset(): 0}
    for step in trace:
        following: dict[frozenset, int] = {}
        for held, before in best.items():
            found = before + len(held.intersection(step))
            for pair in product(held.union(step), repeat=2):
                kept = frozenset(pair)
                following[kept] = max(following.get(kept, 0), found)
        best = following
    assert belady_hits(trace, 2) == max(best.values(), default=0)


@pytest.mark.parametrize("slots", [2, 3, 8])
def test_replaying_a_recorded_run_counts_what_the_pool_counted(tmp_path, slots):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    pool = make_pool(store, slots, LeastRecentlyUsed())
    with recorded(pool) as trace:
        for layer, experts in [(0, [0, 1]), (1, [2, 3]), (0, [1, 2]), (1, [2, 0]), (0, [0, 3]), (1, [2, 3])]:
            for _ in pool.get(layer, experts):
                pass
    assert (lru_hits(trace, slots), requests(trace)) == (pool.counters.hits, 12)
    pool.close()
