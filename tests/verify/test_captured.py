"""Captured steps on pretend devices: their graphs and kernels are counted, and a look at a value is found."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from qmix.geometry import Geometry
from qmix.model.gpu.experts import read_numbers
from qmix.plan import make_plan
from qmix.store.layout import StoreLayout, parse_precisions
from qmix.verify import pretend, pretend_kernels
from qmix.verify.rehearsal import _spread_out, rehearsal

GIB = 2**30
BIG = Geometry(6144, 16384, 56, 48, 8, 128, 8, 2, 32000, 65536)
FOUR = Geometry(6144, 16384, 4, 48, 8, 128, 8, 2, 32000, 65536)
SMALLER = Geometry(4096, 14336, 32, 32, 8, 128, 8, 2, 32000, 32768)
A_LAYER = 9  # launches: two norms, two products, rotary positions, attention in two, experts in two
ENDS = 4  # a norm, the head, the choice in two; the embeddings, copies and the next position are torch's


def planned(geometry, ram, gpus):
    layout = StoreLayout(geometry, parse_precisions("nf4", geometry), "bf16")
    return make_plan(layout, int(ram * GIB), 4096, 490 * 2**20, gpus=[int(gpu * GIB) for gpu in gpus]), layout


def step(geometry, ram, gpus):
    """Return a captured step of one token: the layers with experts elsewhere, its graphs, and its kernels."""
    plan, layout = planned(geometry, ram, gpus)
    even = _spread_out(geometry)
    with rehearsal(plan, layout) as made:
        made.capture(even)
        made.captured_step(1, 4095, even)
        away = sum(each is not None for part in made.steps.parts for each in part.away)
        return away, made.steps.launched, made.steps.kernels.launches


def test_all_experts_resident_are_one_graph_a_token():
    assert step(FOUR, 8, (12,)) == (0, 1, 4 * A_LAYER + ENDS)


def test_experts_on_the_host_are_two_graphs_a_layer():
    away, graphs, kernels = step(FOUR, 8, (4,))
    assert (away, graphs) == (4, 2 * 4 + 1)
    assert kernels <= 4 * A_LAYER + ENDS + 2 * 4  # two more launches where experts are copied


def test_two_gpus_are_one_graph_where_they_can_access_each_other(monkeypatch):
    launches = 4 * A_LAYER + ENDS + 1  # the second GPU norms the stream that it gets
    assert step(FOUR, 8, (4.5, 5)) == (0, 1, launches)
    monkeypatch.setattr("qmix.model.gpu.captured.reach_each_other", lambda first, second: False)
    assert step(FOUR, 8, (4.5, 5)) == (0, 2, launches)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "ram", "gpus"),
    [(BIG, 64, (24,)), (BIG, 64, (24, 24)), (BIG, 32, (24, 24)), (BIG, 64, (8,)), (SMALLER, 32, (12,))],
    ids=["1x24", "2x24", "2x24 disk", "1x8", "8x7B on 12"],
)
def test_at_full_size(geometry, ram, gpus):
    away, graphs, _ = step(geometry, ram, gpus)
    assert away > 0
    assert graphs <= 2 * away + 1


def test_a_step_that_looks_at_a_value_raises():
    plan, layout = planned(FOUR, 8, (4,))
    even = _spread_out(FOUR)
    with rehearsal(plan, layout) as made:
        made.capture(even)
        made.model.model.layers[1].mlp.experts.read_routing = read_numbers  # the host's part, which must be given
        with pytest.raises(DataDependentOutputException):
            made.captured_step(1, 100, even)


def test_a_launch_with_an_operand_elsewhere_or_of_another_shape_is_found():
    pretend.register()
    kernels = pretend_kernels.PretendKernels()
    x, weight = torch.zeros(2, 64), torch.zeros(32, 64)
    kernels.linear(x, weight, torch.zeros(2, 32))
    with pytest.raises(RuntimeError, match=r"a product: operands on cpu, meta"):
        kernels.linear(x, weight.to("meta"), torch.zeros(2, 32))
    with pytest.raises(RuntimeError, match=r"a product: \[2, 16\] of torch.float32, not \[2, 32\]"):
        kernels.linear(x, weight, torch.zeros(2, 16))
