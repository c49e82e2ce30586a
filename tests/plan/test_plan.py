"""The plan as arithmetic: by hand on a small model, and as properties of any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import DoesNotFitError
from qmix.geometry import Geometry
from qmix.plan import make_plan
from qmix.plan.memory import RESERVE_BYTES, work_bytes
from qmix.store.layout import StoreLayout, parse_precisions

SMALL = Geometry(64, 128, 2, 4, 2, 16, 4, 2, 96, 256)
BIG = Geometry(6144, 16384, 56, 48, 8, 128, 8, 2, 32000, 65536)
MIB, GIB = 2**20, 2**30


def layout(geometry: Geometry, precision: str = "nf4") -> StoreLayout:
    return StoreLayout(geometry, parse_precisions(precision, geometry), "bf16")


def test_a_small_plan_by_hand():
    plan = make_plan(layout(SMALL, "half"), 1 * GIB, 100, 300 * MIB)
    # one expert: three matrices of 128 x 64 in two bytes, a multiple of 4096
    assert plan.slots_by_size == {3 * 128 * 64 * 2: 8} == {49152: 8}
    assert (plan.slots, plan.num_records, plan.pool) == (8, 8, 8 * 49152)
    # 2 (keys, values) x 2 layers x 2 heads x 16 x 2 bytes a token
    assert plan.kv_cache == 100 * 256
    # two embeddings 96 x 64; a layer: q and o 64 x 64, k and v 32 x 64, gate 4 x 64, two norms; the last norm
    weights = 2 * 96 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 4 * 64 + 2 * 64) + 64
    assert weights * 2 <= plan.dense < weights * 2 + 2 * 4096
    assert plan.total == 300 * MIB + plan.dense + plan.kv_cache + plan.work + plan.pool
    assert plan.headroom == GIB - plan.total
    assert plan.on_disk == 0


def test_8x22b_in_24_gib_holds_a_few_experts_of_each_layer():
    plan = make_plan(layout(BIG), 24 * GIB, 4096, 400 * MIB)
    assert plan.num_records == 448
    assert plan.dense == pytest.approx(10.66e9, rel=0.001)
    assert plan.kv_cache == pytest.approx(0.94e9, rel=0.001)
    assert plan.store_bytes == pytest.approx(71.9e9 + 10.66e9, rel=0.002)
    assert 70 < plan.slots < 90
    assert plan.on_disk == pytest.approx(plan.expert_total * (448 - plan.slots) / 448, rel=1e-6)


def test_a_budget_too_small_is_refused_with_one_that_works():
    with pytest.raises(DoesNotFitError, match=r"needs 12\.6 GB .* ram='\d+MB'") as refused:
        make_plan(layout(BIG), 8 * GIB, 4096, 400 * MIB)
    assert make_plan(layout(BIG), refused.value.smallest, 4096, 400 * MIB).slots == 2
    with pytest.raises(DoesNotFitError):
        make_plan(layout(BIG), refused.value.smallest - 1, 4096, 400 * MIB)


def test_eager_attention_is_counted_as_dearer():
    assert work_bytes(BIG, 4096, "eager") > work_bytes(BIG, 4096, "sdpa") + 48 * 512 * 4096 * 8


@given(
    st.integers(1, 64 * GIB),
    st.integers(0, 64 * GIB),
    st.integers(1, 65536),
    st.sampled_from(["nf4", "int8", "half", "nf4,0.*=int8"]),
)
def test_no_budget_is_exceeded_and_more_never_holds_less(ram, more, context, precision):
    store = layout(BIG, precision)
    smallest = make_plan(store, 2**60, context, 400 * MIB).smallest
    if ram < smallest:
        with pytest.raises(DoesNotFitError) as refused:
            make_plan(store, ram, context, 400 * MIB)
        assert refused.value.smallest == smallest
        return
    plan = make_plan(store, ram, context, 400 * MIB)
    assert plan.total + RESERVE_BYTES <= ram
    assert 2 <= plan.slots <= plan.num_records
    assert plan.smallest <= ram
    assert make_plan(store, ram + more, context, 400 * MIB).slots >= plan.slots
    assert plan.to_json()["total"] == plan.total
