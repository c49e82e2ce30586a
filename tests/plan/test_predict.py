"""Predicted speed: by hand, and against what was measured at full size."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmix.geometry import Geometry
from qmix.machine.rates import FourBitProducts, Machine, Rates, without_kernels
from qmix.models.published import PUBLISHED
from qmix.plan import make_plan, predict
from qmix.plan.device_work import beside
from qmix.plan.predict import seconds_of, speed_of
from qmix.plan.traffic import Load, missed_share
from qmix.store.layout import StoreLayout, parse_precisions

GIB = 2**30
ROUND = Rates(
    memory_read=100.0,
    disk_read=10.0,
    pcie=50.0,
    matmul=1000.0,
    four_bit_read=100.0,
    gpu_memory=1000.0,
    gpu_matmul=1e5,
    layer_seconds=0.5,
    read_seconds=0.25,
)


def test_each_part_of_a_step_by_hand():
    assert seconds_of(Load(layers=4), ROUND) == 4 * 0.5
    assert seconds_of(Load(layers=0, dense=84), ROUND) == pytest.approx(1)  # 0.84 of memory's rate
    assert seconds_of(Load(layers=0, experts=70), ROUND) == pytest.approx(1)  # 0.7 of memory's
    assert seconds_of(Load(layers=0, experts=84, four_bit=False), ROUND) == pytest.approx(1)
    assert seconds_of(Load(layers=0, missed=10, reads=2), ROUND) == pytest.approx(1.5)
    assert seconds_of(Load(layers=0, flops=650), ROUND) == pytest.approx(1)


def test_products_slower_than_memory_are_the_limit():
    slow = replace(ROUND, four_bit_read=10.0, half_read=20.0)
    assert seconds_of(Load(layers=0, experts=9), slow) == pytest.approx(1)  # 0.9 of the product's rate
    assert seconds_of(Load(layers=0, dense=18), slow) == pytest.approx(1)
    assert seconds_of(Load(layers=0, experts=18, four_bit=False), slow) == pytest.approx(1)


@pytest.mark.parametrize(
    ("ram", "batch", "dtype", "layers"),
    [(64, 1, "bf16", 4), (64, 32, "bf16", 4), (16, 1, "bf16", 32), (96, 33, "bf16", 32), (64, 1, "fp16", 32)],
    ids=["all in memory", "32 prompts", "some on the disk", "33 prompts", "fp16"],
)
def test_a_step_in_one_call_has_the_overhead_of_four_layers(ram, batch, dtype, layers):
    geometry = PUBLISHED["mixtral-8x7b"].geometry
    store = StoreLayout(geometry, parse_precisions("nf4", geometry), dtype)
    plan = make_plan(store, ram * GIB, 4096, GIB, batch=batch)
    seconds = [predict(plan, store, Rates(layer_seconds=overhead)).decode.seconds for overhead in (0.0, 1.0)]
    assert seconds[1] - seconds[0] == pytest.approx(layers)


def test_reads_beside_products_take_more_than_the_longer_and_less_than_both():
    assert beside(3, 0) == 3
    assert beside(0, 0) == 0
    assert 3 < beside(3, 2) < 3.3
    assert beside(1, 1) == pytest.approx(2 ** (1 / 3))


def test_a_speed_names_its_limit_and_is_surer_of_what_was_measured():
    load = Load(layers=1, dense=84, missed=100)
    guessed = speed_of(load, ROUND, 1)
    assert guessed.limit == "disk"
    surer = speed_of(load, ROUND.with_measured({"disk_read": 10.0}), 1)
    assert guessed.slowest < surer.slowest < surer.rate < surer.fastest < guessed.fastest
    assert surer.to_json()["band"] == [surer.slowest, surer.fastest]


def test_a_long_prompt_reads_each_expert_once_for_the_tokens_that_go_together():
    """8x22B, 4,096 tokens on a disk so slow that only reads count: once together, or once in each of eight chunks."""
    layout = store(PUBLISHED["mixtral-8x22b"].geometry)
    plan = make_plan(layout, 24 * GIB, 4096, 500 * 10**6)
    assert plan.prefill == 4096
    slow = Rates(disk_read=1e6, read_seconds=0.0)
    together = predict(plan, layout, slow).prompt
    assert together.tokens == 4096
    assert together.limit == "disk"
    assert together.seconds == pytest.approx(plan.on_disk / 1e6, rel=0.01)
    chunks = predict(replace(plan, prefill=512), layout, slow)
    assert chunks.prompt.seconds == pytest.approx(8 * together.seconds, rel=0.01)
    assert chunks.prefill == predict(plan, layout, slow).prefill
    # on a fast disk products count: eight chunks, and attention to 2,048 positions where a first chunk has 256
    rates = {"disk_read": 1e15, "memory_read": 1e15, "four_bit_read": 1e15, "half_read": 1e15}
    fast = Rates(**rates, read_seconds=0.0, layer_seconds=0.0)
    found = predict(plan, layout, fast)
    attention = 4096 * 56 * 2 * 2 * (2048 - 256) * 6144 / (fast.matmul * 0.65)
    assert found.prompt.seconds == pytest.approx(8 * found.prefill.seconds + attention, rel=0.001)


def test_a_cpu_without_kernels_is_slower_unless_it_was_measured():
    slow = without_kernels(Rates())
    assert slow.four_bit_read < Rates().four_bit_read / 10
    measured = Rates().with_measured({"four_bit_read": 1e9})
    assert without_kernels(measured) == measured
    assert Machine(1, four_bit=FourBitProducts(fast=False)).speeds == slow
    assert Machine(1).speeds == Rates()


def test_a_rate_comes_from_a_person_a_measurement_or_nowhere():
    rates = Rates().with_measured({"pcie": 1.0, "matmul": 2.0}).with_stated({"pcie": 3.0})
    assert [rates.source(name) for name in ("pcie", "matmul", "disk_read")] == ["stated", "measured", "typical"]
    assert rates.to_json()["pcie"] == {"value": 3.0, "source": "stated"}


def store(geometry: Geometry) -> StoreLayout:
    return StoreLayout(geometry, parse_precisions("nf4", geometry), "bf16")


# docs/performance.md, "Full size": the machine's rates there, and what was measured
BOX = Rates(memory_read=53.8e9, matmul=1040e9, four_bit_read=58e9, layer_seconds=0.5e-3, read_seconds=0.1e-3)


@pytest.mark.parametrize(
    ("layers", "model", "ram", "context", "disk", "measured"),
    [
        (12, "mixtral-8x7b", 12 * GIB, 1024, 3.7e9, 1 / 0.092),  # everything in memory
        (12, "mixtral-8x7b", int(5.26e9), 256, 3.87e9, 1 / 0.345),  # memory for half
        (56, "mixtral-8x22b", 20 * GIB, 4096, 3.7e9, 0.26),
    ],
)
def test_predictions_are_within_a_quarter_of_what_full_size_runs_measured(layers, model, ram, context, disk, measured):
    geometry = replace(PUBLISHED[model].geometry, num_layers=layers)
    plan = make_plan(store(geometry), ram, context, 500 * 10**6)
    found = predict(plan, store(geometry), BOX.with_measured({"disk_read": disk}))
    assert found.decode.rate == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(
    ("share", "misses"),
    # of `tiny`'s own routing, and of 8x7B's and 8x22B's geometry at full size (docs/performance.md)
    [(0.12, 0.776), (0.25, 0.63), (0.38, 0.498), (0.5, 0.376), (0.62, 0.261), (0.38, 0.56), (0.125, 0.83)],
)
def test_misses_are_about_those_that_were_measured(share, misses):
    assert (1 - share) * missed_share(share) == pytest.approx(misses, rel=0.16)
