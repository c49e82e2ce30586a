"""The pool: the records that it reads and keeps, and results that depend on neither."""

from __future__ import annotations

from dataclasses import replace
from threading import Event, Timer

import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_pool, make_store

from qmix.disk.direct import DirectFile
from qmix.errors import Cancelled, StoreError
from qmix.pool.eviction import LeastRecentlyUsed, UsesPerTime
from qmix.pool.experts import ExpertPool
from qmix.store.profile import Profile


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Make a checkpoint of two layers of four experts."""
    return make_checkpoint(tmp_path_factory.mktemp("pool") / "checkpoint")


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory):
    return make_store(checkpoint, tmp_path_factory.mktemp("pool") / "store")


@pytest.fixture(scope="module")
def mixed(checkpoint, tmp_path_factory):
    """Make a store: layer 0 in nf4, its expert 3 in half precision; layer 1 in half precision, its expert 0 in fp4."""
    return make_store(checkpoint, tmp_path_factory.mktemp("mixed") / "store", "nf4,0.3=half,1.*=half,1.0=fp4")


def ask(pool, layer, *experts):
    """Use these experts, and return them in the pool's order."""
    return [expert for expert, _ in pool.get(layer, experts)]


def settled(pool):
    """Wait for prefetches under way, and make them resident."""
    for _, read in pool._ahead.values():
        read.done.exception()
    pool._collect()


def kept(pool):
    """Return the number of slots that are free, in use, or being written to."""
    free = sum(map(pool._slots.free, pool.slots))
    return len(pool._resident) + free + len(pool._ahead) + len(pool._ending)


def test_the_expert_that_the_policy_values_least_makes_room(store):
    pool = make_pool(store, 2, LeastRecentlyUsed())
    ask(pool, 0, 0)
    ask(pool, 0, 1)
    ask(pool, 0, 0)  # 1 is now the older one
    ask(pool, 0, 2)
    assert set(pool._resident) == {(0, 0), (0, 2)}
    assert (pool.counters.hits, pool.counters.misses) == (1, 3)
    assert pool.counters.bytes_read == 3 * store.layout.record(0, 0).nbytes
    pool.close()


def test_experts_in_memory_come_first(store):
    pool = make_pool(store, 4)
    ask(pool, 1, 3)
    assert ask(pool, 1, 0, 3, 2) == [3, 0, 2]
    pool.close()


def test_one_slot_is_enough(store):
    pool = make_pool(store, 1)
    assert ask(pool, 0, 0, 1, 2, 3) == [0, 1, 2, 3]
    assert ask(pool, 0, 3, 0) == [3, 0]
    pool.close()


def test_filling_reads_everything_once_and_then_nothing(store):
    pool = make_pool(store, 8)
    pool.fill()
    assert (pool.counters.hits, pool.counters.misses) == (0, 0)
    read = pool.counters.bytes_read
    assert read == sum(store.layout.expert_bytes.values())
    for layer in range(2):
        ask(pool, layer, 0, 1, 2, 3)
    assert pool.counters.bytes_read == read
    assert pool.counters.hit_rate == 1.0
    pool.close()


@settings(max_examples=25, deadline=None)
@given(
    slots=st.integers(1, 8),
    requests=st.lists(
        st.tuples(st.integers(0, 1), st.sets(st.integers(0, 3), min_size=1), st.sets(st.integers(0, 3))), max_size=12
    ),
)
def test_every_expert_asked_for_comes_once_with_its_own_weights(store, slots, requests):
    """The pool's contents and the guesses for the other layer do not affect the result."""
    full, pool = make_pool(store, 8), make_pool(store, slots)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    for layer, experts, guessed in requests:
        coming = [(1 - layer, expert) for expert in sorted(guessed)]
        want = {e: expert(x, torch.nn.functional.silu) for e, expert in full.get(layer, sorted(experts))}
        got = {e: expert(x, torch.nn.functional.silu) for e, expert in pool.get(layer, sorted(experts), coming)}
        assert got.keys() == want.keys() == experts
        assert all(torch.equal(got[e], want[e]) for e in experts)
        assert kept(pool) == slots
    full.close()
    pool.close()


@settings(max_examples=25, deadline=None)
@given(
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    requests=st.lists(
        st.tuples(st.integers(0, 1), st.sets(st.integers(0, 3), min_size=1), st.sets(st.integers(0, 3))), max_size=12
    ),
)
def test_records_of_several_sizes_come_once_with_their_own_weights(mixed, counts, requests):
    slots = dict(zip(mixed.layout.record_counts, counts, strict=True))
    full, pool = make_pool(mixed, 4), ExpertPool(mixed, slots)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    for layer, experts, guessed in requests:
        coming = [(1 - layer, expert) for expert in sorted(guessed)]
        want = {e: expert(x, torch.nn.functional.silu) for e, expert in full.get(layer, sorted(experts))}
        got = {e: expert(x, torch.nn.functional.silu) for e, expert in pool.get(layer, sorted(experts), coming)}
        assert got.keys() == want.keys() == experts
        assert all(torch.equal(got[e], want[e]) for e in experts)
        assert kept(pool) == sum(counts)
        for key, slot in pool._resident.items():
            assert pool._slots.size(slot) == mixed.layout.record(*key).nbytes
    full.close()
    pool.close()


