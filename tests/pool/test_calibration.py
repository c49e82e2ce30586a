"""Recording and replaying routing."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import replay_reference as reference
from checkpoints import TINY_CONFIG, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from stores import make_pool, make_store

from qmix.geometry import Geometry
from qmix.pool.eviction import DEFAULT_POLICY, POLICIES, LeastRecentlyUsed
from qmix.pool.replay import Curve, Replay, belady_hits, replay, requests
from qmix.pool.trace import as_trace, recorded


def steps(text: str) -> np.ndarray:
    """Return a trace: '01 2.' is a step with experts 0 and 1, then one with expert 2 alone."""
    return np.array([[-1 if letter == "." else int(letter) for letter in step] for step in text.split()])


def hits(trace, policy, slots, layers=1, experts=3):
    return replay(trace, layers, experts, [slots]).curve(policy).hits[0]


def test_by_hand():
    trace = steps("0 1 2 0 1 2")
    # two slots, going round three: the least recently used is always the one that comes next
    assert hits(trace, "lru", 2) == 0
    # knowing that, keep 0 and 1 while 2 passes through, then whatever; 0 and 1 for good do as well
    assert hits(trace, "belady", 2) == hits(trace, "static", 2) == belady_hits(trace, 1, 3, 2) == 2
    assert hits(trace, "lru", 3) == hits(trace, "belady", 3) == 3


def test_a_steps_own_experts_do_not_push_each_other_out():
    assert hits(steps("01 12 01"), "lru", 2) == 2


def test_what_stays_for_good_may_be_chosen_by_another_trace():
    trace = steps("0 1 1 2 2 2")
    assert replay(trace, 1, 3, [1]).curve("static").hits == (2,)
    assert replay(trace, 1, 3, [1, 2], counts=np.array([[9, 8, 7]])).curve("static").hits == (0, 1)


def test_a_step_is_the_next_layers():
    # layers 0, 1, 0, 1, 0: expert 0 of layer 1 is another record than that of layer 0
    assert hits(steps("0 0 0 1 0"), "lru", 3, layers=2) == 2


@st.composite
def models(draw):
    """Draw layers, experts, top k, and a trace with steps of one token, of many, and of none."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    top_k = draw(st.integers(1, experts))
    few = st.permutations(range(experts)).map(lambda order: order[:top_k])
    many = st.sets(st.integers(0, experts - 1)).map(list)
    rows = draw(st.lists(st.one_of(few, many), max_size=40))
    trace = np.full((len(rows), experts), -1)
    for number, row in enumerate(rows):
        trace[number, : len(row)] = row
    return layers, experts, top_k, trace


@given(models())
def test_every_policy_and_size_is_as_the_reference_has_it(model):
    layers, experts, top_k, trace = model
    sizes, listed = range(1, layers * experts + 1), reference.steps_of(trace, layers)
    config = {"num_hidden_layers": layers, "num_local_experts": experts, "num_experts_per_tok": top_k}
    geometry = Geometry.from_config(TINY_CONFIG | config)
    counts = [[sum((layer, e) in step for step in listed) for e in range(experts)] for layer in range(layers)]
    expected = {
        name: tuple(reference.policy_hits(listed, size, make(geometry, None, 0.0)) for size in sizes)
        for name, make in POLICIES.items()
    }
    expected["static"] = tuple(reference.static_hits(listed, size, counts) for size in sizes)
    expected["belady"] = tuple(reference.belady_hits(listed, size) for size in sizes)
    found = replay(trace, layers, experts, sizes, top_k=top_k)
    assert {curve.policy: curve.hits for curve in found.curves} == expected
    assert (found.requests, found.records) == (requests(trace), len(sizes))
    assert all(mine <= best for hits in expected.values() for mine, best in zip(hits, expected["belady"], strict=True))


def test_a_long_trace_is_as_the_reference_has_it():
    """The trace is long enough that early uses fade to nothing."""
    rng = np.random.default_rng(0)
    likely = rng.normal(size=(2, 6))[np.arange(16_000) % 2]
    likely[100:15_900, 5] = -np.inf
    trace = np.argsort(-(likely + rng.gumbel(size=(16_000, 6))), axis=1)[:, :2]
    listed = reference.steps_of(trace, 2)
    geometry = Geometry.from_config(TINY_CONFIG | {"num_hidden_layers": 2, "num_local_experts": 6})
    found = replay(trace, 2, 6, [5])
    assert [found.curve(name).hits[0] for name in POLICIES] == [
        reference.policy_hits(listed, 5, make(geometry, None, 0.0)) for make in POLICIES.values()
    ]


