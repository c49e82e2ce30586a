"""What a benchmark's workloads must at least read and compute, and how soon a machine could do that.

Pure arithmetic; loads no torch. Bytes, floating-point operations (a multiplication and an addition are two), seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from calibration.replay import Trace, belady_hits, requests
from qmix.errors import UsageError
from qmix.eviction import Key
from qmix.geometry import HALF_BYTES, Geometry
from qmix.layout import StoreLayout

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


def workloads(prompts: Collection[str], new: Collection[str]) -> list[Workload]:
    """From lists as typed, `512,1024`; 0 leaves a kind out. Raises UsageError."""
    found = [Workload(count) for count in _counts("--prompt-tokens", prompts)]
    found += [Workload(SHORT_PROMPT, count) for count in _counts("--new-tokens", new)]
    if not found:
        raise UsageError("--prompt-tokens 0 --new-tokens 0: leave nothing to measure; give one of them")
    return found


def _counts(option: str, texts: Collection[str]) -> list[int]:
    counts: dict[int, None] = {}  # each once, in the order given
    for text in ",".join(texts).split(","):
        if not (text.strip().isascii() and text.strip().isdigit() and len(text.strip()) < 10):
            raise UsageError(f"{option}: {text!r} is not a number of tokens; write it like 512, or 512,1024")
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


def decode_cost(workload: Workload, layout: StoreLayout, steps: Trace, slots: Mapping[int, int]) -> Cost:
    """Of one token, the mean over a workload's decode steps, of which `steps` is the routing.

    `slots` says how many by the bytes of their records. A token's arithmetic is left out: it takes less time than
    reading the weights that it is done with.
    """
    passes = workload.decode_steps
    seen = mean_position(workload.prompt_tokens, passes, layout.geometry.sliding_window)
    weights = _requested_bytes(layout, steps) / passes + dense_read(layout)
    read = least_read_bytes(layout, steps, slots, layout.experts)
    return Cost(read / passes, weights + seen * layout.geometry.kv_bytes_per_token, 0.0)


def prefill_cost(workload: Workload, layout: StoreLayout, steps: Trace, slots: Mapping[int, int]) -> Cost:
    """Of a whole prompt, of which `steps` is the routing: a step for each layer of each chunk."""
    chunks = len(steps) / layout.geometry.num_layers
    memory = _requested_bytes(layout, steps) + chunks * dense_read(layout)
    read = least_read_bytes(layout, steps, slots, layout.experts)
    return Cost(read, memory, prefill_flops(layout.geometry, workload.prompt_tokens))


def least_reads(steps: Trace, slots: int, start: Collection[Key]) -> int:
    """Records that any pool of so many slots must read in these steps: what Belady's optimum reads.

    `start` is what is in memory before the first step. When more is given than there are slots, the best choice of it
    is; so with every record of the model, the count is the least whatever was in memory before.
    """
    return requests(steps) - belady_hits([list(start), *steps], slots)


def least_read_bytes(layout: StoreLayout, steps: Trace, slots: Mapping[int, int], start: Collection[Key]) -> int:
    """Bytes that any pool with so many slots for records of each size must read; records of a size have theirs."""

    def only(keys: Collection[Key], nbytes: int) -> list[Key]:
        return [key for key in keys if layout.record(*key).nbytes == nbytes]

    return sum(
        nbytes * least_reads([only(step, nbytes) for step in steps], count, only(start, nbytes))
        for nbytes, count in slots.items()
    )


def _requested_bytes(layout: StoreLayout, steps: Trace) -> int:
    return sum(layout.record(*key).nbytes for step in steps for key in step)


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