def test_a_pool_takes_the_bytes_of_its_slots_and_no_more(mixed):
    small, large = mixed.layout.record_counts
    pool = ExpertPool(mixed, {small: 3, large: 2})
    assert pool.memory.nbytes == 3 * small + 2 * large
    pool.close()


def test_a_record_takes_the_slot_of_one_of_its_size(mixed):
    small, large = mixed.layout.record_counts
    pool = ExpertPool(mixed, {small: 2, large: 1}, LeastRecentlyUsed())
    ask(pool, 0, 0, 1, 3)  # 3 is a large one
    ask(pool, 1, 1)  # and so is this, used last of all
    assert set(pool._resident) == {(0, 0), (0, 1), (1, 1)}
    ask(pool, 1, 0)
    assert set(pool._resident) == {(0, 1), (1, 0), (1, 1)}
    pool.close()


def test_records_that_wait_for_a_slot_do_not_hold_up_those_of_another_size(mixed):
    small, large = mixed.layout.record_counts
    pool = ExpertPool(mixed, {small: 1, large: 1})
    request = pool.groups(1, [1, 2, 0])
    assert next(request)[0][0] == 1
    begun = {key for key, _, _ in request.gi_frame.f_locals["reading"]}
    assert begun == {(1, 0)}  # 2 waits for the slot that 1 computes in
    assert [expert for group in request for expert, _ in group] == [0, 2]
    pool.close()


def test_looking_ahead_leaves_most_slots_of_each_size_to_what_is_asked_for(mixed):
    small, large = mixed.layout.record_counts
    pool = ExpertPool(mixed, {small: 4, large: 3})
    pool.prefetch(-1, [(0, 3), (0, 0), (0, 1)])
    settled(pool)
    assert set(pool._resident) == {(0, 0)}
    pool.close()


def test_a_pool_holds_all_when_every_size_has_its_slots(mixed):
    small, large = mixed.layout.record_counts  # four of each
    for slots, elsewhere, holds in (
        ({small: 4, large: 4}, (), True),
        ({small: 8, large: 3}, (), False),
        ({small: 4, large: 3}, ((0, 3),), True),
        ({small: 1, large: 4}, ((0, 0), (0, 1), (0, 2)), True),
        ({small: 1, large: 4}, ((0, 0), (0, 1), (0, 3)), False),
    ):
        pool = ExpertPool(mixed, slots, elsewhere=frozenset(elsewhere))
        assert pool.holds_all == holds
        pool.close()


def test_filling_takes_every_slot_first_layer_first_or_by_expected_use(mixed):
    small, large = mixed.layout.record_counts
    use = ((0.1, 0.5, 0.6, 0.8), (0.9, 0.3, 0.7, 0.1))
    for expected, held in ((None, {(0, 0), (0, 1), (0, 3)}), (use, {(1, 0), (0, 2), (0, 3)})):
        store = replace(mixed, profile=expected and Profile("mixed", None, expected))
        pool = ExpertPool(store, {small: 2, large: 1})
        pool.fill()
        assert set(pool._resident) == held
        pool.close()
    pool = ExpertPool(mixed, {small: 2, large: 1})
    ask(pool, 1, 2)
    pool.fill()  # what is in memory stays
    assert set(pool._resident) == {(0, 0), (0, 1), (1, 2)}
    pool.close()


def test_what_is_expected_to_be_used_stays_before_there_was_any_use(store):
    profile = Profile("small", None, ((0.5,) * 4, (0.1, 0.9, 0.8, 0.2)))
    pool = make_pool(replace(store, profile=profile), 3)
    pool.fill()
    assert set(pool._resident) == {(1, 1), (1, 2), (0, 0)}
    pool.prefetch(-1, [])
    ask(pool, 0, 3)  # layer 0 has just passed
    assert set(pool._resident) == {(1, 1), (1, 2), (0, 3)}
    pool.close()


def test_a_profile_says_which_policy_decides(store):
    profile = Profile("small", None, ((0.5,) * 4,) * 2, policy="lru")
    for advised, expected in ((profile, LeastRecentlyUsed), (replace(profile, policy=None), UsesPerTime)):
        pool = make_pool(replace(store, profile=advised), 3)
        assert type(pool.policy) is expected
        pool.close()


def test_a_request_left_in_the_middle_loses_no_slot(store):
    pool = make_pool(store, 3)
    request = pool.get(0, [0, 1, 2])
    next(request)
    request.close()
    assert kept(pool) == 3
    assert ask(pool, 1, 0, 1, 2) == [0, 1, 2]
    pool.close()


