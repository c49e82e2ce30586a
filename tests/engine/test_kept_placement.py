"""The residents that a run ended with are kept for the same store, plan, GPUs and processor, and for no others."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from checkpoints import make_checkpoint
from spreads import spread_plan
from stores import make_store

from qmix.disk.places import state_directory
from qmix.engine import kept_placement
from qmix.engine.kept_placement import keep, with_kept

CARDS = ["NVIDIA GeForce RTX 4090"]
AFTER = [(0, 1), (0, 2), (1, 0), (1, 3)]  # 0 and 2 of both layers were residents: two of them were exchanged


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    there = tmp_path_factory.mktemp("kept")
    return make_store(make_checkpoint(there / "checkpoint"), there / "store", "nf4")


@pytest.fixture
def plan(store):
    found = spread_plan(store.layout, ["gpu:0", "gpu:0"], {0, 2}, 8)
    places = tuple(tuple("ram" if where == "disk" else where for where in row) for row in found.placement)
    return replace(found, placement=places)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def kept_file():
    (found,) = (state_directory() / "placements").iterdir()
    return found


def test_the_next_run_begins_with_what_the_last_one_ended_with(store, plan):
    assert with_kept(store, plan, CARDS) is plan
    keep(store, plan, CARDS, AFTER)
    found = with_kept(store, plan, CARDS)
    assert found.placement == (("ram", "gpu:0", "gpu:0", "ram"), ("gpu:0", "ram", "ram", "gpu:0"))
    assert replace(found, placement=plan.placement) == plan
    keep(store, plan, CARDS, [(0, 0), (0, 2), (1, 0), (1, 3)])  # replaced by a later run's
    assert with_kept(store, plan, CARDS).placement[0] == plan.placement[0]


def test_another_store_placement_card_or_processor_begins_with_its_own(store, plan, monkeypatch):
    keep(store, plan, CARDS, AFTER)
    assert (
        with_kept(store, replace(plan, ram=plan.ram + 4096), CARDS).placement == with_kept(store, plan, CARDS).placement
    )
    other = replace(store, parts=store.parts | {"weights": "0" * 64})
    assert with_kept(other, plan, CARDS) is plan
    larger = replace(plan, placement=(("gpu:0",) * 4, plan.placement[1]))  # by a larger budget
    assert with_kept(store, larger, CARDS) is larger
    slower = replace(plan, layer_devices=("cpu", "gpu:0"))
    assert with_kept(store, slower, CARDS) is slower
    assert with_kept(store, plan, ["NVIDIA GeForce RTX 3090"]) is plan
    monkeypatch.setattr(kept_placement, "cpu_name", lambda: "another")
    assert with_kept(store, plan, CARDS) is plan


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": "qmix-placement-0"}', bytes(range(256))])
def test_a_damaged_file_is_as_good_as_none(store, plan, content):
    keep(store, plan, CARDS, AFTER)
    path = kept_file()
    path.write_bytes(content)
    assert with_kept(store, plan, CARDS) is plan
    keep(store, plan, CARDS, AFTER)
    assert with_kept(store, plan, CARDS) != plan


@pytest.mark.parametrize(
    "residents",
    [
        [(0, 1), (0, 2), (1, 0)],  # one too few
        [(0, 1), (0, 2), (1, 0), (1, 0)],  # one twice
        [(0, 1), (0, 2), (0, 3), (1, 0)],  # of another layer
        [(0, 1), (0, 9), (1, 0), (1, 3)],
        [(0, 1), (0, 2), (7, 0), (1, 3)],
        [(0, 1), (0, -1), (1, 0), (1, 3)],
    ],
)
def test_residents_that_the_plan_has_no_place_for_are_neither_kept_nor_used(store, plan, residents):
    keep(store, plan, CARDS, AFTER)
    path = kept_file()
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(content | {"residents": residents}))
    assert with_kept(store, plan, CARDS) is plan
    path.unlink(missing_ok=True)
    if min(expert for _, expert in residents) >= 0:
        keep(store, plan, CARDS, residents)
        assert not path.exists()


def test_an_expert_of_another_precision_takes_no_residents_place(tmp_path, plan):
    mixed = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", "nf4,*.1=int8")
    keep(mixed, plan, CARDS, AFTER)
    assert not (state_directory() / "placements").exists()


def test_what_cannot_be_written_stops_no_run(store, plan, tmp_path):
    (tmp_path / "state").write_text("in the way")
    keep(store, plan, CARDS, AFTER)
    assert with_kept(store, plan, CARDS) is plan
