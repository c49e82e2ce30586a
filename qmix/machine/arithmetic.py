"""The processors that decide the last bits of a result.

Products are summed in another order on another CPU path or GPU: nearly equal numbers, and now and then another token. A
result that is kept says where it was computed, so that results of two kinds are never taken for one.
"""

from __future__ import annotations

from qmix.kernels.cpu.paths import current
from qmix.machine.found import gpu_names


def computed_on(gpus: bool) -> str:
    """Return the CPU path, as in `CPU (avx2)`, behind the names of the GPUs if `gpus` take part."""
    cards = (sorted({name for name, _ in gpu_names()}) or ["GPU"]) if gpus else []  # asking opens every GPU
    return ", ".join([*cards, f"CPU ({current().name})"])
