"""Names of the processors that compute a result."""

from __future__ import annotations

import pytest

from qmix.kernels.cpu.paths import PATHS
from qmix.machine import arithmetic


@pytest.mark.parametrize(
    ("gpus", "cards", "name"),
    [
        (False, (("RTX 4090", 24),), "CPU (avx2)"),
        (True, (("RTX 4090", 24), ("RTX 3060", 12), ("RTX 4090", 24)), "RTX 3060, RTX 4090, CPU (avx2)"),
        (True, (), "GPU, CPU (avx2)"),
    ],
)
def test_processors_are_named(monkeypatch, gpus, cards, name):
    monkeypatch.setattr(arithmetic, "gpu_names", lambda: cards)
    monkeypatch.setattr(arithmetic, "current", lambda: PATHS["avx2"])
    assert arithmetic.computed_on(gpus) == name
