"""Bytes that a plan's GPUs take, and the host for them; see `memory`. Pure arithmetic; loads no torch."""

from __future__ import annotations

from collections.abc import Iterable

from qmix.geometry import HALF_BYTES, Geometry
from qmix.kernels.gpu.shapes import FEW_TOKENS, MOST_IN_PLACE, attention_splits, down_splits
from qmix.plan.memory import PREFILL_CHUNK, prefill_bytes
from qmix.precision.formats import FOUR_BITS, PRECISIONS
from qmix.precision.record import record_layout

DEVICE_PREFILL_SHARE = 1 / 128  # of a GPU's budget that the activations of a long prompt's tokens may take
STAGED_RECORDS = 2  # staging buffers of a GPU: one is filled while the other is computed with
LEAST_STEP = 8  # tokens that a captured step has room for in every plan: the next one and a draft
STEP_BYTES = 64 * 2**20  # of a GPU that the buffers of larger steps may take, for longer drafts of a single sequence
DEQUANTISED_AT_ONCE = 2**21  # weights that are dequantised by torch's own operations at once
ALIGNMENT = 256  # of every part on a GPU, as CUDA's own allocator aligns
CUDA_HOST_BYTES = 2**30  # CUDA's libraries in main memory; stated, not measured
CUDA_CONTEXT_BYTES = 600 * 2**20  # on a GPU where `qmix doctor` did not measure it
GPU_DRIVER_BYTES = 64 * 2**20  # the driver's beside the context as it was measured: graphs, and code loaded later
GPU_SLACK_SHARE = 0.02  # of torch's allocations, for freed blocks that its allocator keeps
LIBRARY_BYTES = 32 * 2**20  # cuBLAS' work space, allocated by torch at the first product
DEQUANTISING_BYTES = 14  # a weight: its code, as an index, and its value in fp32 before and after scaling


def usable_device_bytes(budget: int, context: int = CUDA_CONTEXT_BYTES) -> int:
    """Return what a GPU's budget leaves for torch's allocations beside CUDA's context of `context` bytes."""
    return int(torch_bytes(budget, context) / (1 + GPU_SLACK_SHARE))


def torch_bytes(budget: int, context: int = CUDA_CONTEXT_BYTES) -> int:
    """Return the most that torch may take of a GPU's budget, with the blocks that its allocator keeps.

    A run holds torch to it: at this limit the allocator gives freed blocks back before it takes more.
    """
    return budget - context - GPU_DRIVER_BYTES


def device_record_bytes(geometry: Geometry, precision: str, dtype: str) -> int:
    """Return the bytes of one expert on a GPU: its record as it lies in the store, 4.25 bits a weight for nf4 and fp4.

    `dtype` ("bf16" or "fp16") is what `half` means here.
    """
    return record_layout(geometry, precision, dtype).nbytes


def staging_bytes(geometry: Geometry, precisions: Iterable[str], dtype: str) -> int:
    """Return the bytes of a GPU's staging buffers, for experts that are copied to it for a step."""
    return STAGED_RECORDS * max(device_record_bytes(geometry, precision, dtype) for precision in precisions)


def dequantised_bytes(geometry: Geometry, precisions: Iterable[str]) -> int:
    """Return the bytes of a GPU's buffer for one 4-bit matrix in half precision, for steps of many tokens.

    An expert's three matrices are multiplied one after another.
    """
    largest = max(rows * cols for rows, cols in geometry.expert_matrices.values())
    return largest * HALF_BYTES if any(precision in FOUR_BITS for precision in precisions) else 0


