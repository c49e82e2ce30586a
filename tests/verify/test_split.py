"""The check of how experts on the host are computed, with the CPU in the GPU's place."""

from __future__ import annotations

import pytest

from qmix.geometry import Geometry
from qmix.machine.rates import Rates
from qmix.model.gpu.experts import DeviceExperts
from qmix.verify import split
from qmix.verify.selftest import half_on_host
from qmix.verify.split import AS_CHOSEN, COPIED, ON_CPU, random_store, seconds_by_way, split_is_fastest, verdict, ways

SMALL = Geometry(128, 256, 2, 4, 2, 32, 8, 2, 4096, 256)


def test_the_chosen_way_must_be_nearly_the_fastest():
    right, line = verdict({AS_CHOSEN: 0.0109, ON_CPU: 0.0100, COPIED: 0.02})
    assert right
    assert line.startswith("ok: ")
    assert "as chosen 10.90 ms, the CPU alone 10.00 ms" in line
    assert verdict({AS_CHOSEN: 0.0111, ON_CPU: 0.02, COPIED: 0.0100}) == (
        False,
        "FAILED: a token with half of the experts on the host: as chosen 11.10 ms, the CPU alone 20.00 ms, "
        "as many copies as possible 10.00 ms",
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return random_store(tmp_path_factory.mktemp("random"), SMALL)


def test_every_way_is_taken_when_it_is_asked_for(store, monkeypatch):
    """Nothing is copied over a slow link, and everything that a slow CPU would have to compute is."""
    taken = []
    for name in ("_on_host", "_on_device"):
        run = getattr(DeviceExperts, name)
        monkeypatch.setattr(DeviceExperts, name, lambda *args, run=run, name=name: (taken.append(name), run(*args)))
    monkeypatch.setattr(split, "ROUNDS", 1)
    plan, used = half_on_host(store), {}
    for way, rates in ways(Rates()).items():
        monkeypatch.setattr(split, "ways", lambda _, way=way, rates=rates: {way: rates})
        taken.clear()
        assert seconds_by_way(store, plan, Rates(), "cpu", tokens=3)[way] > 0
        used[way] = set(taken)
    assert used[ON_CPU] == {"_on_host"}
    assert used[COPIED] == {"_on_device"}


def test_a_plan_has_half_of_the_experts_on_the_host_and_a_slot_for_each(store):
    plan = half_on_host(store)
    assert plan.host_records == plan.slots == 8
    assert {device.name for device in plan.devices} == {"gpu:0"}


def test_the_whole_check_runs(monkeypatch):
    monkeypatch.setattr(split, "TOKENS", 2)
    monkeypatch.setattr(split, "ROUNDS", 1)
    monkeypatch.setattr(split, "SLOWER", 1e9)
    right, line = split_is_fastest(half_on_host, Rates(), "cpu", SMALL)
    assert right
    assert line.count(" ms") == 3
