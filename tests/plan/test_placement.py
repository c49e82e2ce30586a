"""Layers and experts on GPUs: by hand on a small model, the plans of the published ones, and as properties of any."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmix.errors import DoesNotFitError
from qmix.geometry import Geometry
from qmix.machine.rates import Rates
from qmix.models.published import PUBLISHED
from qmix.plan import make_plan, placement, predict
from qmix.plan.demand import Demand
from qmix.plan.device_memory import CUDA_CONTEXT_BYTES, device_record_bytes
from qmix.plan.placement import JOB, arrange
from qmix.store.expert_frequency import by_frequency, uniform_frequency
from qmix.store.layout import StoreLayout, parse_precisions

MIB, GIB = 2**20, 2**30
PYTHON = 500 * 10**6
SMALL = Geometry(256, 1024, 5, 4, 2, 64, 4, 2, 1000, 4096)
SKEWED = (
    (0.9, 0.6, 0.4, 0.1),
    (0.5, 0.5, 0.5, 0.5),
    (0.2, 0.4, 0.6, 0.8),
    (1, 0.4, 0.3, 0.3),
    (0.7, 0.7, 0.3, 0.3),
)
LARGE = PUBLISHED["mixtral-8x22b"].geometry
PROVED = {  # model, GPUs and RAM in GiB
    "8x22b-1x24-64": ("mixtral-8x22b", (24,), 64),
    "8x22b-2x24-64": ("mixtral-8x22b", (24, 24), 64),
    "8x22b-2x24-32": ("mixtral-8x22b", (24, 24), 32),
    "8x22b-cpu-24": ("mixtral-8x22b", (), 24),
    "8x7b-1x12-32": ("mixtral-8x7b", (12,), 32),
}


def layout(geometry: Geometry, precision: str = "nf4") -> StoreLayout:
    return StoreLayout(geometry, parse_precisions(precision, geometry), "bf16")


def check(plan, store: StoreLayout) -> None:
    """Check what is true of every plan."""
    geometry = store.geometry
    counts = Counter(where for row in plan.placement for where in row)
    assert plan.total <= plan.ram
    assert sum(counts.values()) == geometry.num_records
    assert set(counts) <= {"ram", "disk", *(device.name for device in plan.devices)}
    assert plan.host_records == counts["ram"] + counts["disk"]
    assert (counts["ram"], counts["disk"]) == (plan.host_records - plan.records_on_disk, plan.records_on_disk)
    for each in plan.slot_classes:
        host = [
            where
            for layer, row in enumerate(plan.placement)
            for expert, where in enumerate(row)
            if where in ("ram", "disk") and store.record(layer, expert).nbytes == each.nbytes
        ]
        assert (each.records, each.served) == (store.record_counts[each.nbytes], len(host))
        assert each.least <= each.slots <= max(each.least, each.served)
        assert host.count("ram") == min(each.slots, each.served)
    assert [len(row) for row in plan.placement] == [geometry.num_experts] * geometry.num_layers
    changes = [name for name, after in pairwise((*plan.layer_devices, "end")) if name != after]
    assert len(changes) == len(set(changes))  # whole runs of layers
    for device in plan.devices:
        assert device.total + CUDA_CONTEXT_BYTES <= device.budget
        held = [
            device_record_bytes(geometry, store.precisions[layer][expert], store.dtype)
            for layer, row in enumerate(plan.placement)
            for expert, where in enumerate(row)
            if where == device.name
        ]
        assert device.experts == sum(held)
        assert device.name in plan.layer_devices
    for layer, row in enumerate(plan.placement):  # an expert is on its own layer's device, or on none
        assert set(row) <= {plan.layer_devices[layer], "ram", "disk"}
    dense = sum(info.nbytes for info in store.dense.tensors.values())
    assert dense <= plan.dense + sum(device.dense for device in plan.devices) <= dense + 4096
    cache = plan.kv_cache + sum(device.kv_cache for device in plan.devices)
    assert cache == geometry.kv_bytes_per_token * plan.context * plan.batch
    on_host = sum(
        store.record(layer, expert).nbytes
        for layer, row in enumerate(plan.placement)
        for expert, where in enumerate(row)
        if where in ("ram", "disk")
    )
    on_gpu = sum(
        store.record(layer, expert).nbytes
        for layer, row in enumerate(plan.placement)
        for expert, where in enumerate(row)
        if where.startswith("gpu")
    )
    assert on_host + on_gpu == sum(store.expert_bytes.values())


@pytest.mark.parametrize(("name", "gpus", "ram"), PROVED.values(), ids=list(PROVED))
def test_published_models_on_common_machines(name, gpus, ram, monkeypatch):
    store = layout(PUBLISHED[name].geometry)
    plan = make_plan(store, ram * GIB, 4096, PYTHON, gpus=[size * GIB for size in gpus])
    check(plan, store)
    assert [device.name for device in plan.devices] == [f"gpu:{index}" for index in range(len(gpus))]
    if gpus:
        assert "cpu" not in plan.layer_devices  # all dense weights fit a GPU
        assert plan.dense == plan.kv_cache == 0
    if len(gpus) == 2:  # as many layers on each are no faster
        monkeypatch.setattr(placement, "_cuts", lambda layers, gpus: iter([(0, layers // 2, layers)]))
        even = make_plan(store, ram * GIB, 4096, PYTHON, gpus=[size * GIB for size in gpus])
        assert {even.layer_devices.count(device.name) for device in even.devices} == {len(even.layer_devices) // 2}
        assert job_seconds(plan, store, Rates()) <= job_seconds(even, store, Rates())


def test_448_experts_are_placed_with_each_run_of_layers_worked_out_once(monkeypatch):
    """Cuts share the holdings of the runs that they have in common: a plan takes about a second of the processor."""
    holdings, answers = [], []
    holding, seconds = placement._Holdings._holding, placement.seconds_of
    monkeypatch.setattr(placement._Holdings, "_holding", lambda self, *run: holdings.append(run) or holding(self, *run))
    monkeypatch.setattr(placement, "seconds_of", lambda *load: answers.append(load) or seconds(*load))
    make_plan(layout(LARGE), 32 * GIB, 4096, PYTHON, gpus=(24 * GIB, 24 * GIB))
    layers = LARGE.num_layers
    assert len(holdings) == len(set(holdings)) <= layers * (layers + 1)
    assert len(answers) <= (layers + 1) * (layers + 2)  # a prompt and an answer of each cut


def test_a_plan_is_the_same_every_time():
    store = layout(LARGE, "nf4,0.*=int8")
    first, second = (make_plan(store, 40 * GIB, 4096, PYTHON, gpus=(24 * GIB, 16 * GIB)) for _ in range(2))
    assert first == second


def test_bytes_of_a_small_gpu_by_hand():
    store = layout(SMALL, "half")
    demand = Demand(store, 100, 1, "sdpa", uniform_frequency(SMALL))
    # q, o: 256 x 256; k, v: 128 x 256; gate 4 x 256; two norms
    assert demand.layer_dense == 2 * (2 * 256 * 256 + 2 * 128 * 256 + 4 * 256 + 2 * 256)
    assert demand.embeddings == 2 * 1000 * 256
    assert demand.head == 2 * (1000 * 256 + 256)
    assert demand.layer_kv == 2 * 2 * 64 * 2 * 100
    assert demand.dense_of(0, 5) == 5 * demand.layer_dense + demand.embeddings + demand.head
    assert demand.dense_of(1, 3) == 2 * demand.layer_dense
    assert demand.dense_of(2, 2) == 0


def test_the_most_used_experts_come_first_and_equals_go_round_the_layers():
    store = layout(SMALL)
    assert by_frequency(store, SKEWED)[:5] == [(3, 0), (0, 0), (2, 3), (4, 0), (4, 1)]
    assert by_frequency(store, uniform_frequency(SMALL))[:6] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1)]


def test_the_most_used_experts_lie_on_the_gpu_then_in_memory():
    store = layout(SMALL, "half")
    demand, found = Demand(store, 100, 1, "sdpa", SKEWED), None
    (record,) = store.record_counts
    for gpu in range(CUDA_CONTEXT_BYTES, 2 * GIB, MIB):  # until 8 experts have room
        found = arrange(demand, (gpu,), lambda on_cpu, wanted: {record: 2} if on_cpu == 0 else None, Rates())
        if found and len(found.residents) >= 8:
            break
    assert found
    tiers = [found.placement[layer][expert] for layer, expert in by_frequency(store, SKEWED)]
    resident = len(found.residents)
    assert 8 <= resident <= 9
    assert tiers == ["gpu:0"] * resident + ["ram"] * 2 + ["disk"] * (18 - resident)


def test_layers_that_fit_no_gpu_stay_on_the_cpu():
    store = layout(LARGE)
    plan = make_plan(store, 64 * GIB, 4096, PYTHON, gpus=(8 * GIB,))
    check(plan, store)
    assert 0 < plan.layer_devices.count("cpu") < 56
    assert plan.layer_devices[0] == "cpu"
    assert plan.layer_devices[-1] == "gpu:0"
    assert plan.dense > 0


def test_a_gpu_too_small_for_one_layer_is_left_alone():
    plan = make_plan(layout(LARGE), 64 * GIB, 4096, PYTHON, gpus=(GIB,))
    assert plan.devices == ()
    assert set(plan.layer_devices) == {"cpu"}


def test_more_than_two_gpus_share_layers_by_their_sizes():
    store = layout(LARGE)
    plan = make_plan(store, 64 * GIB, 4096, PYTHON, gpus=(24 * GIB, 24 * GIB, 12 * GIB))
    check(plan, store)
    assert [plan.layer_devices.count(device.name) for device in plan.devices] == [22, 23, 11]


def job_seconds(plan, store, rates) -> float:
    """Return the seconds of a prompt and its answer, by which arrangements are compared."""
    speed = predict(plan, store, rates)
    return speed.prefill.seconds + min(JOB[1], plan.context) * speed.decode.seconds


sizes = st.tuples(st.integers(64, 256).map(lambda n: n // 64 * 64), st.integers(256, 2048).map(lambda n: n // 64 * 64))


@settings(deadline=None, max_examples=60)
@given(
    sizes,
    st.lists(st.one_of(st.integers(CUDA_CONTEXT_BYTES, 1000 * MIB), st.integers(GIB, 3 * GIB)), max_size=2),
    st.integers(0, 200 * MIB),
    st.integers(0, 2),
    st.integers(0, 300 * MIB),
    st.sampled_from(["nf4", "half", "nf4,0.*=int8"]),
    st.integers(512, 4096),
)
def test_no_budget_is_exceeded_and_more_is_never_slower(size, gpus, extra, which, more, precision, context):
    geometry = Geometry(size[0], size[1], 5, 4, 2, 64, 4, 2, 1000, 4096)
    store, rates = layout(geometry, precision), Rates()
    try:
        make_plan(store, 1, context, 50 * MIB, gpus=gpus)
        raise AssertionError("a byte of memory was enough")
    except DoesNotFitError as refused:
        ram = refused.smallest + extra
    plan = make_plan(store, ram, context, 50 * MIB, gpus=gpus)
    check(plan, store)
    if which < len(gpus):
        gpus = [size + more * (index == which) for index, size in enumerate(gpus)]
    else:
        ram += more
    richer = make_plan(store, ram, context, 50 * MIB, gpus=gpus)
    check(richer, store)
    assert job_seconds(richer, store, rates) <= job_seconds(plan, store, rates) * (1 + 1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(12 * GIB, 90 * GIB), st.integers(0, 30 * GIB), st.integers(1, 32))
def test_on_a_cpu_more_memory_makes_neither_prefill_nor_decode_slower(ram, more, batch):
    store, rates = layout(LARGE), Rates()
    try:
        plan = make_plan(store, ram, 1024, PYTHON, batch=batch)
    except DoesNotFitError as refused:
        ram = refused.smallest
        plan = make_plan(store, ram, 1024, PYTHON, batch=batch)
    first, second = (
        predict(each, store, rates) for each in (plan, make_plan(store, ram + more, 1024, PYTHON, batch=batch))
    )
    assert second.decode.seconds <= first.decode.seconds
    assert second.prefill.seconds <= first.prefill.seconds
