"""Memory for weights and caches in RAM, as a tensor."""

from __future__ import annotations

import numpy as np
import torch

from qmix.disk.direct import huge_pages


def anonymous_memory(nbytes: int) -> torch.Tensor:
    """Return a page-aligned uint8 tensor [nbytes] in a mapping of its own, populated, on huge pages where possible."""
    return torch.from_numpy(np.frombuffer(huge_pages(nbytes, populate=True), np.uint8))
