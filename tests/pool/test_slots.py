"""Slots by the size of records: how a pool's memory is shared out, by hand and as properties of any."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.geometry import Geometry
from qmix.models.published import PUBLISHED
from qmix.plan import make_plan
from qmix.plan.slots import least_slots, share_slots
from qmix.store.expert_frequency import by_frequency, uniform_frequency
from qmix.store.layout import StoreLayout, parse_precisions

MIB, GIB = 2**20, 2**30
SMALL = Geometry(64, 128, 2, 4, 2, 16, 4, 2, 96, 256)
NF4, HALF = 16384, 49152  # bytes of one of its experts: 24576 weights at 4.25 and 16 bits, in whole pages


def layout(geometry: Geometry, precision: str) -> StoreLayout:
    return StoreLayout(geometry, parse_precisions(precision, geometry), "bf16")


@pytest.mark.parametrize(
    ("room", "slots"),
    [
        (0, {10: 1, 25: 1}),  # the least in any case
        (35, {10: 1, 25: 1}),
        (44, {10: 1, 25: 1}),
        (45, {10: 2, 25: 1}),  # the second of 10; the first of 25 has the slot that there is
        (69, {10: 2, 25: 1}),  # the second of 25 has no room, and nothing passes it
        (70, {10: 2, 25: 2}),
        (80, {10: 3, 25: 2}),
        (1000, {10: 3, 25: 2}),
    ],
)
def test_room_goes_to_the_records_most_wanted(room, slots):
    assert share_slots([10, 10, 25, 25, 10], {10: 1, 25: 1}, room) == slots


def test_records_of_one_size_get_as_many_slots_as_fit():
    assert [share_slots([10] * 8, {10: 2}, room)[10] for room in (0, 29, 30, 79, 80, 1000)] == [2, 2, 3, 7, 8, 8]


@given(
    st.lists(st.sampled_from([3, 5, 11]), max_size=40),
    st.fixed_dictionaries({3: st.integers(0, 2), 5: st.integers(0, 2), 11: st.integers(0, 2)}),
    st.integers(0, 300),
    st.integers(0, 100),
)
def test_room_is_not_exceeded_and_more_never_gives_fewer_of_any_size(wanted, least, room, more):
    def taken(slots):
        return sum(nbytes * count for nbytes, count in slots.items())

    first, second = share_slots(wanted, least, room), share_slots(wanted, least, room + more)
    assert taken(first) <= max(room, taken(least))
    for nbytes, count in first.items():
        assert least[nbytes] <= count <= max(least[nbytes], wanted.count(nbytes))
        assert count <= second[nbytes]


def test_each_size_has_two_slots_or_as_many_as_records():
    assert least_slots(layout(SMALL, "nf4,0.0=half")) == {NF4: 2, HALF: 1}
    assert least_slots(layout(SMALL, "nf4,0.0=fp4,1.*=half")) == {NF4: 2, HALF: 2}  # fp4 takes what nf4 does


def test_equally_used_records_of_each_size_come_in_equal_shares():
    # of six small ones each is a sixth of its kind, of two large ones each is a half
    order = by_frequency(layout(SMALL, "nf4,*.3=half"), uniform_frequency(SMALL))
    small, large = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)], [(0, 3), (1, 3)]
    assert order == [small[0], small[1], large[0], small[2], small[3], small[4], large[1], small[5]]


def test_a_small_pool_by_hand():
    store = layout(SMALL, "nf4,*.3=half")
    whole = make_plan(store, GIB, 100, 300 * MIB)
    assert whole.slots_by_size == {NF4: 6, HALF: 2}
    assert (whole.pool, whole.on_disk, whole.slots) == (6 * NF4 + 2 * HALF, 0, 8)
    fixed = whole.total - whole.pool

    def slots(room):
        ram = 16 * MIB + -(-(fixed + room) * 101 // 100)
        return make_plan(store, ram, 100, 300 * MIB)

    assert slots(2 * NF4 + 2 * HALF).slots_by_size == {NF4: 2, HALF: 2}
    found = slots(4 * NF4 + 2 * HALF)
    assert found.slots_by_size == {NF4: 4, HALF: 2}
    assert (found.on_disk, found.records_on_disk) == (2 * NF4, 2)
    # 0.2 and 1.2 are the last of the small ones
    assert found.placement == (("ram", "ram", "disk", "ram"),) * 2
    assert found.smallest == 16 * MIB + -(-(fixed + 2 * NF4 + 2 * HALF) * 101 // 100)
    assert found.roomy == 16 * MIB + -(-(fixed + whole.pool) * 101 // 100)


def test_the_share_of_each_size_in_a_pool_is_the_same():
    """8x7B with an expert of each layer in int8: slots of one size would hold 70 records in the same memory."""
    store = layout(PUBLISHED["mixtral-8x7b"].geometry, "nf4,*.7=int8")
    assert store.record_counts == {93_585_408: 224, 176_291_840: 32}
    plan = make_plan(store, 16 * GIB, 4096, 500 * MIB)
    assert plan.slots_by_size == {93_585_408: 104, 176_291_840: 15}
    assert plan.slots / plan.num_records == pytest.approx(104 / 224, abs=0.01)
    assert plan.pool // 176_291_840 == 70


def test_known_use_decides_how_many_of_each_size():
    store, room = layout(PUBLISHED["mixtral-8x7b"].geometry, "nf4,*.7=int8"), 16 * GIB
    often = [[0.2] * 7 + [0.6]] * 32
    seldom = [[0.28] * 7 + [0.04]] * 32
    small, large = store.record_counts
    assert make_plan(store, room, 4096, 500 * MIB, use=often).slots_by_size[large] == 32
    found = make_plan(store, room, 4096, 500 * MIB, use=seldom)
    assert found.slots_by_size == {small: 128, large: 2}
    assert Counter(row[7] for row in found.placement) == {"ram": 2, "disk": 30}