def test_a_flipped_bit_is_found_when_the_record_is_read(store, tmp_path):
    damaged = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    file = damaged.path(damaged.layout.layer(1))
    content = bytearray(file.read_bytes())
    content[damaged.layout.record_offset(1, 2) + 100] ^= 1
    file.write_bytes(content)
    pool = make_pool(damaged, 4)
    assert ask(pool, 1, 1) == [1]
    with pytest.raises(
        StoreError, match=r"experts-00001.safetensors: the record of expert 2 \(bytes \d+ to \d+\) is damaged"
    ):
        ask(pool, 1, 2)
    assert kept(pool) == 4
    assert ask(pool, 1, 3) == [3]
    pool.close()


def test_what_is_coming_is_read_ahead_and_found_there(store):
    pool = make_pool(store, 8)
    list(pool.get(0, [0], coming=[(1, 1), (1, 2)]))
    settled(pool)
    assert set(pool._resident) == {(0, 0), (1, 1), (1, 2)}
    assert ask(pool, 1, 1, 3) == [1, 3]
    counters = pool.counters
    assert (counters.hits, counters.misses, counters.ahead, counters.hidden, counters.unused) == (0, 3, 1, 1, 0)
    assert ask(pool, 1, 1) == [1]
    assert counters.hits == 1  # by now it is in memory from earlier use
    pool.close()


def test_a_read_ahead_that_is_still_under_way_is_waited_for(store, monkeypatch):
    gate, read_into = Event(), DirectFile.read_into

    def late(*arguments):
        gate.wait()
        read_into(*arguments)

    monkeypatch.setattr(DirectFile, "read_into", late)
    pool = make_pool(store, 8)
    pool.prefetch(-1, [(0, 1)])
    Timer(0.1, gate.set).start()
    assert ask(pool, 0, 1) == [1]
    assert (pool.counters.misses, pool.counters.ahead, pool.counters.hidden) == (1, 1, 0)
    assert pool.counters.bytes_read == store.layout.record(0, 0).nbytes
    pool.close()


def test_a_wrong_guess_costs_its_read_but_no_slot(store):
    pool = make_pool(store, 4)
    pool.prefetch(-1, [(0, 1)])
    settled(pool)
    assert ask(pool, 0, 0, 2, 3) == [0, 2, 3]
    assert ask(pool, 1, 0, 1, 2, 3) == [0, 1, 2, 3]
    assert pool.counters.unused == 1
    assert kept(pool) == 4
    pool.close()


def test_looking_ahead_leaves_most_slots_to_what_is_asked_for(store):
    pool = make_pool(store, 4)
    pool.prefetch(-1, [(0, 0), (0, 1), (0, 2)])
    assert len(pool._ahead) <= 1
    assert ask(pool, 1, 0, 1, 2, 3) == [0, 1, 2, 3]
    pool.close()


def test_what_is_coming_is_not_pushed_out_for_what_is_asked_for(store):
    pool = make_pool(store, 4)
    ask(pool, 1, 0)
    ask(pool, 0, 0, 1, 2)
    list(pool.get(0, [3], coming=[(1, 0)]))
    assert (1, 0) in pool._resident
    pool.close()


def test_a_damaged_record_read_ahead_is_reported_when_it_is_asked_for(store, tmp_path):
    damaged = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    file = damaged.path(damaged.layout.layer(1))
    content = bytearray(file.read_bytes())
    content[damaged.layout.record_offset(1, 2) + 100] ^= 1
    file.write_bytes(content)
    pool = make_pool(damaged, 4)
    pool.prefetch(0, [(1, 2)])
    settled(pool)
    assert ask(pool, 1, 3) == [3]
    with pytest.raises(StoreError, match=r"the record of expert 2 \(bytes \d+ to \d+\) is damaged"):
        ask(pool, 1, 2)
    assert kept(pool) == 4
    pool.close()


def test_every_record_is_read_at_most_once_for_one_pass_over_all(store):
    """Request all experts of each layer and announce the next layer's, as a prefill chunk does."""
    for slots in (2, 4, 6):
        pool = make_pool(store, slots)
        for layer in range(2):
            assert len(list(pool.get(layer, range(4), [(1, e) for e in range(4)] if layer == 0 else []))) == 4
        assert pool.counters.bytes_read == 8 * store.layout.record(0, 0).nbytes
        pool.close()


def test_a_cancelled_pool_refuses_the_next_request(store):
    pool = make_pool(store, 2)
    pool.cancelled = True
    with pytest.raises(Cancelled):
        ask(pool, 0, 0)
    pool.close()


def test_slots_start_on_pages(store):
    pool = make_pool(store, 3)
    assert all(pool._slots.bytes(slot).data_ptr() % 4096 == 0 for slot in range(3))
    pool.close()


def test_torchs_product_is_chosen_by_precision_and_never_in_an_invariant_pool(mixed):
    sizes = {mixed.layout.record(*key).nbytes for key in mixed.layout.experts}
    for invariant, wanted in ((False, 64), (True, None)):
        pool = ExpertPool(mixed, dict.fromkeys(sizes, 1), invariant=invariant, widened_from={"nf4": 64})
        (_, expert), *_ = pool.get(0, [0])
        assert [matrix.widened_from for matrix in (expert.gate, expert.up, expert.down)] == [wanted] * 3
        (_, half), *_ = pool.get(0, [3])
        assert half.gate.widened_from is None
        pool.close()
