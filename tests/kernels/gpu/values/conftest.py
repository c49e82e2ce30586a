"""Every test has the device that the kernels run on, and numbers of its own."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def device():
    """The interpreter's memory is the CPU's."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(name):
        yield torch.device(name)
