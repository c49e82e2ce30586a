"""What experts and one step's work take on a GPU, in bytes. Arithmetic only, no torch."""

from __future__ import annotations

from qmix.geometry import HALF_BYTES, Geometry
from qmix.precision.formats import BLOCK, parts

ABSMAX_BYTES = 4  # bitsandbytes' CUDA kernels take fp32
DEVICE_CHUNK = 512  # tokens of a prompt computed at once
STAGED_RECORDS = 2  # one computes while the next is copied


def device_record_bytes(geometry: Geometry, precision: str, dtype: str) -> int:
    """One expert resident on a GPU: its codes as they are, a 4-bit matrix's absmax in fp32 (4.5 bits a weight)."""
    total = 0
    for rows, cols in geometry.expert_matrices.values():
        for part in parts(precision, dtype, rows, cols):
            absmax = part.name == "absmax"
            total += -(-rows * cols // BLOCK) * ABSMAX_BYTES if absmax else part.nbytes
    return total


def device_work_bytes(geometry: Geometry, context: int, batch: int, precision: str = "nf4", dtype: str = "bf16") -> int:
    """The most that one step allocates on a GPU besides weights and cache.

    Activations of a prefill chunk, two uploaded records, and the largest matrix dequantised.
    """
    tokens = min(max(DEVICE_CHUNK, batch), context * batch)
    hidden, q_rows = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    kept = tokens * hidden * HALF_BYTES * 3
    attention = tokens * hidden * 4 * 3 + tokens * q_rows * HALF_BYTES * 6 + tokens * context * (1 + HALF_BYTES)
    routed = tokens * geometry.experts_per_token * hidden * (HALF_BYTES + 4)
    expert = tokens * geometry.intermediate_size * HALF_BYTES * 3 + tokens * hidden * HALF_BYTES * 2
    staged = STAGED_RECORDS * device_record_bytes(geometry, precision, dtype)
    dequantised = max(rows * cols for rows, cols in geometry.expert_matrices.values()) * HALF_BYTES
    logits = geometry.vocab_size * 40 * batch
    return kept + max(attention, routed + expert, logits) + staged + dequantised
