"""Try on GPUs from how many tokens on an expert in 4 bits is dequantised for torch's product rather than read in place.

The matrices are as large as 8x7B's. A GPU whose kernels cannot run here is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from qmix.kernels.gpu.shapes import FOUR_BITS, ExpertShape, available, fits_card
from qmix.kernels.packing import BLOCK

HIDDEN, INNER = 4096, 14336


def expert(precision: str, hidden: int = HIDDEN, inner: int = INNER) -> tuple[ExpertShape, int]:
    """Return a 4-bit expert's shape and the bytes of its record."""
    codes, scales = hidden * inner // 2, hidden * inner // BLOCK * 2
    first = 3 * codes
    shape = ExpertShape(precision, hidden, inner, (0, codes, 2 * codes), (first, first + scales, first + 2 * scales))
    return shape, first + 3 * scales


def try_dense(gpus: Sequence[int]) -> dict[str, int]:
    """Return by precision and type, like "nf4 bf16", the tokens from which on dequantising is faster on all GPUs."""
    if not gpus or not available():
        return {}
    import torch

    from qmix.kernels.gpu.prefill import dense_from

    found: dict[str, int] = {}
    for index in gpus:
        device, capability = torch.device("cuda", index), torch.cuda.get_device_capability(index)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            if not fits_card(name, capability):
                continue
            for precision in FOUR_BITS:
                shape, nbytes = expert(precision)
                record = torch.full((nbytes,), 0x3C, dtype=torch.uint8, device=device)  # scales of about 0.01
                buffer = torch.empty(shape.hidden * shape.inner, dtype=dtype, device=device)
                with torch.cuda.device(index):
                    key, tokens = f"{precision} {name}", dense_from(shape, record, dtype, buffer)
                found[key] = max(tokens, found.get(key, 0))
    return found
