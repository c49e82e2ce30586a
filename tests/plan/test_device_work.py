"""Layers on GPUs: by hand, and against what was measured and estimated on an H100."""

from __future__ import annotations

import pytest

from qmix.errors import UsageError
from qmix.machine.cards import card_named
from qmix.machine.rates import Rates
from qmix.models.published import PUBLISHED
from qmix.plan import make_plan, predict
from qmix.plan.device_memory import CUDA_CONTEXT_BYTES
from qmix.plan.device_work import (
    HOST_SECONDS,
    LAYER_SECONDS,
    ROUND_TRIP,
    DeviceLayer,
    HostRates,
    decode_parts,
    prefill_parts,
    shared_seconds,
)
from qmix.plan.here import gpu_rates, run_machine, this_machine
from qmix.store.layout import StoreLayout, parse_precisions

GIB = 2**30
RATES = Rates(gpu_memory=1000.0, pcie=50.0, gpu_matmul=1e5)
HOST = HostRates(read=100.0, flops=1e4)
NAME = "4-bit products"


def layer(**changes) -> DeviceLayer:
    """Return a layer with 1 of 2 experts of 200 bytes on the host."""
    sizes = {"dense": 95.0, "flops": 0.0, "resident": 200.0, "host": 200.0, "used": 2.0, "away": 1.0, "split": True}
    return DeviceLayer(**{**sizes, "weights": 400, "tokens": 1, "top_k": 2, **changes})


def test_experts_on_the_host_are_shared_out_between_the_cpu_and_the_copies():
    assert shared_seconds(1, 1.0, 2.0) == 1.0
    assert shared_seconds(1, 3.0, 2.0) == 2.0
    assert shared_seconds(2, 1.0, 2.0) == 2.0  # one of each would take 2 / 0.85
    assert shared_seconds(3, 1.0, 2.0) == pytest.approx(2 / 0.85)
    assert shared_seconds(2, 2.0, 2.0) == pytest.approx(2 / 0.85)


def test_a_resident_layer_is_read_by_the_gpu_alone():
    found = decode_parts([layer(host=0.0, away=0.0, split=False, resident=425.0)], RATES, HOST, NAME)
    assert found["GPU memory"] == pytest.approx(95 / 950 + 425 / 850)
    assert found["GPU launches"] == LAYER_SECONDS
    assert found[NAME] == 0


def test_a_layer_with_experts_on_the_host_takes_the_longer_of_both():
    """None of two experts is there with 1/4, one with 1/2 and two with 1/4; 2 s each on the CPU, 4 s to copy."""
    found = decode_parts([layer()] * 3, RATES, HOST, NAME)
    assert found[NAME] == pytest.approx(3 * (2 / 2 + 4 / 4 + 3 / 4 * HOST_SECONDS), rel=1e-9)
    assert found["GPU memory"] == pytest.approx(3 * 95 / 950)  # the residents are ready before
    assert found["GPU launches"] == pytest.approx(3 * (LAYER_SECONDS + ROUND_TRIP))


def test_a_prompt_is_dequantised_and_multiplied_beside_the_copies():
    """200 bytes of each of 2 experts are read, 800 written and read again; multiplying takes 16000 / 6e4 s."""
    resident = layer(host=0.0, away=0.0, split=False, resident=400.0, tokens=10)
    found = prefill_parts([resident], RATES, HOST, NAME)
    read = (400 + 1600) / 950 + (95 + 1600) / 950
    assert found == {"GPU memory": pytest.approx(read), "GPU arithmetic": 0}
    hot = prefill_parts([layer(host=0.0, away=0.0, split=False, resident=400.0, tokens=1000)], RATES, HOST, NAME)
    assert hot["GPU arithmetic"] == pytest.approx(2 * 1000 * 2 * 400 / 6e4 - (95 + 1600) / 950)
    copied = prefill_parts([layer(tokens=1000, host=20000.0)], RATES, HostRates(1.0, 1.0), NAME)
    assert copied["PCIe"] > 2 * 20000 / 50  # and the first one is waited for
    computed = prefill_parts([layer(tokens=100, host=20000.0)], RATES, HostRates(1e9, 1e3), NAME)
    assert computed[NAME] >= 2.0 * 100 * 400 / 1e3


def test_a_faster_part_never_slows_a_step_down():
    for name in ("gpu_memory", "pcie", "gpu_matmul"):
        faster = Rates(**{**{each: getattr(RATES, each) for each in ("gpu_memory", "pcie", "gpu_matmul")}, name: 1e6})
        for parts in (decode_parts, prefill_parts):
            times = [sum(parts([layer(tokens=64)], rates, HOST, NAME).values()) for rates in (RATES, faster)]
            assert times[1] <= times[0]


# docs/gpus.md: 8x7B's geometry on an H100 with 16 cores. Rates as measured there; products are 0.66 of those published.
H100 = Rates().with_measured(
    {
        "gpu_memory": 2.45e12,
        "gpu_matmul": 650e12,
        "pcie": 55.1e9,
        "four_bit_read": 108e9,
        "memory_read": 111e9,
        "matmul": 2.5e12,
    }
)


def store(name: str) -> StoreLayout:
    geometry = PUBLISHED[name].geometry
    return StoreLayout(geometry, parse_precisions("nf4", geometry), "bf16")


def predicted(residents: int):
    """Return the prediction with `residents` of 256 experts on the GPU."""
    layout, budget = store("mixtral-8x7b"), 24 * GIB
    for _ in range(10):
        plan = make_plan(layout, 84 * GIB, 2048, GIB, gpus=[budget], rates=H100)
        missing = residents - (plan.num_records - plan.host_records)
        if not missing:
            return predict(plan, layout, H100)
        budget += int(1.02 * missing * layout.record(0, 0).nbytes)
    raise AssertionError("no budget holds so many")


