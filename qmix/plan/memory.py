"""Bytes that a run takes, and the chunk sizes that bound them. Pure arithmetic; loads no torch.

Every formula of bytes is here. The engine and the jobs import the chunk sizes, so that a formula and the code that it
describes cannot drift apart. Sizes are in bytes, T is the tokens of a step.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from qmix.checkpoint import Checkpoint
from qmix.checkpoint.safetensors_header import ITEM_BYTES
from qmix.errors import DoesNotFitError, arg
from qmix.geometry import HALF_BYTES, Geometry
from qmix.store.layout import StoreLayout
from qmix.units import format_bytes, size_option

# Chunk sizes that the engine shares.
PREFILL_CHUNK = 512  # tokens of a step; the same for every budget, so that the same prompt gives the same text
MOST_PREFILL = 8192  # tokens of prompts that go through a layer before the next layer
PREFILL_SHARE = 1 / 32  # of the memory for records that their activations may take
MAX_BATCH = PREFILL_CHUNK // 2  # sequences of a step; the other half is for prompts
HEAD_ROWS = 64  # rows through the head at once when known tokens are scored
SHORT_PASS = 32  # tokens of many sequences that layers take as one piece of work, which nothing interrupts

# What a process takes besides tensors.
RESERVE_BYTES = 16 * 2**20  # page tables, the allocator's slack, generated products
RESERVE_SHARE = 0.01
SCORING_SLACK = 2**25  # freed blocks that the allocator keeps
LAYERWISE_SLACK = 2**28  # the same, and the libraries' work space

SERVER_BYTES = 48 * 2**20  # the libraries of a server, its connections, and what it writes to them
REQUESTS_BYTES = 64 * 2**20  # bodies and log-probabilities of all requests together
LINES_BYTES = 32 * 2**20  # the places of a served batch's lines
ANSWER_TOKEN_BYTES = 300  # a token of an answer that grows: its id, its text, its log-probability
STRUCTURED_BYTES = 64 * 2**20  # llguidance's form of a vocabulary of 32,768 tokens (55 MB measured), and its matchers
SAMPLING_BYTES = 40  # a token of the vocabulary: scores, probabilities, and their sorted copies with indices
SLOW_PATH_BYTES = 8 * 2**20  # rows dequantised where no kernel takes a matrix
ROUTING_BYTES = 128  # a token's experts, weights, places and masks


def with_reserve(needed: int) -> int:
    """Return the smallest RAM budget for `needed` bytes."""
    return math.ceil(needed * (1 + RESERVE_SHARE)) + RESERVE_BYTES


def usable_bytes(budget: int) -> int:
    """Return what a RAM budget leaves after the reserve."""
    return int((budget - RESERVE_BYTES) / (1 + RESERVE_SHARE))


def step_tokens(context: int, batch: int) -> int:
    """Return the most tokens of one step of `batch` sequences of `context` tokens each."""
    return min(max(PREFILL_CHUNK, batch), context * batch)


def is_short(tokens: int, longest: int) -> bool:
    """Return whether a pass has few tokens, and whether the work space for a chunk holds the sums of their attention,
    if the longest sequence has `longest` positions.
    """
    return tokens <= SHORT_PASS and tokens * longest <= PREFILL_CHUNK * PREFILL_CHUNK


def layer_kv_bytes(geometry: Geometry, tokens: int) -> int:
    """Return the bytes of one layer's keys and values of `tokens` tokens."""
    return geometry.kv_bytes_per_token // geometry.num_layers * tokens


def sampling_bytes(geometry: Geometry, batch: int) -> int:
    """Return the work space of choosing the next token of `batch` sequences at once."""
    return geometry.vocab_size * SAMPLING_BYTES * batch


def bias_bytes(geometry: Geometry, sequences: int) -> int:
    """Return the bytes of the biases that `sequences` keep while they run: fp32, for the whole vocabulary."""
    return geometry.vocab_size * 4 * min(sequences, MAX_BATCH)


