"""Plans and profiles as files: what is written is read back, and what is damaged or another's is refused in a line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.layout import StoreLayout, parse_precisions
from qmix.plan import file as plan_file
from qmix.plan.file import read_plan
from qmix.plan.hardware import Machine
from qmix.plan.planned import plan_on
from qmix.prepare import Subject

GIB = 2**30
SMALL = Geometry(1024, 4096, 2, 4, 2, 64, 4, 2, 96, 256)  # large enough that a GPU pays
SLOTS = {"nbytes": 4096, "slots": 8, "records": 8, "served": 8}
USE = ((0.9, 0.5, 0.4, 0.2), (0.5, 0.5, 0.5, 0.5))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What Python takes, without measuring it."""
    monkeypatch.setattr("qmix.prepare.interpreter_memory", lambda **options: 10**8)


def layout(precision: str = "nf4") -> StoreLayout:
    return StoreLayout(SMALL, parse_precisions(precision, SMALL), "bf16")


def write(path: Path, gpus=(), use=None, **options) -> Path:
    planned = plan_on(Subject("org/small", layout(), "abc", use), Machine(4 * GIB, gpus), 100, **options)
    path.write_text(json.dumps(planned.to_json()))
    return path


@pytest.mark.parametrize("gpus", [(), (GIB,)])
def test_a_plan_is_read_back_as_it_was_written(tmp_path, gpus, monkeypatch):
    monkeypatch.setattr(plan_file, "found_gpus", lambda: gpus)
    path = write(tmp_path / "plan.json", gpus, batch=3, use=USE)
    made = plan_on(Subject("org/small", layout(), "abc", USE), Machine(4 * GIB, gpus), 100, batch=3).plan
    assert read_plan(path).plan_of(layout(), "abc") == made
    assert read_plan(path).plan_of(layout()) == made  # where the weights are not known


def refusal(call, *arguments) -> str:
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_plan_of_another_model_is_refused(tmp_path):
    found = read_plan(write(tmp_path / "plan.json"))
    assert "a model of other sizes" in refusal(found.plan_of, replace(layout(), geometry=replace(SMALL, vocab_size=97)))
    assert "in another precision" in refusal(found.plan_of, layout("int8"))
    assert "weights are not this model's" in refusal(found.plan_of, layout(), "abd")
    assert "made for --attn sdpa" in refusal(found.plan_of, layout(), "abc", "eager")


def test_a_plan_for_a_larger_machine_is_refused(tmp_path, monkeypatch):
    found = read_plan(write(tmp_path / "plan.json", (GIB,)))
    assert "wants gpu:0, this machine has 0 GPUs" in refusal(found.plan_of, layout())
    monkeypatch.setattr(plan_file, "found_gpus", lambda: (2**20,))
    assert "of gpu:0, 1.05 MB are free" in refusal(found.plan_of, layout())
    monkeypatch.setattr(plan_file, "available_memory", lambda: 0)
    monkeypatch.setattr(plan_file, "own_memory", lambda: 10**6)
    assert "of memory, 1 MB are free here" in refusal(found.plan_of, layout())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fits": False}, "does not fit"),
        ({"schema": "qmix-plan-2"}, "schema 'qmix-plan-2', this qmix reads"),
        ({"slot_classes": [SLOTS | {"slots": 9}]}, "damaged"),
        ({"slot_classes": [SLOTS | {"slots": 1}]}, "damaged"),
        ({"slot_classes": [SLOTS | {"slots": "8"}]}, "damaged"),
        ({"slot_classes": [SLOTS | {"records": 7}]}, "damaged"),
        ({"slot_classes": [SLOTS | {"served": 7}]}, "damaged"),
        ({"slot_classes": [{"nbytes": 4096}]}, "damaged"),
        ({"work": -1}, "damaged"),
        ({"ram": 10}, "damaged"),
        ({"layer_devices": ["cpu", "gpu:0"]}, "damaged"),
        ({"layer_devices": ["cpu"]}, "damaged"),
        ({"placement": [["ram"] * 4]}, "damaged"),
        ({"placement": [["ram"] * 4, ["moon"] * 4]}, "damaged"),
        ({"devices": [{"name": "gpu:0"}]}, "damaged"),
        ({"model": None}, "damaged"),
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(tmp_path, change, reason):
    path = write(tmp_path / "plan.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = refusal(read_plan, path)
    assert found.startswith(f"{path}: ")
    assert reason in found


def test_what_is_no_plan_at_all_is_refused(tmp_path):
    assert "No such file" in refusal(read_plan, tmp_path / "none")
    for text in ("", "[]", "3", "{"):
        (tmp_path / "bad").write_text(text)
        refusal(read_plan, tmp_path / "bad")
