"""The least to read and compute for a benchmark's workloads, computed by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spreads import spread_plan

from qmix.bench.roofline import (
    Bound,
    Cost,
    GpuRates,
    OnGpus,
    Workload,
    bound,
    decode_cost,
    dense_read,
    least_read_bytes,
    mean_position,
    prefill_cost,
    prefill_flops,
    workloads,
)
from qmix.geometry import Geometry
from qmix.plan import make_plan
from qmix.store.layout import StoreLayout, parse_precisions

GEOMETRY = Geometry(
    hidden_size=4,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    num_experts=4,
    experts_per_token=2,
    vocab_size=10,
    max_position=64,
)
RECORD = 4096  # 3 * 4 * 8 weights in half precision, to the next multiple of 4096
DENSE = 2 * (2 * 4 + 16 + 8 + 8 + 16 + 4 * 4) * 2 + (4 + 10 * 4) * 2  # norms, q, k, v, o, gate; last norm and head
ROW = 4 * 2  # of the embedding table
KV = 2 * 2 * 2 * 2  # keys and values, layers, head_dim, bytes
# two tokens through two layers
ROUTING = np.array([[0, 1], [0, 1], [0, 2], [0, 1]])


def layout_of(geometry: Geometry, precision: str = "half") -> StoreLayout:
    return StoreLayout(geometry, parse_precisions(precision, geometry), "bf16")


def test_workloads_are_named_as_llama_bench_names_them():
    found = workloads(["512,1024", "512"], ["128"])
    assert [(workload.name, workload.context) for workload in found] == [
        ("pp512", 513),
        ("pp1024", 1025),
        ("tg128", 16 + 1 + 128),
    ]
    assert workloads(["0"], ["8"]) == [Workload(16, 8)]


def test_the_longest_of_the_three_times_is_the_bound():
    cost = Cost(disk_bytes=4e9, memory_bytes=30e9, flops=1e12)
    assert bound(cost, memory_read=30e9, disk_read=2e9, matmul=1e12) == Bound(2.0, "disk")
    assert bound(cost, memory_read=10e9, disk_read=2e9, matmul=1e12) == Bound(3.0, "memory")
    assert bound(cost, memory_read=30e9, disk_read=8e9, matmul=1e11) == Bound(10.0, "compute")
    assert bound(Cost(0, 30e9, 0), memory_read=30e9, disk_read=None, matmul=1e12) == Bound(1.0, "memory")


def test_dense_weights_are_read_whole_but_for_the_embedding_table():
    assert dense_read(layout_of(GEOMETRY)) == DENSE + ROW
    assert dense_read(layout_of(replace(GEOMETRY, tie_embeddings=True))) == DENSE  # the table is the head


@pytest.mark.parametrize(("window", "mean"), [(None, 18.5), (100, 18.5), (18, 17.75), (3, 3)])
def test_a_decode_step_reads_the_cache_up_to_its_own_position(window, mean):
    assert mean_position(16, 4, window) == mean  # 17, 18, 19 and 20 of them


def test_flops_of_a_prompt():
    # weights of a layer: q 16, k 8, v 8, o 16, gate 16, two experts of 3 * 32; seen: 1, 2 and 3 positions
    expected = 2 * (3 * 2 * (64 + 192) + 2 * 2 * 4 * (1 + 2 + 3) + 10 * 4)
    assert prefill_flops(GEOMETRY, 3) == expected
    assert prefill_flops(replace(GEOMETRY, sliding_window=2), 3) == expected - 2 * 2 * 2 * 4  # one position fewer


def test_reads_are_those_of_a_pool_that_knew_the_future():
    layout = layout_of(GEOMETRY)
    # three slots: begin with 0.0, 0.1 and 1.0; read 1.1 in place of 0.1, then 0.2
    assert least_read_bytes(layout, ROUTING, {RECORD: 3}) == 2 * RECORD
    assert least_read_bytes(layout, ROUTING, {RECORD: 8}) == 0
    assert least_read_bytes(layout, ROUTING, {RECORD: 8}, ()) == 5 * RECORD
    assert least_read_bytes(layout, ROUTING, {RECORD: 8}, (0, 6)) == 4 * RECORD  # 0.0 was there, and 1.2 of no use


@given(st.lists(st.sets(st.integers(0, 3), min_size=1, max_size=2), max_size=8), st.sets(st.integers(0, 3), max_size=2))
def test_no_start_does_better_than_the_best_one(routing, start):
    one_layer = layout_of(replace(GEOMETRY, num_layers=1))
    trace = np.full((len(routing), 2), -1)
    for row, step in zip(trace, routing, strict=True):
        row[: len(step)] = sorted(step)
    best = least_read_bytes(one_layer, trace, {RECORD: 2})
    found = least_read_bytes(one_layer, trace, {RECORD: 2}, sorted(start))
    assert best <= found <= RECORD * sum(map(len, routing))


def test_cost_of_a_decoded_token():
    found = decode_cost(Workload(1, 2), layout_of(GEOMETRY), ROUTING, {RECORD: 3})
    assert found == Cost(2 * RECORD / 2, 8 * RECORD / 2 + DENSE + ROW + 2.5 * KV, 0.0)
    assert decode_cost(Workload(1, 2), layout_of(GEOMETRY), ROUTING, {RECORD: 8}).disk_bytes == 0


def test_a_gpu_adds_its_memory_its_link_and_its_arithmetic_to_the_bound():
    cost, gpus = Cost(disk_bytes=0, memory_bytes=30e9, flops=1e12, gpu_bytes=80e9), GpuRates(40e9, 20e9, 9e12)
    assert bound(cost, 10e9, None, 1e12, gpus) == Bound(2.0, "GPU memory")
    assert bound(replace(cost, memory_bytes=90e9), 10e9, None, 1e12, gpus) == Bound(3.0, "memory")
    assert bound(replace(cost, flops=5e13), 10e9, None, 1e12, gpus) == Bound(5.0, "compute")


def test_cost_of_a_decoded_token_whose_second_layer_is_on_a_gpu():
    """The host was asked for one of that layer's two experts a token, in the second step only."""
    layout, there = layout_of(GEOMETRY), OnGpus((False, True), (0, RECORD))
    asked = np.array([[0, 1], [-1, -1], [0, 2], [0, -1]])
    found = decode_cost(Workload(1, 2), layout, asked, {RECORD: 8}, there)
    a_layer = DENSE // 2 - (4 + 40)  # without the last norm and the head
    assert found.memory_bytes == 5 * RECORD / 2 + a_layer + ROW + 2.5 * KV / 2
    assert found.gpu_bytes == 3 * RECORD / 2 + a_layer + 2 * (4 + 40) + 2.5 * KV / 2
    whole = decode_cost(Workload(1, 2), layout, ROUTING, {RECORD: 8})
    assert found.memory_bytes + found.gpu_bytes == whole.memory_bytes
    prompt = prefill_cost(Workload(600), layout, asked, {RECORD: 8}, there)
    assert prompt.gpu_bytes == a_layer + 2 * (4 + 40) + RECORD