@given(models(), st.integers(1, 4), st.data())
def test_belady_begins_with_the_best_of_what_is_in_memory(model, slots, data):
    layers, experts, _, trace = model
    start = data.draw(st.lists(st.integers(0, layers * experts - 1), unique=True))
    keys = [divmod(record, experts) for record in start]
    expected = reference.belady_hits(reference.steps_of(trace, layers), slots, keys)
    assert belady_hits(trace, layers, experts, slots, start) == expected


@given(st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=2).map(sorted), max_size=5))
def test_belady_is_the_best_of_all_choices(rows):
    """Compare with every possible content after each step, for two slots."""
    best = {frozenset(): 0}
    for row in rows:
        following: dict[frozenset, int] = {}
        for held, before in best.items():
            found = before + len(held.intersection(row))
            for pair in product(held.union(row), repeat=2):
                kept = frozenset(pair)
                following[kept] = max(following.get(kept, 0), found)
        best = following
    trace = as_trace([[(0, expert) for expert in row] for row in rows], 1)
    assert belady_hits(trace, 1, 5, 2) == max(best.values(), default=0)


FOUND = Replay(
    100,
    8,
    (
        Curve("lru", (2, 4, 8), (10, 60, 90)),
        Curve("lfu", (2, 4, 8), (20, 40, 90)),
        Curve("uses-per-time", (2, 4, 8), (20, 45, 90)),
        Curve("static", (2, 4, 8), (30, 70, 90)),
        Curve("belady", (2, 4, 8), (40, 70, 90)),
    ),
)


def test_the_best_policy_is_one_that_the_engine_has():
    assert [FOUND.best(slots) for slots in (2, 4)] == ["uses-per-time", "lru"]
    assert FOUND.recommended() == "lru"
    assert FOUND.best(8) == DEFAULT_POLICY  # all equal


def test_between_two_sizes_the_rate_is_on_the_line():
    rates = [FOUND.hit_rate("lru", slots) for slots in (1, 2, 3, 4, 8)]
    assert rates == pytest.approx([0.05, 0.1, 0.35, 0.6, 0.9])


def test_a_replay_as_json_names_each_curve():
    content = json.loads(json.dumps(FOUND.to_json()))
    assert (content["requests"], content["records"]) == (FOUND.requests, FOUND.records)
    assert [curve["policy"] for curve in content["curves"]] == [curve.policy for curve in FOUND.curves]
    assert [tuple(curve["hits"]) for curve in content["curves"]] == [curve.hits for curve in FOUND.curves]


def test_sizes_are_twelve_up_to_all_records_and_begin_with_what_a_token_asks_for():
    found = replay(steps("01 12"), 2, 24)
    assert {curve.slots for curve in found.curves} == {(2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48)}


@pytest.mark.parametrize(
    ("trace", "slots", "message"),
    [
        (steps("03"), [1], r"experts from -1 to 2"),
        (np.array([[-2]]), [1], r"experts from -1 to 2"),
        (np.array([0, 1]), [1], r"\[steps, k\]"),
        (steps("01 22"), [1], "an expert twice"),
        (steps("01"), [0, 2], "from 1 to 3 slots"),
        (steps("01"), [4], "from 1 to 3 slots"),
        (steps("01"), [], "from 1 to 3 slots"),
    ],
)
def test_what_belongs_to_no_such_model_is_refused(trace, slots, message):
    with pytest.raises(ValueError, match=message):
        replay(trace, 1, 3, slots)


def test_recorded_steps_become_a_trace_that_tells_layers_by_place():
    # three layers; nothing is asked of layer 1, then of 0 and 2
    found = as_trace([[(0, 3), (0, 1)], [(2, 4)], [(1, 5)]], 3)
    assert found.tolist() == [[3, 1], [-1, -1], [4, -1], [-1, -1], [5, -1], [-1, -1]]
    assert as_trace([], 3).shape == (0, 0)


@pytest.mark.parametrize("slots", [2, 3, 8])
def test_replaying_a_recorded_run_counts_what_the_pool_counted(tmp_path, slots):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    pool = make_pool(store, slots, LeastRecentlyUsed())
    with recorded(pool) as asked:
        for layer, experts in [(0, [0, 1]), (1, [2, 3]), (0, [1, 2]), (1, [2, 0]), (0, [0, 3]), (1, [2, 3])]:
            for _ in pool.get(layer, experts):
                pass
    trace = as_trace(asked, 2)
    assert (hits(trace, "lru", slots, 2, 4), requests(trace)) == (pool.counters.hits, 12)
    pool.close()


def test_knowing_the_future_compiles_nothing():
    """A benchmark counts with it while a model takes all the memory that it may."""
    script = (
        "import sys, numpy; from qmix.pool.replay import belady_hits;"
        "assert belady_hits(numpy.array([[0], [0]]), 1, 2, 1) == 1; sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
