"""What a benchmark's workloads must at least read and compute, and how soon a machine could do that.

Pure arithmetic; loads no torch. Bytes, floating-point operations (a multiplication and an addition are two), seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qmix.errors import UsageError, arg
from qmix.geometry import HALF_BYTES, Geometry
from qmix.pool.replay import belady_hits, requests
from qmix.pool.stack import Array
from qmix.store.layout import StoreLayout

SHORT_PROMPT = 16  # tokens before those that a decode workload times


@dataclass(frozen=True, slots=True)
class Workload:
    """`pp512`: a prompt of 512 tokens until its first new one. `tg128`: 128 decode steps after a short prompt."""

    prompt_tokens: int
    decode_steps: int = 0

    @property
    def name(self) -> str:
        return f"tg{self.decode_steps}" if self.decode_steps else f"pp{self.prompt_tokens}"

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together; the prompt alone gives the first new one."""
        return self.prompt_tokens + 1 + self.decode_steps


def workloads(prompts: Sequence[str], new: Sequence[str]) -> list[Workload]:
    """From lists as typed, `512,1024`; 0 leaves a kind out. Raises UsageError."""
    found = [Workload(count) for count in _counts(arg("prompt_tokens"), prompts)]
    found += [Workload(SHORT_PROMPT, count) for count in _counts(arg("new_tokens"), new)]
    if not found:
        raise UsageError(f"{arg('prompt_tokens')} 0 {arg('new_tokens')} 0: leave nothing to measure; give one of them")
    return found


def _counts(argument: str, texts: Sequence[str]) -> list[int]:
    counts: dict[int, None] = {}  # each once, in the order given
    for text in ",".join(texts).split(","):
        if not (text.strip().isascii() and text.strip().isdigit() and len(text.strip()) < 10):
            raise UsageError(f"{argument}: {text!r} is not a number of tokens; write it like 512, or 512,1024")
        counts[int(text)] = None
    return [count for count in counts if count]


@dataclass(frozen=True, slots=True)
class Cost:
    """The least to be read from disk and from memory, in bytes, and to be computed, in floating-point operations."""

    disk_bytes: float
    memory_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time that a cost takes, and what sets it: "disk", "memory" or "compute"."""

    seconds: float
    by: str


def bound(cost: Cost, memory_read: float, disk_read: float | None, matmul: float) -> Bound:
    """The least seconds of a cost, where disk, memory and arithmetic wait for nothing: the longest of the three.

    Rates in bytes/s and FLOP/s; `disk_read` may be None where nothing is read from disk.
    """
    times = {
        "disk": cost.disk_bytes / disk_read if disk_read else 0.0,
        "memory": cost.memory_bytes / memory_read,
        "compute": cost.flops / matmul,
    }
    assert disk_read or not cost.disk_bytes
    by = max(times, key=lambda name: times[name])
    return Bound(times[by], by)


def decode_cost(workload: Workload, layout: StoreLayout, trace: Array, slots: Mapping[int, int]) -> Cost:
    """Of one token, the mean over a workload's decode steps, of which `trace` is the routing.

    `slots` says how many by the bytes of their records. A token's arithmetic is left out: it takes less time than
    reading the weights that it is done with.
    """
    passes = workload.decode_steps
    seen = mean_position(workload.prompt_tokens, passes, layout.geometry.sliding_window)
    weights = _requested_bytes(layout, trace) / passes + dense_read(layout)
    read = least_read_bytes(layout, trace, slots)
    return Cost(read / passes, weights + seen * layout.geometry.kv_bytes_per_token, 0.0)


def prefill_cost(workload: Workload, layout: StoreLayout, trace: Array, slots: Mapping[int, int]) -> Cost:
    """Of a whole prompt, of which `trace` is the routing: a step for each layer of each chunk."""
    chunks = len(trace) // layout.geometry.num_layers
    memory = _requested_bytes(layout, trace) + chunks * dense_read(layout)
    read = least_read_bytes(layout, trace, slots)
    return Cost(read, memory, prefill_flops(layout.geometry, workload.prompt_tokens))


def least_read_bytes(
    layout: StoreLayout, trace: Array, slots: Mapping[int, int], start: Sequence[int] | None = None
) -> int:
    """Bytes that any pool with so many slots for records of each size must read: what Belady's optimum reads.

    `start` are the records, layer * experts + expert, of which it holds the best before the first step; with all of
    them, unless others are given, the count is the least whatever was in memory before.
    """
    layers, experts = layout.geometry.num_layers, layout.geometry.num_experts
    sizes, total = _sizes(layout, trace), 0
    for nbytes, count in slots.items():
        only = np.where(sizes == nbytes, trace, -1)  # records of a size have their own slots
        held = range(layers * experts) if start is None else start
        total += nbytes * (requests(only) - belady_hits(only, layers, experts, count, held))
    return total


def _requested_bytes(layout: StoreLayout, trace: Array) -> int:
    return int(_sizes(layout, trace).sum())


def _sizes(layout: StoreLayout, trace: Array) -> Array:
    """Bytes of the records that a trace [steps, k] asks for; 0 where it asks for none."""
    geometry = layout.geometry
    sizes = [
        [layout.record(layer, expert).nbytes for expert in range(geometry.num_experts)]
        for layer in range(geometry.num_layers)
    ]
    layer = np.arange(len(trace)) % geometry.num_layers
    return np.where(trace >= 0, np.array(sizes, np.int64)[layer[:, None], trace], 0)


def dense_read(layout: StoreLayout) -> int:
    """Bytes of dense weights that one pass reads: all of them, but of the embedding table one row.

    Tied, the table is the head as well, and read whole.
    """
    geometry = layout.geometry
    table = geometry.vocab_size * geometry.hidden_size * HALF_BYTES
    total = sum(info.nbytes for info in layout.dense.tensors.values())
    return total if geometry.tie_embeddings else total - table + geometry.hidden_size * HALF_BYTES


def mean_position(prompt_tokens: int, decode_steps: int, window: int | None = None) -> float:
    """Positions of the KV cache that a decode step reads, its own included, on average; `window` of them at most."""
    seen = (prompt_tokens + step for step in range(1, decode_steps + 1))
    return sum(min(position, window or position) for position in seen) / decode_steps


def prefill_flops(geometry: Geometry, tokens: int) -> int:
    """Of a prompt: projections, router, the experts routed to, causal attention, and the head for the last token."""
    hidden, q_rows = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    attention = 2 * hidden * (q_rows + geometry.num_kv_heads * geometry.head_dim)  # q and o, k and v
    experts = geometry.experts_per_token * 3 * hidden * geometry.intermediate_size
    weights = geometry.num_layers * (attention + experts + geometry.num_experts * hidden)
    window = geometry.sliding_window or tokens
    seen = sum(min(position, window) for position in range(1, tokens + 1))
    scores = geometry.num_layers * 2 * q_rows * seen  # queries by keys, and probabilities by values
    return 2 * (weights * tokens + scores + geometry.vocab_size * hidden)