def test_what_lies_on_gpus_comes_from_the_plan():
    layout = layout_of(replace(GEOMETRY, hidden_size=64, intermediate_size=64), "nf4,1.0=half")
    assert OnGpus.of(make_plan(layout, 2**30, 8, 2**20), layout) is None
    plan = spread_plan(layout, ["cpu", "gpu:0"], {0, 2})
    assert OnGpus.of(plan, layout) == OnGpus((False, True), (0, layout.record(1, 2).nbytes))


def test_cost_of_a_prompt_in_two_chunks():
    found = prefill_cost(Workload(600), layout_of(GEOMETRY), ROUTING, {RECORD: 3})
    assert found == Cost(2 * RECORD, 8 * RECORD + 2 * (DENSE + ROW), prefill_flops(GEOMETRY, 600))


def test_records_of_each_size_have_slots_of_their_own():
    wide = replace(GEOMETRY, hidden_size=64, intermediate_size=64)
    mixed = layout_of(wide, "half,0.*=nf4")
    small, large = (mixed.records[name].nbytes for name in ("nf4", "half"))
    asked = 4 * (small + large)  # by ROUTING, of each layer
    # layer 0 with two slots begins with 0.0 and 0.1, and reads 0.2; layer 1 with one slot reads 1.0 or 1.1 each time
    found = prefill_cost(Workload(2), mixed, ROUTING, {small: 2, large: 1})
    assert found.disk_bytes == small + 2 * large
    assert found.memory_bytes == asked + 2 * dense_read(mixed)
    assert prefill_cost(Workload(2), mixed, ROUTING, {small: 3, large: 2}).disk_bytes == 0
    assert decode_cost(Workload(1, 2), mixed, ROUTING, {small: 1, large: 2}).disk_bytes == small


def test_the_arithmetic_loads_no_torch():
    script = "import sys, qmix.bench.roofline, qmix.bench.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