def captured_tokens(geometry: Geometry, context: int, batch: int = 1) -> int:
    """Return the tokens that the buffers of captured steps have room for, with `batch` sequences of `context` tokens.

    A batch reads its prompts in such steps, too. A single sequence verifies drafts in them: with a long context their
    buffers for attention would take much of a GPU.
    """
    if batch > 1:
        return FEW_TOKENS
    larger = (FEW_TOKENS, FEW_TOKENS // 2)
    fitting = (tokens for tokens in larger if step_buffer_bytes(geometry, tokens, context) <= STEP_BYTES)
    return next(fitting, LEAST_STEP)


def step_buffer_bytes(geometry: Geometry, tokens: int, context: int, last: bool = True) -> int:
    """Return the bytes of a GPU's buffers for captured steps of up to `tokens` tokens.

    A captured step takes no other memory. Counted are the residual stream, its normed copy and what is added to it;
    queries, keys and values, and the heads' results; attention's partial sums in fp32, each with its largest score and
    its weight; the experts' inner values, their partial sums in fp32, and the results that come from the host; ids,
    weights and the rotary table; and with `last` the logits. The last two are counted in fp32.
    """
    hidden, pairs = geometry.hidden_size, tokens * geometry.experts_per_token
    q_rows, kv_rows = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
    rows = tokens * (3 * hidden + 2 * q_rows + 2 * kv_rows) * HALF_BYTES
    sums = tokens * geometry.num_heads * attention_splits(context) * (geometry.head_dim + 2) * 4
    experts = pairs * (geometry.intermediate_size + hidden) * HALF_BYTES
    experts += down_splits(geometry.intermediate_size) * pairs * hidden * 4
    routing = pairs * (8 + 4) + geometry.num_records * 8  # ids and weights; the records' addresses
    rotary = context * geometry.head_dim * 4
    return rows + sums + experts + routing + rotary + (tokens * geometry.vocab_size * 4 if last else 0)


def pinned_bytes(geometry: Geometry, tokens: int, gpus: int) -> int:
    """Return the bytes of pinned main memory through which captured steps on `gpus` GPUs and the host exchange.

    Each GPU has ids and x of up to `tokens` tokens, the host's results, and the addresses of copied experts in up to
    four precisions. Its layers use the same memory one after another.
    """
    hidden, pairs = geometry.hidden_size, tokens * geometry.experts_per_token
    exchange = pairs * 8 + (tokens + pairs) * hidden * HALF_BYTES + len(PRECISIONS) * geometry.num_experts * 8
    return gpus * exchange


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
    prefill: int = PREFILL_CHUNK,
) -> int:
    """Return the most that one step of `tokens` tokens of all sequences allocates on a GPU besides weights and cache.

    `precisions` are those of the experts that may be computed here, `last` says whether the head is here, `uploads`
    whether experts of these layers lie elsewhere and may be copied for a step. `prefill` tokens of a prompt may go
    through a layer together: their stream and masks stay beside a chunk's attention, all that `prefill_bytes` counts
    beside an expert's chunk.
    """
    precisions = tuple(precisions)
    kept = 3 * tokens * geometry.hidden_size * HALF_BYTES + tokens * context  # residual, normed, their sum; the mask
    along = geometry.hidden_size * HALF_BYTES + context + 2 * geometry.head_dim * HALF_BYTES  # with rotary tables
    attending = _device_attention_bytes(geometry, tokens, context, attention, batch)
    mixing = max(
        *(_device_expert_bytes(geometry, tokens, precision) for precision in precisions),
        3 * tokens * geometry.hidden_size * 4,  # RMSNorm, in fp32
        batch * geometry.vocab_size * (HALF_BYTES + 4) if last else 0,
    )
    if prefill > PREFILL_CHUNK:
        attending, mixing = attending + prefill * along, mixing + prefill_bytes(geometry, context, prefill)
    step = max(attending, mixing)
    fixed = dequantised_bytes(geometry, precisions) + (staging_bytes(geometry, precisions, dtype) if uploads else 0)
    fixed += step_buffer_bytes(geometry, captured_tokens(geometry, context, batch), context, last)
    return kept + step + fixed + LIBRARY_BYTES


def _device_attention_bytes(geometry: Geometry, tokens: int, context: int, attention: str, batch: int) -> int:
    """Return attention's work space without a fused kernel: fp32, for as many heads at once as keys have.

    Most GPUs have a fused kernel, but a plan must hold on those without one, too.
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


def _device_expert_bytes(geometry: Geometry, tokens: int, precision: str) -> int:
    """Return the work space of all tokens at one expert.

    Counted are the results of all pairs, the expert's x, two inner values, and for int8 a matrix in half precision. A
    few tokens multiply a 4-bit expert in place, which takes partial sums.
    """
    hidden, inner = geometry.hidden_size, geometry.intermediate_size
    pairs = tokens * geometry.experts_per_token * hidden
    product = tokens * inner * (HALF_BYTES if precision != "int8" else HALF_BYTES + 4)
    widened = inner * hidden * HALF_BYTES if precision == "int8" else 0
    computing = 2 * tokens * hidden * HALF_BYTES + tokens * inner * HALF_BYTES
    computing += max(widened + tokens * inner * HALF_BYTES, product)
    adding = pairs * 4 + 2 * tokens * hidden * 4
    if precision not in FOUR_BITS:
        return pairs * HALF_BYTES + max(computing, adding)
    summed = inner * HALF_BYTES + hidden * (2 * HALF_BYTES + (down_splits(inner) + 1) * 4)
    in_place = min(tokens, MOST_IN_PLACE) * summed
    return pairs * HALF_BYTES + max(computing, DEQUANTISED_AT_ONCE * DEQUANTISING_BYTES, adding, in_place)
