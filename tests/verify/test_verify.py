"""Plans verified on pretend devices at full size, and the faults that verifying finds."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qmix.geometry import Geometry
from qmix.machine.rates import Rates
from qmix.plan import make_plan
from qmix.store.layout import StoreLayout, parse_precisions
from qmix.verify import rehearsal as verification
from qmix.verify.rehearsal import TOLERANCE, Rehearsal, rehearsal, verify

GIB = 2**30
BIG = Geometry(6144, 16384, 56, 48, 8, 128, 8, 2, 32000, 65536)
SMALLER = Geometry(4096, 14336, 32, 32, 8, 128, 8, 2, 32000, 32768)
FEW_LAYERS = replace(BIG, num_layers=4)
PYTHON = 490 * 2**20


def planned(geometry, ram, *gpus, precision="nf4", context=4096, batch=1, dtype="bf16"):
    """Return a plan with budgets in GiB, and its layout."""
    layout = StoreLayout(geometry, parse_precisions(precision, geometry), dtype)
    budgets = [int(gpu * GIB) for gpu in gpus]
    return make_plan(layout, int(ram * GIB), context, PYTHON, batch=batch, gpus=budgets), layout


def prove(plan, layout):
    found = verify(plan, layout)
    assert found.problems == ()
    assert [device.name for device in found.devices] == [*(device.name for device in plan.devices), "cpu"]
    for device in found.devices:
        assert abs(device.found - device.planned) <= TOLERANCE * device.planned, device
        assert device.found <= device.planned, f"{device.name} would run out of memory"
    assert found.holds
    return found


@pytest.mark.slow
def test_8x7b_on_12_gib_and_32_gib_of_ram():
    plan, layout = planned(SMALLER, 32, 12)
    assert plan.on_disk == 0
    prove(plan, layout)


@pytest.mark.slow
def test_8x22b_on_the_cpu_with_24_gib_and_disk():
    plan, layout = planned(BIG, 24)
    assert plan.on_disk > 0
    prove(plan, layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ram", "gpus"), [(64, (24,)), (64, (24, 24)), (32, (24, 24)), (64, (8,))], ids=["1x24", "2x24", "2x24 disk", "1x8"]
)
def test_8x22b_on_gpus(ram, gpus):
    plan, layout = planned(BIG, ram, *gpus)
    assert {device.name for device in plan.devices} == {f"gpu:{index}" for index in range(len(gpus))}
    prove(plan, layout)


@pytest.mark.parametrize(
    ("ram", "gpus", "options"),
    [
        (8, (4,), {}),
        (8, (4,), {"precision": "int8"}),
        (8, (6,), {"precision": "half", "dtype": "fp16"}),
        (8, (6,), {"precision": "nf4,0.*=int8,2.1=half,3.2=fp4"}),
        (8, (6,), {"context": 32768}),
        (8, (6,), {"batch": 8, "context": 2048}),
        (8, (2.4,), {}),
        (8, (12,), {}),
    ],
    ids=["nf4", "int8", "half", "mixed", "long", "batch", "some on the CPU", "all on the GPU"],
)
def test_four_layers_of_8x22b(ram, gpus, options):
    plan, layout = planned(FEW_LAYERS, ram, *gpus, **options)
    assert plan.devices
    prove(plan, layout)


def hidden_moves(plan, layout, tokens):
    """Return the moves of a step's hidden states between devices, as (from, to), and all moves."""
    moves = []

    class Moves(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
                moves.append((str(args[0].device), str(out.device), tuple(out.shape)))
            return out

    with rehearsal(plan, layout, rates=Rates(pcie=1e15, gpu_matmul=1e18, gpu_memory=1e15)) as made, Moves():
        made.step(tokens, 100, verification._spread_out(layout.geometry))
    hidden = [(start, end) for start, end, shape in moves if shape[-1] == layout.geometry.hidden_size]
    return hidden, moves


def test_activations_move_once_per_crossing_and_what_layers_share_once_per_device():
    plan, layout = planned(FEW_LAYERS, 16, 4, 4)
    assert set(plan.layer_devices) == {"gpu:0", "gpu:1"}
    hidden, moves = hidden_moves(plan, layout, 64)
    assert hidden == [("gpu:0", "gpu:1")]
    tables = [move for move in moves if move[:2] == ("gpu:0", "gpu:1") and move[2][-1] == layout.geometry.head_dim]
    assert len(tables) == 2  # cos and sin, for all layers there


def broken(monkeypatch, spoil, geometry=FEW_LAYERS, gpus=(4, 4)):
    """Return what verifying finds after `spoil` has changed the model with its weights."""
    load_weights = Rehearsal.load_weights

    def furnish_and_spoil(self):
        load_weights(self)
        self.spoiled = spoil(self)

    monkeypatch.setattr(Rehearsal, "load_weights", furnish_and_spoil)
    return verify(*planned(geometry, 16, *gpus))


def test_a_weight_left_on_the_cpu_is_found(monkeypatch):
    def spoil(made):
        attention = made.model.model.layers[1].self_attn
        attention.q_proj.weight = torch.nn.Parameter(attention.q_proj.weight.to("cpu"), requires_grad=False)

    found = broken(monkeypatch, spoil)
    assert not found.holds
    assert re.search(r"gpu:0 and cpu|two different devices", found.problems[0])


def test_hidden_states_that_do_not_cross_are_found(monkeypatch):
    def spoil(made):
        for layer in made.model.model.layers:
            layer._forward_pre_hooks.clear()
            layer._forward_pre_hooks_with_kwargs.clear()

    found = broken(monkeypatch, spoil)
    assert not found.holds
    assert re.search(r"gpu:1 and gpu:0|two different devices", found.problems[0])


def test_an_expert_on_the_other_gpu_is_found(monkeypatch):
    def spoil(made):
        residents = made.model.model.layers[0].mlp.experts.residents
        residents |= {expert: record.to("gpu:1") for expert, record in residents.items()}

    found = broken(monkeypatch, spoil)
    assert not found.holds
    assert "operands on gpu:0, gpu:1" in found.problems[0]


def test_a_forgotten_buffer_is_found(monkeypatch):
    found = broken(monkeypatch, lambda made: torch.empty(256 * 2**20, dtype=torch.uint8, device="gpu:1"))
    assert not found.holds
    first, second, host = found.devices
    assert first.agrees
    assert host.agrees
    assert second.difference > TOLERANCE


def test_experts_held_twice_are_found(monkeypatch):
    found = broken(monkeypatch, lambda made: made.spread._load(made.pool))
    assert not found.holds
    assert found.devices[0].found > found.devices[0].planned + 0.9 * 10**9


def test_experts_held_on_a_gpu_and_in_the_pool_are_found(monkeypatch):
    def spoil(made):
        records = [made.layout.record(*key).nbytes for key in made.spread.residents]
        return torch.empty(sum(records), dtype=torch.uint8)

    found = broken(monkeypatch, spoil)
    assert [device.agrees for device in found.devices] == [True, True, False]


def test_a_weight_in_fp32_is_found(monkeypatch):
    def spoil(made):
        head = made.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.float(), requires_grad=False)
        head.register_forward_pre_hook(lambda module, args: (args[0].float(),))

    found = broken(monkeypatch, spoil)
    assert not found.holds
    assert any(problem.startswith("not in half precision: ") for problem in found.problems)
    assert "lm_head.weight: torch.float32, not torch.bfloat16" in found.problems


def test_a_plan_that_promises_too_little_is_found():
    plan, layout = planned(FEW_LAYERS, 16, 4)
    device = replace(plan.devices[0], work=plan.devices[0].work // 2)
    assert not verify(replace(plan, devices=(device,)), layout).holds
