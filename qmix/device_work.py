"""What experts and one step's work take on a GPU, in bytes. Arithmetic only, no torch.

A resident of a GPU lies as bitsandbytes' CUDA kernels take it: int8 and half precision as in its record, 4 bits in the
ordinary order with fp32 absmax (4.5 bits a weight where a record has 4.25).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from qmix.geometry import HALF_BYTES, Geometry
from qmix.precision.formats import parts
from qmix.precision.record import record_layout
from qmix.safetensors_header import aligned

ALIGNMENT = 256  # of a part on a device: what CUDA's own allocator gives
ABSMAX_BYTES = 4  # fp32, which bitsandbytes' CUDA kernels take
STAGED_RECORDS = 2  # one is copied while the one before computes


def device_record_bytes(geometry: Geometry, precision: str, dtype: str) -> int:
    """Bytes of one expert on a GPU; `dtype` ("bf16" or "fp16") is what `half` means here."""
    if precision in ("int8", "half"):
        return record_layout(geometry, precision, dtype).nbytes
    total = 0
    for rows, cols in geometry.expert_matrices.values():
        codes, absmax = parts(precision, dtype, rows, cols)
        total += aligned(codes.nbytes, ALIGNMENT) + aligned(prod(absmax.shape) * ABSMAX_BYTES, ALIGNMENT)
    return total


def device_work_bytes(
    geometry: Geometry,
    tokens: int,
    context: int,
    attention: str = "sdpa",
    batch: int = 1,
    *,
    precisions: Iterable[str] = ("nf4",),
    dtype: str = "bf16",
    first: bool = True,
    last: bool = True,
    uploads: bool = True,
) -> int:
    """The most that one step of `tokens` tokens allocates on a GPU besides weights and cache.

    `precisions` are those of the experts that may be computed there, `first` and `last` say whether the embeddings
    and the head are there, `uploads` whether experts of its layers lie elsewhere and may be copied for a step.
    """
    hidden, q_rows = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    kept = tokens * hidden * HALF_BYTES * 3
    scores = tokens * hidden * 4 * 3 + tokens * q_rows * HALF_BYTES * 6 + tokens * context * (1 + HALF_BYTES)
    routed = tokens * geometry.experts_per_token * hidden * (HALF_BYTES + 4)
    expert = tokens * geometry.intermediate_size * HALF_BYTES * 3 + tokens * hidden * HALF_BYTES * 2
    logits = geometry.vocab_size * 40 * batch if last else 0
    largest = max(rows * cols for rows, cols in geometry.expert_matrices.values())
    widened = largest * HALF_BYTES if set(precisions) - {"half"} else 0
    staged = 0
    if uploads:
        staged = max(
            STAGED_RECORDS * record_layout(geometry, precision, dtype).nbytes
            + device_record_bytes(geometry, precision, dtype)
            for precision in precisions
        )
    return kept + max(scores, routed + expert + widened, logits) + staged
