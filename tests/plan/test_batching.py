"""The number of sequences that are continued together."""

from __future__ import annotations

import pytest
from checkpoints import TINY_CONFIG

from qmix.errors import DoesNotFitError
from qmix.geometry import Geometry
from qmix.machine.rates import Machine
from qmix.plan import Plan, make_plan
from qmix.plan.batching import choose_plan, context_of, plan_server, token_cost
from qmix.plan.memory import MAX_BATCH
from qmix.store.layout import StoreLayout, parse_precisions

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000}
GEOMETRY = Geometry.from_config(TINY_CONFIG | SIZES | HEADS | {"max_position_embeddings": 32768})  # 8x7B's
LAYOUT = StoreLayout(GEOMETRY, parse_precisions("nf4", GEOMETRY), "bf16")
GIB = 2**30


def chosen(ram: int, needs: list[int]) -> Plan:
    return choose_plan(GEOMETRY, needs, lambda batch, context: make_plan(LAYOUT, ram, context, GIB // 2, batch=batch))


def test_the_longest_lines_fit_together():
    assert context_of([10, 40, 20, 30], 2) == 35
    assert context_of([10, 40, 20, 30], 4) == 25


def test_where_everything_fits_all_lines_go_together():
    plan = chosen(64 * GIB, [200] * 100)
    assert (plan.batch, plan.slots) == (100, plan.num_records)
    assert chosen(64 * GIB, [200] * 3000).batch == MAX_BATCH


def test_short_lines_from_disk_go_together_and_take_few_slots():
    one, many = chosen(12 * GIB, [100]), chosen(12 * GIB, [100] * 1000)
    assert (one.batch, many.batch) == (1, MAX_BATCH)
    assert many.slots > 0.5 * one.slots


def test_long_lines_stop_where_their_cache_would_push_out_experts_that_all_fit():
    """8x7B's cache is 131 kB a token: four more lines of 4000 tokens take the slots of 22 of 256 experts, and what is
    then read from disk costs more than four more lines bring."""
    needs, tight = [4000] * 100, make_plan(LAYOUT, 2**40, 4000, GIB // 2, batch=8)
    plan = chosen(int(tight.total * 1.01) + GIB // 32, needs)
    assert (plan.batch, plan.slots) == (8, plan.num_records)
    assert chosen(plan.ram + 8 * GIB, needs).batch > 16


def test_from_disk_more_sequences_are_worth_nearly_every_slot():
    plan = chosen(12 * GIB, [16000] * 100)
    assert (plan.batch, plan.slots) == (4, 5)
    others = [make_plan(LAYOUT, 12 * GIB, 16000, GIB // 2, batch=batch) for batch in (1, 2, 3)]
    assert all(token_cost(plan, GEOMETRY) < token_cost(other, GEOMETRY) for other in others)


def test_a_tokens_cost_by_hand():
    """All in memory: dense and every expert that 1, and 2, tokens are routed to, 2 of 8; then half of them on disk."""
    plan = chosen(64 * GIB, [100])
    (record,) = LAYOUT.record_counts
    product = 0.2 * 32 * 2 * record
    assert token_cost(plan, GEOMETRY) == pytest.approx(plan.dense + 256 * record / 4 + product)
    two = chosen(64 * GIB, [100, 100])
    assert token_cost(two, GEOMETRY) == pytest.approx((plan.dense + 256 * record * (1 - 9 / 16)) / 2 + product)
    assert token_cost(plan.with_slots(128), GEOMETRY) == pytest.approx(plan.dense + 256 * record / 4 * 6 + product)


def test_a_line_that_does_not_fit_by_itself_is_refused_with_the_budget_that_works():
    with pytest.raises(DoesNotFitError) as caught:
        chosen(5 * GIB, [32000, 10, 10])
    assert chosen(caught.value.smallest, [32000, 10, 10]).batch >= 1


@pytest.fixture
def known_python(monkeypatch):
    """Python's own memory is not measured."""
    monkeypatch.setattr("qmix.plan.batching.interpreter_memory", lambda kernels: GIB // 2)


def served(gpu: int, tokens: int | None = None, batch: int = 32, context: int = 4096) -> Plan:
    machine = Machine(ram=64 * GIB, gpus=(gpu,), disk=None)
    return plan_server(LAYOUT, context, 64 * GIB, batch, tokens, None, machine)


@pytest.mark.usefixtures("known_python")
def test_a_server_on_a_gpu_has_a_whole_context_for_each_request():
    plan = served(24 * GIB)
    assert (plan.batch, plan.context, set(plan.layer_devices)) == (4, 4096, {"gpu:0"})
    assert plan.devices[0].kv_cache == 4 * 4096 * GEOMETRY.kv_bytes_per_token
    assert served(24 * GIB, tokens=10 * 4096).batch == 10
    assert served(24 * GIB, tokens=2**20, context=128).batch == 32  # a step has no more tokens
    assert served(24 * GIB, batch=3).batch == 3


@pytest.mark.usefixtures("known_python")
def test_a_server_on_a_small_gpu_has_fewer_requests_rather_than_layers_on_the_cpu():
    plan = served(6 * GIB)
    assert plan.batch < 4
    assert set(plan.layer_devices) == {"gpu:0"}