def work_bytes(geometry: Geometry, context: int, attention: str, batch: int = 1) -> int:
    """Return the most that one step on the CPU allocates besides weights and cache: a prefill chunk's activations.

    Counted from transformers' Mixtral as it is: RMSNorm works in fp32, rotary makes four tensors the size of q,
    the mask is [1, 1, T, context] and is turned into numbers to add, eager attention repeats keys and values for
    every query head and keeps scores in half and twice in fp32.
    """
    tokens = step_tokens(context, batch)
    hidden, q_rows = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    kept = tokens * hidden * HALF_BYTES * 3  # residual, normed input, output
    norm = tokens * hidden * 4 * 3
    rotary = tokens * q_rows * HALF_BYTES * 6
    mask = tokens * context * (1 + HALF_BYTES)
    if attention == "eager":
        repeated = 2 * context * q_rows * HALF_BYTES * batch
        scores = geometry.num_heads * tokens * context * (HALF_BYTES + 4 + 4) + repeated  # softmax in fp32
    else:
        scores = tokens * q_rows * (HALF_BYTES + 4)
    step = kept + max(norm, rotary + mask + scores, expert_work_bytes(geometry, context, batch))
    logits = sampling_bytes(geometry, 1) + geometry.vocab_size * HALF_BYTES * batch  # one sequence is sorted at a time
    prefetch = geometry.num_layers * hidden * (geometry.num_experts * 4 + HALF_BYTES)  # gates, once more in fp32
    return max(step, kept + logits) + prefetch


def prefill_bytes(geometry: Geometry, context: int, tokens: int, batch: int = 1) -> int:
    """Return what `tokens` of prompts that go through each layer together allocate besides one chunk's work.

    Their residual stream, its normed copy, every chosen expert's output, the sums in chunks and as a whole, their
    routing, and for a single sequence the chunks' masks. A single chunk goes through the layers as any step does.
    """
    rows = (4 + geometry.experts_per_token) * geometry.hidden_size * HALF_BYTES
    masks = context * HALF_BYTES if batch == 1 else 0
    return tokens * (rows + ROUTING_BYTES + masks) if tokens > PREFILL_CHUNK else 0


