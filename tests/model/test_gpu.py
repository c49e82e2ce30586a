"""On a machine with CUDA GPUs: the checks of `qmix doctor --self-test`. Skipped elsewhere."""

from __future__ import annotations

import pytest
import torch

from qmix.verify.selftest import _real_bytes, _values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device"),
]


@pytest.fixture
def gpus():
    return min(torch.cuda.device_count(), 2)


def test_gpus_give_the_values_of_the_cpu(gpus, capsys):
    assert _values("cuda", gpus, print), capsys.readouterr().out


def test_gpus_hold_the_planned_bytes(gpus, capsys):
    assert all(_real_bytes(gpus, print)), capsys.readouterr().out