@pytest.mark.parametrize(
    ("residents", "measured"),
    [(256, 187.0), (205, 50.0), (93, 20.2)],  # the kernels and graphs of this kind, tried on their own
    ids=["all on the GPU", "51 on the host", "163 on the host"],
)
def test_decode_on_an_h100_is_within_a_quarter(residents, measured):
    assert predicted(residents).decode.rate == pytest.approx(measured, rel=0.25)


def test_prefill_on_an_h100_is_within_a_quarter():
    """512 tokens: 107 ms of the GPU's work with all experts there; 299 ms of copies with 176 experts on the host."""
    assert predicted(256).prefill.rate == pytest.approx(512 / 0.107, rel=0.25)
    assert predicted(80).prefill.rate == pytest.approx(512 / 0.299, rel=0.25)


def test_8x22b_on_an_h100_is_between_what_ran_and_its_bound():
    """With the code of that day 3.6 tok/s in 24 GiB. The bound reads every byte over the CPU and the link at once."""
    layout = store("mixtral-8x22b")
    plan = make_plan(layout, 84 * GIB, 2048, GIB, gpus=[24 * GIB], rates=H100)
    active = 112 * plan.host_records / plan.num_records * layout.record(0, 0).nbytes
    assert 3.6 < predict(plan, layout, H100).decode.rate < (108e9 + 55.1e9) / active


def test_residents_of_common_budgets():
    """4.25 bits instead of 4.5 and no memory to reorder: 216 experts of 8x7B in 24 GiB, where 205 were before."""
    found = {}
    for gpu in (12, 24, 40):
        plan = make_plan(store("mixtral-8x7b"), 64 * GIB, 4096, GIB, gpus=[gpu * GIB])
        found[gpu] = plan.num_records - plan.host_records
        (device,) = plan.devices
        assert device.total * 1.02 + device.cuda + 64 * 2**20 <= device.budget
    assert found == {12: 81, 24: 216, 40: 256}


def test_a_typical_24_gib_card_runs_8x22b_faster_than_the_cpu_alone():
    layout = store("mixtral-8x22b")
    rates = gpu_rates(Rates(), [24 * GIB])
    assert rates.card == "RTX 3090"
    assert rates.source("gpu_memory") == "typical"
    with_gpu, alone = (
        predict(make_plan(layout, 64 * GIB, 4096, GIB, gpus=gpus, rates=rates), layout, rates).decode.rate
        for gpus in ([24 * GIB], [])
    )
    assert with_gpu > 2.4
    assert with_gpu > 1.5 * alone


def test_a_named_cards_rates_are_published_unless_it_was_measured_here():
    card = card_named("4090")
    measured = Rates().with_measured({"gpu_memory": 9e11, "gpu_matmul": 1e14, "pcie": 2e10})
    published = gpu_rates(measured, [card.budget], [card], ["NVIDIA GeForce RTX 3090"])
    assert published.gpu_memory == card.rates["gpu_memory"]
    assert (published.source("gpu_memory"), published.card) == ("published", "RTX 4090")
    assert gpu_rates(measured, [card.budget], [card], ["NVIDIA GeForce RTX 4090"]) == measured
    assert gpu_rates(measured, [24 * GIB]) == measured
    slower = gpu_rates(Rates(), [1, 2], [card, card_named("3090")])
    assert slower.gpu_memory == card_named("3090").rates["gpu_memory"]
    assert slower.pcie == card.rates["pcie"]
    assert slower.card == "RTX 4090 and RTX 3090"
    assert gpu_rates(measured, []) == measured


def test_a_gpu_that_was_found_has_its_cards_rates(monkeypatch):
    """The table has one of two GPUs here: its published rates count for both, as no other is known to be slower."""
    found = [("NVIDIA GeForce RTX 4090", 25_393_692_672), ("NVIDIA Something", 2**34)]
    monkeypatch.setattr("qmix.plan.here.found_gpus", lambda: tuple(nbytes for _, nbytes in found))
    monkeypatch.setattr("qmix.plan.here.gpu_names", lambda: tuple(found))
    machine = this_machine(64 * GIB)
    assert machine.gpus == tuple(nbytes + CUDA_CONTEXT_BYTES for _, nbytes in found)  # a context of this process's own
    assert (machine.rates.card, machine.rates.source("pcie")) == ("RTX 4090", "published")


def test_more_than_is_free_on_a_gpu_is_refused_with_what_is(monkeypatch):
    monkeypatch.setattr("qmix.units.UnitSystem.binary", True)  # as after a size in GiB on the command line
    monkeypatch.setattr("qmix.plan.here.found_gpus", lambda: (10 * GIB,))
    monkeypatch.setattr("qmix.plan.here.gpu_names", lambda: (("NVIDIA GeForce RTX 3060", 12 * GIB),))
    most = 10 * 1024 + 600
    assert run_machine(GIB, f"{most}MiB").gpus == (most * 2**20,)
    with pytest.raises(UsageError, match=f"gpu: 12288MiB is more than what is free on gpu:0; give gpu='{most}MiB'"):
        run_machine(GIB, ["12GiB"])
    with pytest.raises(UsageError, match="2 GPUs given, and torch finds 1 GPU here"):
        run_machine(GIB, ["4GiB", 2**32])
    assert run_machine(GIB, "none").gpus == run_machine(GIB, []).gpus == ()
