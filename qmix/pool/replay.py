"""Replay recorded routing through caches: how often an expert is in memory, by policy and number of slots.

A trace is [steps, k] experts: step s is what layer s % layers needs at once, -1 where it needs fewer than k. The
experts of a step take slots at once; when there are too many, the records worth least are evicted, those of the step
itself once it is computed. So a step's own experts never evict each other where there are slots enough for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from qmix.pool.eviction import DECAY, DEFAULT_POLICY, POLICIES
from qmix.pool.stack import Array, stack_depths

STATIC = "static"  # the most used stay for good
BELADY = "belady"  # the best possible
SIZES = 12  # default pool sizes of a curve


@dataclass(frozen=True, slots=True)
class Curve:
    """Requests found in memory for each number of slots, under one policy."""

    policy: str
    slots: tuple[int, ...]
    hits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """Hits of a trace of `requests` for `records` experts in pools of rising size that begin empty.

    A curve for each policy of `qmix.pool.eviction`, for `static`, and for `belady`, the best possible.
    """

    requests: int
    records: int
    curves: tuple[Curve, ...]

    def curve(self, policy: str) -> Curve:
        """Return a policy's curve. Raises KeyError where there is none."""
        return {curve.policy: curve for curve in self.curves}[policy]

    def hit_rate(self, policy: str, slots: int) -> float:
        """Return the share of requests found in memory, interpolated between the sizes that were replayed."""
        curve = self.curve(policy)
        hits = np.interp(slots, (0, *curve.slots), (0, *curve.hits))
        return float(hits) / max(1, self.requests)

    def best(self, slots: int) -> str:
        """Return the engine's policy with the most hits in `slots` slots; of equals, its default."""
        return max(_engine_policies(), key=lambda policy: self.hit_rate(policy, slots))

    def recommended(self) -> str:
        """Return the engine's policy with the most hits over all pool sizes; of equals, its default."""
        return max(_engine_policies(), key=lambda policy: sum(self.curve(policy).hits))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def replay(
    trace: Array,
    layers: int,
    experts: int,
    slots: Sequence[int] | None = None,
    counts: Array | None = None,
    top_k: int | None = None,
) -> Replay:
    """Replay a trace through pools of each size under every policy; sequences simply follow one another.

    `slots` are the sizes, by default twelve from `top_k` to all records. `counts` [layers, experts] is the use by
    which the static policy chooses, by default this trace's own. `top_k` is the number of experts that a token needs
    in a layer, by default the trace's width. Raises ValueError where the trace or a size does not fit the model.
    """
    top_k = top_k or trace.shape[-1]
    records, ends = _flat(trace, layers, experts)
    sizes = _sizes(slots, layers * experts, top_k)
    deepest, walk = sizes[-1], _compiled()
    fade = np.array([DECAY**visits for visits in range(len(trace) // layers + 2)])
    rates, still = _rates(records, ends, experts, top_k / experts), np.empty(0)
    orders = {
        "lru": (np.arange(len(records), dtype=np.float64), still, False),
        "lfu": (rates, fade, False),
        "uses-per-time": (rates, fade, True),
        BELADY: (-_next_uses(records, ends), still, False),
    }
    found = {name: np.cumsum(walk(records, ends, *order, layers, experts, deepest)) for name, order in orders.items()}
    found[STATIC] = np.cumsum(_static_finds(records, layers * experts, counts))
    names = (*POLICIES, STATIC, BELADY)
    curves = (Curve(name, sizes, tuple(int(found[name][size - 1]) for size in sizes)) for name in names)
    return Replay(len(records), layers * experts, tuple(curves))


def belady_hits(trace: Array, layers: int, experts: int, slots: int, start: Sequence[int] = ()) -> int:
    """Return the hits of a cache that knows the future: no cache of this size has more.

    It evicts the record that is needed again furthest ahead, which may be the one just read (L. A. Belady, "A study of
    replacement algorithms for a virtual-storage computer", IBM Systems Journal 5, 1966). `start` are records,
    layer * experts + expert, of which it holds the best before the first step. Compiles nothing, so it takes little
    memory.
    """
    records, ends = _flat(trace, layers, experts)
    if len(start):
        records = np.concatenate([np.asarray(start, np.int64), records])
        ends = np.concatenate([[len(start)], ends + len(start)])
    worth = -_next_uses(records, ends)
    return int(stack_depths(records, ends, worth, np.empty(0), False, layers, experts, slots)[:-1].sum())


def requests(trace: Array) -> int:
    """Return the number of requests in a trace."""
    return int(np.count_nonzero(trace >= 0))


def _engine_policies() -> list[str]:
    return [DEFAULT_POLICY, *(name for name in POLICIES if name != DEFAULT_POLICY)]


@cache
def _compiled() -> Callable[..., Array]:
    from qmix.kernels.cpu.compiled import compiled  # numba, which `belady_hits` does without

    return compiled(stack_depths)


def _flat(trace: Array, layers: int, experts: int) -> tuple[Array, Array]:
    """Return records [R], layer * experts + expert, and the end of each step that requests any."""
    if trace.ndim != 2 or (trace.size and (trace.min() < -1 or trace.max() >= experts)):
        raise ValueError(f"a trace is [steps, k] experts from -1 to {experts - 1}, not {trace.shape}")
    asked, ordered = trace >= 0, np.sort(trace, axis=1)
    if np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)):
        raise ValueError("a step of a trace asks for an expert twice")
    layer = np.arange(len(trace)) % layers
    records = (trace + layer[:, None] * experts)[asked].astype(np.int64)
    counts = asked.sum(axis=1)
    return records, np.cumsum(counts[counts > 0])


def _sizes(slots: Sequence[int] | None, records: int, top_k: int) -> tuple[int, ...]:
    if slots is None:
        slots = [top_k, *(size for part in range(1, SIZES + 1) if (size := round(records * part / SIZES)) > top_k)]
    sizes = tuple(sorted(set(slots)))
    if not sizes or sizes[0] < 1 or sizes[-1] > records:
        raise ValueError(f"pool sizes are from 1 to {records} slots, not {list(slots)}")
    return sizes


def _rates(records: Array, ends: Array, experts: int, prior: float) -> Array:
    """Return the probability of the record's next use that `LeastFrequentlyUsed` estimates after each request [R]."""
    rates, begin = np.empty(len(records)), 0
    visits: dict[int, int] = {}
    last: dict[int, tuple[float, int]] = {}
    asked = records.tolist()
    for end in ends.tolist():
        layer = asked[begin] // experts
        visits[layer] = now = visits.get(layer, 0) + 1
        for i in range(begin, end):
            rate, visit = last.get(asked[i], (prior, 0))
            rates[i] = rate = rate * DECAY ** (now - visit) + 1 - DECAY
            last[asked[i]] = rate, now
        begin = end
    return rates


def _next_uses(records: Array, ends: Array) -> Array:
    """Return the step of the record's next use after each request [R]; infinite after its last."""
    step = np.searchsorted(ends, np.arange(len(records)), side="right")
    order = np.argsort(records, kind="stable")
    following = np.full(len(records), np.inf)
    again = records[order[1:]] == records[order[:-1]]
    following[order[:-1][again]] = step[order[1:][again]]
    return following


def _static_finds(records: Array, size: int, counts: Array | None) -> Array:
    """Return the hits that each further slot adds [size], the most used record first; its first read is no hit."""
    used = np.bincount(records, minlength=size)
    chosen = np.argsort(-(used if counts is None else np.asarray(counts).ravel()), kind="stable")
    return np.maximum(used[chosen] - 1, 0)