def prefill_tokens(geometry: Geometry, context: int, room: int, batch: int = 1) -> int:
    """Return how many tokens of the prompts of `batch` sequences can go through each layer together in `room` bytes:
    whole chunks, at least one.

    Each expert is read once for all of them.
    """
    chunks = min(MOST_PREFILL // PREFILL_CHUNK, -(-context * batch // PREFILL_CHUNK))
    fitting = (count * PREFILL_CHUNK for count in range(chunks, 0, -1))
    return next((some for some in fitting if prefill_bytes(geometry, context, some, batch) <= room), PREFILL_CHUNK)


def expert_work_bytes(geometry: Geometry, context: int, batch: int = 1) -> int:
    """Return the most that a step's experts allocate on the CPU when all else is computed elsewhere."""
    tokens = step_tokens(context, batch)
    hidden = geometry.hidden_size
    routed = tokens * geometry.experts_per_token * hidden * (HALF_BYTES + 4)
    expert = tokens * geometry.intermediate_size * HALF_BYTES * 3 + tokens * hidden * HALF_BYTES * 2
    return routed + expert + SLOW_PATH_BYTES


def scoring_token_bytes(geometry: Geometry) -> int:
    """Return the bytes of each token of a scoring pass.

    Counted are the stream, the normed stream, what the token's experts gave, their sum and a copy of it.
    """
    return geometry.hidden_size * HALF_BYTES * (4 + geometry.experts_per_token) + ROUTING_BYTES


def scoring_fixed_bytes(layout: StoreLayout, longest: int) -> int:
    """Return the bytes of a scoring pass besides its tokens and slots, for sequences of at most `longest` tokens.

    Counted are dense weights, one layer's keys and values of one sequence, and the work space of a chunk of rows.
    """
    geometry = layout.geometry
    head = HEAD_ROWS * geometry.vocab_size * (HALF_BYTES + 4 + 4)
    work = work_bytes(geometry, max(longest, PREFILL_CHUNK), "sdpa")
    return layout.dense.size + layer_kv_bytes(geometry, longest) + head + work + SCORING_SLACK


def serving_bytes(geometry: Geometry, tokens: int, batch: int) -> int:
    """Return what a server takes besides its model, for `batch` requests of `tokens` tokens together.

    Counted are its libraries, requests, a batch's lines, answers, grammars and biases, and the head's work where
    prompts are scored.
    """
    head = HEAD_ROWS * geometry.vocab_size * (HALF_BYTES + 4 + 4)
    options = STRUCTURED_BYTES + bias_bytes(geometry, batch)
    return SERVER_BYTES + REQUESTS_BYTES + LINES_BYTES + options + tokens * ANSWER_TOKEN_BYTES + head


def layerwise_bytes(checkpoint: Checkpoint, tokens: int, window: int, held: Collection[int]) -> int:
    """Return the bytes of a layer-wise pass of `tokens` tokens in windows of at most `window`, besides Python's own.

    `held` has an entry for each variant: the bytes of the expert that it computes with.
    """
    geometry = checkpoint.geometry
    hidden, inner = geometry.hidden_size, geometry.intermediate_size
    expert = 3 * hidden * inner * 2
    embeddings = geometry.vocab_size * hidden * 2
    attention = (geometry.num_heads + geometry.num_kv_heads) * geometry.head_dim * hidden * 2 * 2
    heads = (2 * geometry.num_heads + 2 * geometry.num_kv_heads) * geometry.head_dim
    states = tokens * len(held) * hidden * (2 + 2 + 4)  # the stream, its normed copy, the experts' sum in fp32
    work = max(
        window * (6 * hidden + 3 * heads) * 2,
        PREFILL_CHUNK * (4 * inner + 4 * hidden) * 4,
        PREFILL_CHUNK * geometry.vocab_size * 4 * (2 + 2 * len(held)),
    )
    dtypes = {weight.dtype for weight in checkpoint.weights.values()}
    largest = max(embeddings, 2 * hidden * inner) // 2  # weights of one tensor
    rounded = largest * max(map(ITEM_BYTES.__getitem__, dtypes)) if len(dtypes) > 1 or "F32" in dtypes else 0
    weights = rounded + max(embeddings, attention + 2 * expert + sum(held))
    return LAYERWISE_SLACK + states + work + weights


def calibration_bytes(geometry: Geometry, tokens: int, samples: int, depth: int) -> int:
    """Return the bytes that calibration's observers take besides the layer-wise pass of `tokens` tokens.

    `samples` are the tokens measured of an expert, `depth` the layers ahead that routing is guessed for.
    """
    hidden, inner, experts = geometry.hidden_size, geometry.intermediate_size, geometry.num_experts
    gates = geometry.num_layers * experts * hidden * (2 + 4)
    chosen = geometry.experts_per_token * 2
    routing = tokens * (chosen * (geometry.num_layers + depth * (depth + 1) // 2) + experts * 3 * 8)
    sampled = samples * (experts * hidden * 2 + 4 * inner * 2 + 4 * hidden * 4)
    return gates + routing + sampled + 2 * hidden * inner  # one matrix after its round trip through a precision


def check_memory(needed: int, budget: int, tokens: int) -> None:
    """Raise DoesNotFitError, with the smallest budget that works, where `tokens` tokens need more than `budget`."""
    if needed > budget:
        raise DoesNotFitError(
            f"{tokens} tokens take {format_bytes(needed)} of memory, the budget is {format_bytes(budget)}; "
            f"take fewer {arg('tokens')}, or {arg('ram', size_option(needed))}",
            needed,
        )
