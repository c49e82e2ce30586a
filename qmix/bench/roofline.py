"""The roofline of a benchmark's workloads: the least to read and compute, and the least time a machine needs for it.

Pure arithmetic; loads no torch. Units are bytes, seconds, and floating-point operations (a multiply-add is two).
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

SHORT_PROMPT = 16  # tokens of prompt in a decode workload, not timed


@dataclass(frozen=True, slots=True)
class Workload:
    """`pp512` is a prompt of 512 tokens up to the first new one, `tg128` 128 decode steps after a short prompt."""

    prompt_tokens: int
    decode_steps: int = 0

    @property
    def name(self) -> str:
        return f"tg{self.decode_steps}" if self.decode_steps else f"pp{self.prompt_tokens}"

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together; the first new token comes from the prompt, before any decode step."""
        return self.prompt_tokens + 1 + self.decode_steps


def workloads(prompts: Sequence[str], new: Sequence[str]) -> list[Workload]:
    """Return the workloads of lists as typed, `512,1024`; 0 omits a kind. Raises UsageError."""
    found = [Workload(count) for count in _counts(arg("prompt_tokens"), prompts)]
    found += [Workload(SHORT_PROMPT, count) for count in _counts(arg("new_tokens"), new)]
    if not found:
        zeros = f"{arg('prompt_tokens')} 0 {arg('new_tokens')} 0"
        raise UsageError(f"{zeros}: nothing to measure; give a number above 0 for one of them")
    return found


def _counts(argument: str, texts: Sequence[str]) -> list[int]:
    counts: dict[int, None] = {}  # without duplicates, in order
    for text in ",".join(texts).split(","):
        if not (text.strip().isascii() and text.strip().isdigit() and len(text.strip()) < 10):
            raise UsageError(f"{argument}: {text!r} is not a number of tokens; write it like 512, or 512,1024")
        counts[int(text)] = None
    return [count for count in counts if count]


@dataclass(frozen=True, slots=True)
class Cost:
    """The least to read from disk and from memory, in bytes, and to compute, in floating-point operations."""

    disk_bytes: float
    memory_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time of a cost, and its bottleneck: "disk", "memory" or "compute"."""

    seconds: float
    by: str


def bound(cost: Cost, memory_read: float, disk_read: float | None, matmul: float) -> Bound:
    """Return the least time of a cost if disk, memory and arithmetic overlap fully: the longest of the three.

    Rates are in bytes/s and FLOP/s; `disk_read` may be None if the cost has no disk bytes.
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
    """Return the cost of one token, the mean over a workload's decode steps, whose routing is `trace`.

    `slots` are numbers of slots by record size in bytes. The arithmetic of a token is left out: it takes less time than
    reading its weights.
    """
    passes = workload.decode_steps
    seen = mean_position(workload.prompt_tokens, passes, layout.geometry.sliding_window)
    weights = _requested_bytes(layout, trace) / passes + dense_read(layout)
    read = least_read_bytes(layout, trace, slots)
    return Cost(read / passes, weights + seen * layout.geometry.kv_bytes_per_token, 0.0)


def prefill_cost(workload: Workload, layout: StoreLayout, trace: Array, slots: Mapping[int, int]) -> Cost:
    """Return the cost of a whole prompt, whose routing is `trace`: a step for each layer of each chunk."""
    chunks = len(trace) // layout.geometry.num_layers
    memory = _requested_bytes(layout, trace) + chunks * dense_read(layout)
    read = least_read_bytes(layout, trace, slots)
    return Cost(read, memory, prefill_flops(layout.geometry, workload.prompt_tokens))


def least_read_bytes(
    layout: StoreLayout, trace: Array, slots: Mapping[int, int], start: Sequence[int] | None = None
) -> int:
    """Return the bytes that Belady's optimum reads: no pool with `slots` by record size reads less.

    Before the first step it holds the best of the records `start`, layer * experts + expert. The default, all records,
    gives the least for any pool content.
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
    """Return the bytes of the records that a trace [steps, k] requests; 0 where it requests none."""
    geometry = layout.geometry
    sizes = [
        [layout.record(layer, expert).nbytes for expert in range(geometry.num_experts)]
        for layer in range(geometry.num_layers)
    ]
    layer = np.arange(len(trace)) % geometry.num_layers
    return np.where(trace >= 0, np.array(sizes, np.int64)[layer[:, None], trace], 0)


def dense_read(layout: StoreLayout) -> int:
    """Return the bytes of dense weights that one pass reads: all of them, but only one row of the embedding table.

    A tied table is also the head, and read whole.
    """
    geometry = layout.geometry
    table = geometry.vocab_size * geometry.hidden_size * HALF_BYTES
    total = sum(info.nbytes for info in layout.dense.tensors.values())
    return total if geometry.tie_embeddings else total - table + geometry.hidden_size * HALF_BYTES


def mean_position(prompt_tokens: int, decode_steps: int, window: int | None = None) -> float:
    """Return the mean number of KV cache positions, at most `window`, that a decode step reads, its own included."""
    seen = (prompt_tokens + step for step in range(1, decode_steps + 1))
    return sum(min(position, window or position) for position in seen) / decode_steps


def prefill_flops(geometry: Geometry, tokens: int) -> int:
    """Return the FLOP of a prompt: projections, router, routed experts, causal attention, the last token's head."""
    hidden, q_rows = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    attention = 2 * hidden * (q_rows + geometry.num_kv_heads * geometry.head_dim)  # q and o, k and v
    experts = geometry.experts_per_token * 3 * hidden * geometry.intermediate_size
    weights = geometry.num_layers * (attention + experts + geometry.num_experts * hidden)
    window = geometry.sliding_window or tokens
    seen = sum(min(position, window) for position in range(1, tokens + 1))
    scores = geometry.num_layers * 2 * q_rows * seen  # queries by keys, and probabilities by values
    return 2 * (weights * tokens + scores + geometry.vocab_size * hidden)
