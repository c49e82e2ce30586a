"""The trial of many tokens on GPUs uses records as stores have them."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
