"""What experts and one step's work take on a GPU, in bytes. Arithmetic only, no torch.

A resident of a GPU lies as bitsandbytes' CUDA kernels take it: int8 and half precision as in its record, 4 bits in the
ordinary order with fp32 absmax (4.5 bits a weight where a record has 4.25).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from qmix.checkpoint.safetensors_header import aligned
from qmix.geometry import HALF_BYTES, Geometry
from qmix.precision.formats import FOUR_BITS, parts
from qmix.precision.record import record_layout

ALIGNMENT = 256  # of a part on a device: what CUDA's own allocator gives
ABSMAX_BYTES = 4  # fp32, which bitsandbytes' CUDA kernels take
LIBRARY_BYTES = 32 * 2**20  # cuBLAS' work space, which torch allocates at the first product
STAGED_RECORDS = 2  # one is copied while the one before computes


def device_record_bytes(geometry: Geometry, precision: str, dtype: str) -> int:
    """Bytes of one expert on a GPU; `dtype` ("bf16" or "fp16") is what `half` means here."""
    if precision not in FOUR_BITS:
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
    last: bool = True,
    uploads: bool = True,
) -> int:
    """The most that one step of `tokens` tokens, of all `batch` sequences together, allocates besides what is planned
    for weights and cache.

    `precisions` are those of the experts that may be computed here, `last` says whether the head is here, `uploads`
    whether experts of these layers lie elsewhere and may be copied for a step.
    """
    precisions = tuple(precisions)
    kept = 3 * tokens * geometry.hidden_size * HALF_BYTES + tokens * context  # residual, normed, their sum; the mask
    step = max(
        _attention_bytes(geometry, tokens, context, attention, batch),
        *(_experts_bytes(geometry, tokens, precision) for precision in precisions),
        3 * tokens * geometry.hidden_size * 4,  # RMSNorm, in fp32
        batch * geometry.vocab_size * (HALF_BYTES + 4) if last else 0,
    )
    staged = _staged_bytes(geometry, precisions, dtype) if uploads else 0
    loading = max(_loading_bytes(geometry, precision, dtype) for precision in precisions)
    return max(kept + step + staged, loading + staged) + LIBRARY_BYTES


def _attention_bytes(geometry: Geometry, tokens: int, context: int, attention: str, batch: int) -> int:
    """Where no fused kernel takes it, torch computes attention in fp32, for as many heads at once as there are keys'.

    That is counted though most GPUs have one: a plan must hold on those that have none.
    """
    q_rows, kv_rows = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
    rotary = 6 * tokens * q_rows * HALF_BYTES
    if attention == "eager":
        repeated = 2 * batch * context * q_rows * HALF_BYTES
        scores = geometry.num_heads * tokens * context * (2 * HALF_BYTES + 4)
        return max(rotary, repeated + scores + tokens * context * HALF_BYTES + 2 * tokens * q_rows * HALF_BYTES)
    wide = 2 * (batch * context + tokens) * kv_rows * 4  # keys and values, and the queries of a part
    scores = 2 * geometry.num_kv_heads * tokens * context * 4  # before and after softmax
    return max(rotary, wide + scores + tokens * context * HALF_BYTES + 2 * tokens * (q_rows + kv_rows) * HALF_BYTES)


def _experts_bytes(geometry: Geometry, tokens: int, precision: str) -> int:
    """All tokens at one expert: results of all pairs, its x, two inner values, and a matrix in half precision."""
    hidden, inner = geometry.hidden_size, geometry.intermediate_size
    pairs = tokens * geometry.experts_per_token * hidden
    product = tokens * inner * (HALF_BYTES if precision != "int8" else HALF_BYTES + 4)
    widened = 0 if precision == "half" else inner * hidden * HALF_BYTES
    computing = 2 * tokens * hidden * HALF_BYTES + tokens * inner * HALF_BYTES
    computing += max(widened + tokens * inner * HALF_BYTES, product)
    adding = pairs * 4 + 2 * tokens * hidden * 4
    return pairs * HALF_BYTES + max(computing, adding)


def _staged_bytes(geometry: Geometry, precisions: Iterable[str], dtype: str) -> int:
    """Buffers that records are copied to, and memory for one that is put in order."""
    buffers = STAGED_RECORDS * max(record_layout(geometry, precision, dtype).nbytes for precision in precisions)
    made_over = [device_record_bytes(geometry, precision, dtype) for precision in precisions if precision in FOUR_BITS]
    return buffers + max(made_over, default=0)


def _loading_bytes(geometry: Geometry, precision: str, dtype: str) -> int:
    """What a resident takes while it is put in order: its record, and as much as the codes of a matrix."""
    if precision not in FOUR_BITS:
        return 0
    return record_layout(geometry, precision, dtype).nbytes + geometry.intermediate_size * geometry.hidden_size // 2
