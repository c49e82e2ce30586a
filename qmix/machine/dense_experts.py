"""Try on GPUs from how many tokens on an expert in 4 bits is dequantised for torch's product rather than read in place.

The matrices are as large as 8x7B's. A GPU whose kernels cannot run here is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from qmix.kernels.gpu.shapes import DTYPES, FOUR_BITS, ExpertShape, available, fits_card
from qmix.kernels.packing import BLOCK

HIDDEN, INNER = 4096, 14336


def expert(precision: str, hidden: int = HIDDEN, inner: int = INNER) -> tuple[ExpertShape, int]:
    """Return a 4-bit expert's shape and the bytes of its record."""
    codes, scales = hidden * inner // 2, hidden * inner // BLOCK * 2
    first = 3 * codes
    shape = ExpertShape(precision, hidden, inner, (0, codes, 2 * codes), (first, first + scales, first + 2 * scales))
    return shape, first + 3 * scales


def try_dense(gpus: Sequence[int]) -> dict[str, int]:
    """Return by precision and type, like "nf4 bf16", the tokens from which on dequantising is faster on all GPUs.

    One precision and type is tried on each GPU, because compiling takes longer than the trial: the others have as many
    bytes and instructions.
    """
    if not gpus or not available():
        return {}
    from qmix.kernels.gpu.launching import launch_fault

    if launch_fault():
        return {}
    import torch

    from qmix.checkpoint.torch_dtypes import HALF
    from qmix.kernels.gpu.prefill import dense_from

    most = 0
    for index in gpus:
        device, capability = torch.device("cuda", index), torch.cuda.get_device_capability(index)
        name = next((each for each in DTYPES if fits_card(each, capability)), None)
        if name is None:
            continue
        shape, nbytes = expert(FOUR_BITS[0])
        record = torch.full((nbytes,), 0x3C, dtype=torch.uint8, device=device)  # scales of about 0.01
        buffer = torch.empty(shape.hidden * shape.inner, dtype=HALF[name], device=device)
        with torch.cuda.device(index):
            most = max(most, dense_from(shape, record, buffer.dtype, buffer))
    return {f"{precision} {name}": most for precision in FOUR_BITS for name in DTYPES} if most else {}
