"""The roofline of a benchmark's workloads: the least to read and compute, and the least time a machine needs for it.

Pure arithmetic; loads no torch. Units are bytes, seconds, and floating-point operations (a multiply-add is two).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qmix.errors import UsageError, arg
from qmix.geometry import EMBEDDINGS, HALF_BYTES, HEAD, Geometry
from qmix.plan import Plan
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
    """The least to read from disk, from main memory and from GPUs' memory, in bytes, and the FLOP to compute."""

    disk_bytes: float
    memory_bytes: float
    flops: float
    gpu_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Bound:
    """The least time of a cost, and its bottleneck: "disk", "memory", "GPU memory" or "compute"."""

    seconds: float
    by: str


@dataclass(frozen=True, slots=True)
class GpuRates:
    """The sums over all GPUs of bytes/s of their memory, bytes/s of the links to them, and FLOP/s."""

    memory: float = 0.0
    link: float = 0.0
    matmul: float = 0.0


NO_GPU = GpuRates()


def bound(cost: Cost, memory_read: float, disk_read: float | None, matmul: float, gpus: GpuRates = NO_GPU) -> Bound:
    """Return the least time of a cost if disk, memory, GPUs and arithmetic overlap fully: the longest of them.

    Rates are in bytes/s and FLOP/s; `disk_read` may be None if the cost has no disk bytes. What lies in main memory may
    be read by the CPU and over the links at once, and any processor may do the arithmetic, so that no run is faster.
    """
    times = {
        "disk": cost.disk_bytes / disk_read if disk_read else 0.0,
        "memory": cost.memory_bytes / (memory_read + gpus.link),
        "GPU memory": cost.gpu_bytes / gpus.memory if gpus.memory else 0.0,
        "compute": cost.flops / (matmul + gpus.matmul),
    }
    assert disk_read or not cost.disk_bytes
    by = max(times, key=lambda name: times[name])
    return Bound(times[by], by)


@dataclass(frozen=True, slots=True)
class OnGpus:
    """A plan's GPUs, by layer: whether the layer is there, and the least bytes of its residents' records."""

    layers: tuple[bool, ...]
    residents: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, layout: StoreLayout) -> OnGpus | None:
        """Return what lies on the GPUs of a plan; None without any."""
        if not plan.devices:
            return None
        homes = tuple(home != "cpu" for home in plan.layer_devices)
        least = [
            min((layout.record(layer, expert).nbytes for expert, where in enumerate(row) if ":" in where), default=0)
            for layer, row in enumerate(plan.placement)
        ]
        return cls(homes, tuple(least))

    def resident_bytes(self, trace: Array, passes: int, top_k: int) -> int:
        """Return the least bytes of residents that `passes` passes read.

        Each token uses `top_k` experts of a layer; those that the host was not asked for, by the trace, are residents.
        """
        asked = [0] * len(self.layers)
        for row, experts in enumerate((trace >= 0).sum(axis=1).tolist()):
            asked[row % len(asked)] += experts
        uses = (max(0, passes * top_k - count) for count in asked)
        return sum(use * nbytes for use, nbytes in zip(uses, self.residents, strict=True))


def decode_cost(
    workload: Workload, layout: StoreLayout, trace: Array, slots: Mapping[int, int], gpus: OnGpus | None = None
) -> Cost:
    """Return the cost of one token, the mean over a workload's decode steps, whose routing is `trace`.

    `slots` are numbers of slots by record size in bytes. The arithmetic of a token is left out: it takes less time than
    reading its weights.
    """
    passes = workload.decode_steps
    seen = mean_position(workload.prompt_tokens, passes, layout.geometry.sliding_window)
    read, host, device = _bytes_of(layout, trace, slots, gpus, passes, seen)
    return Cost(read / passes, host / passes, 0.0, device / passes)


def prefill_cost(
    workload: Workload, layout: StoreLayout, trace: Array, slots: Mapping[int, int], gpus: OnGpus | None = None
) -> Cost:
    """Return the cost of a whole prompt, whose routing is `trace`: a step for each layer of each chunk."""
    chunks = len(trace) // layout.geometry.num_layers if gpus is None else 1
    read, host, device = _bytes_of(layout, trace, slots, gpus, chunks, 0.0)
    return Cost(read, host, prefill_flops(layout.geometry, workload.prompt_tokens), device)


def _bytes_of(
    layout: StoreLayout, trace: Array, slots: Mapping[int, int], gpus: OnGpus | None, passes: int, seen: float
) -> tuple[float, float, float]:
    """Return the bytes that passes read of the disk, of main memory and of GPUs, `seen` positions of the cache each."""
    read, asked = least_read_bytes(layout, trace, slots), _requested_bytes(layout, trace)
    dense = dense_read(layout) + seen * layout.geometry.kv_bytes_per_token
    if gpus is None:
        return read, asked + passes * dense, 0.0
    there = dense_read(layout, gpus.layers) + seen * layout.geometry.kv_bytes_per_token * _share(gpus.layers)
    residents = gpus.resident_bytes(trace, passes, layout.geometry.experts_per_token)
    return read, asked + passes * (dense - there), passes * there + residents


def _share(layers: Sequence[bool]) -> float:
    return sum(layers) / len(layers)


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


def dense_read(layout: StoreLayout, layers: Sequence[bool] | None = None) -> int:
    """Return the bytes of dense weights that one pass reads: all of them, but only one row of the embedding table.

    A tied table is also the head, and read whole. With `layers` only those of the layers that are true, the row with
    the first and the head with the last.
    """
    geometry, tensors = layout.geometry, layout.dense.tensors
    row = geometry.hidden_size * HALF_BYTES
    head = tensors[EMBEDDINGS if geometry.tie_embeddings else HEAD].nbytes + tensors["model.norm.weight"].nbytes
    a_layer = sum(info.nbytes for name, info in tensors.items() if name.startswith("model.layers.0."))
    chosen = [True] * geometry.num_layers if layers is None else layers
    first = 0 if geometry.tie_embeddings else row
    return a_layer * sum(chosen) + first * chosen[0] + head * chosen[-1]


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
