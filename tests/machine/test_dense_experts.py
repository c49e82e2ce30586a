"""The trial of many tokens on GPUs uses records as stores have them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qmix.geometry import Geometry
from qmix.kernels.gpu.shapes import FOUR_BITS
from qmix.machine.dense_experts import HIDDEN, INNER, expert, try_dense
from qmix.model.gpu.kernels import expert_shape
from qmix.models.published import PUBLISHED
from qmix.precision.record import record_layout


@pytest.mark.parametrize("precision", FOUR_BITS)
def test_the_trials_expert_is_as_large_as_one_of_8x7b(precision):
    geometry: Geometry = replace(PUBLISHED["mixtral-8x7b"].geometry, num_layers=1)
    layout = record_layout(geometry, precision, "bf16")
    shape, nbytes = expert(precision)
    stored = expert_shape(layout, HIDDEN, INNER)
    assert (shape.precision, shape.hidden, shape.inner) == (precision, geometry.hidden_size, geometry.intermediate_size)
    assert layout.nbytes - 4096 < nbytes <= layout.nbytes
    assert all(place % 64 == 0 for place in (*shape.codes, *shape.scales))
    assert shape.codes[1] - shape.codes[0] <= stored.codes[1] - stored.codes[0]


def test_nothing_is_tried_without_gpus():
    assert try_dense([]) == {}


def test_the_slowest_gpu_decides_and_cards_without_a_type_are_left_out(monkeypatch):
    """Triton is not needed: the trial itself is replaced, and tensors are on the CPU."""
    pytest.importorskip("triton")
    from qmix.kernels.gpu import prefill

    tried, full, empty = [], torch.full, torch.empty
    monkeypatch.setattr(torch.cuda, "get_device_capability", {0: (8, 9), 1: (7, 5), 2: (6, 1)}.get)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr("qmix.kernels.gpu.launching.launch_fault", lambda: "")
    monkeypatch.setattr(torch, "full", lambda shape, value, dtype, device: full((1,), value, dtype=dtype))
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: empty(1, dtype=dtype))
    answers = iter([32, 128])
    monkeypatch.setattr(
        prefill, "dense_from", lambda shape, record, dtype, buffer: (tried.append(dtype), next(answers))[1]
    )
    found = try_dense([0, 1, 2])
    assert tried == [torch.bfloat16, torch.float16]
    assert found == dict.fromkeys(("nf4 bf16", "nf4 fp16", "fp4 bf16", "fp4 fp16"), 128)
    assert try_dense([2]) == {}


@pytest.mark.parametrize(
    ("in_place", "dense", "fewest"),
    [
        (lambda tokens: tokens, lambda tokens: 30.0, 32),  # as fast as the buffer at 30 tokens
        (lambda tokens: tokens, lambda tokens: 31.9, 64),  # at 32 by less than the measurement's noise
        (lambda tokens: 1.0, lambda tokens: 2.0, 512),  # never
        (lambda tokens: 2.0, lambda tokens: 1.0, 8),  # always
    ],
)
def test_dequantising_begins_where_it_is_clearly_faster(monkeypatch, in_place, dense, fewest):
    pytest.importorskip("triton")
    from qmix.kernels.gpu import prefill

    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, dtype, device: randn(*shape, dtype=dtype))
    times = {prefill.in_place: in_place, prefill.forward: dense}
    monkeypatch.setattr(prefill, "_seconds", lambda run: times[run.func](len(run.args[2])))
    record = SimpleNamespace(device=torch.device("cuda"))
    shape, _ = expert("nf4", 64, 64)
    assert prefill.dense_from(shape, record, torch.float32, torch.zeros(1)) == fewest
