"""Plans and profiles as files: they are read back as written; damaged or foreign ones are refused in a line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.machine.rates import Machine
from qmix.plan import file as plan_file
from qmix.plan.file import read_plan
from qmix.plan.target import PlanTarget
from qmix.planner.planned import plan_on
from qmix.store.layout import StoreLayout, parse_precisions

GIB = 2**30
SMALL = Geometry(1024, 4096, 2, 4, 2, 64, 4, 2, 96, 256)  # large enough that a GPU pays
SLOTS = {"nbytes": 4096, "slots": 8, "records": 8, "served": 8}
GPU = {"name": "gpu:0", "budget": 10, "dense": 1, "kv_cache": 1, "experts": 1, "work": 1}
USE = ((0.9, 0.5, 0.4, 0.2), (0.5, 0.5, 0.5, 0.5))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Replace the measurement of Python's own memory."""
    monkeypatch.setattr("qmix.plan.here.interpreter_memory", lambda **options: 10**8)


def layout(precision: str = "nf4") -> StoreLayout:
    return StoreLayout(SMALL, parse_precisions(precision, SMALL), "bf16")


def write(path: Path, gpus=(), use=None, **options) -> Path:
    planned = plan_on(PlanTarget("org/small", layout(), "abc", use), Machine(4 * GIB, gpus), 100, **options)
    path.write_text(json.dumps(planned.to_json()))
    return path


@pytest.mark.parametrize("gpus", [(), (GIB,)])
def test_a_plan_is_read_back_as_it_was_written(tmp_path, gpus, monkeypatch):
    monkeypatch.setattr(plan_file, "found_gpus", lambda: gpus)
    path = write(tmp_path / "plan.json", gpus, batch=3, use=USE)
    made = plan_on(PlanTarget("org/small", layout(), "abc", USE), Machine(4 * GIB, gpus), 100, batch=3).plan
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
    assert "made for attention='sdpa'" in refusal(found.plan_of, layout(), "abc", "eager")


def test_a_plan_that_leaves_too_little_for_python_or_for_long_prompts_is_refused(tmp_path, monkeypatch):
    """In a program that imports more than a command does, the same plan would exceed its budget."""
    found = read_plan(write(tmp_path / "plan.json"))
    monkeypatch.setattr("qmix.plan.here.interpreter_memory", lambda **options: 10**8 + found.plan.headroom)
    found.plan_of(layout())
    monkeypatch.setattr("qmix.plan.here.interpreter_memory", lambda **options: 10**8 + found.plan.headroom + 1)
    assert "Python takes" in refusal(found.plan_of, layout())
    assert "give ram in place of the plan" in refusal(found.plan_of, layout())
    monkeypatch.setattr("qmix.plan.here.interpreter_memory", lambda **options: 10**8)
    content = json.loads((tmp_path / "plan.json").read_text()) | {"prefill": 1024}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert "damaged: prefill_work" in refusal(read_plan(tmp_path / "plan.json").plan_of, layout())


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
        ({"slot_classes": [SLOTS | {"slots": 9}]}, "damaged: slot_classes"),
        ({"slot_classes": [SLOTS | {"slots": 1}]}, "damaged: slot_classes"),
        ({"slot_classes": [SLOTS | {"slots": "8"}]}, "slot_classes[0].slots: expected int, got str"),
        ({"slot_classes": [SLOTS | {"slots": 8.0}]}, "slot_classes[0].slots: expected int, got float"),
        ({"slot_classes": [SLOTS, SLOTS]}, "damaged: slot_classes"),
        ({"slot_classes": [SLOTS | {"records": 7}]}, "damaged: num_records"),
        ({"slot_classes": [SLOTS | {"served": 7}]}, "damaged: slot_classes"),
        ({"slot_classes": [{"nbytes": 4096}]}, "slot_classes[0]: object missing required field slots"),
        ({"work": -1}, "damaged: a number"),
        ({"store_bytes": 10**400}, "damaged: a number"),
        ({"expert_bytes": {"nf4": -1}}, "damaged: a number"),
        ({"batch": 0}, "damaged: batch"),
        ({"context": 0}, "damaged: context"),
        ({"context": 257}, "damaged: context"),
        ({"ram": 10}, "damaged: ram"),
        ({"prefill": 0}, "damaged: prefill"),
        ({"prefill": 513}, "damaged: prefill"),
        ({"prefill": 2**40}, "damaged: prefill"),
        ({"prefill_work": 2**62}, "damaged: prefill_work"),
        ({"prefill_work": 10**9}, "damaged: prefill_work"),
        ({"layer_devices": ["cpu", "gpu:0"]}, "damaged: layer_devices"),
        ({"layer_devices": ["cpu"]}, "damaged: layer_devices"),
        ({"placement": [["ram"] * 4]}, "damaged: placement"),
        ({"placement": [["ram"] * 4, ["moon"] * 4]}, "damaged: placement"),
        ({"devices": [{"name": "gpu:0"}]}, "devices[0]: object missing required field budget"),
        ({"devices": [GPU | {"name": "moon"}], "layer_devices": ["cpu", "moon"]}, "damaged: devices"),
        ({"devices": [GPU, GPU], "layer_devices": ["cpu", "gpu:0"]}, "damaged: devices"),
        ({"model": None}, "model: expected object, got null"),
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(tmp_path, change, reason):
    path = write(tmp_path / "plan.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert reason in refusal(read_plan, path).removeprefix(f"{path}: ")


def test_a_plan_of_no_geometry_is_refused(tmp_path):
    path = write(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    content["model"]["geometry"]["num_layers"] = "2"
    path.write_text(json.dumps(content))
    assert "damaged: geometry: Expected `int`, got `str`" in refusal(read_plan, path)


def test_what_is_no_plan_at_all_is_refused(tmp_path):
    assert "No such file" in refusal(read_plan, tmp_path / "none")
    for text in ("", "[]", "3", "{"):
        (tmp_path / "bad").write_text(text)
        refusal(read_plan, tmp_path / "bad")
