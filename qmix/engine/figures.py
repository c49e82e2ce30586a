"""A running model in figures for people: where experts lie, how fast tokens come, what limits them now.

The thread that computes only adds to counters. A Watch reads them from another thread, without a lock: a figure may be
one token old. While nobody watches, nothing else is done. Loads no torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from qmix.machine.found import own_memory

if TYPE_CHECKING:
    from qmix.engine.compute import ComputeThread
    from qmix.plan import Plan
    from qmix.pool.experts import ExpertPool

RECENT = 4.0  # seconds after which something counts e times less
NOW = 1.0  # the same for what limits now
GPU, RAM, DISK = "gpu", "ram", "disk"
IDLE, ON_DISK, EXPERTS = "waiting for requests", "disk", "experts on the CPU"
REST_CPU, REST_GPU = "attention and the rest", "GPU"


class Timed(NamedTuple):
    """Tokens and the seconds that they took; replaced as a whole, so that a reader never sees half of a change."""

    tokens: int = 0
    seconds: float = 0.0

    def plus(self, tokens: int, seconds: float) -> Timed:
        return Timed(self.tokens + tokens, self.seconds + seconds)


NOTHING = Timed()


@dataclass(slots=True)
class Work:
    """The work of a runner so far: passes and the tokens in them, and the tokens of answers that have begun.

    `reused_tokens` of the prompts' were not computed again. `prefill` and `decode` are tokens of prompts and tokens
    after them, with the time of the passes that had some. `prompt` is the number of prompt tokens in the
    pass under way.
    """

    passes: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0
    prefill: Timed = NOTHING
    decode: Timed = NOTHING
    prompt: int = 0

    def begin(self, prompt: int, reused: int) -> None:
        """Count an answer that begins: `prompt` tokens, of which `reused` are not computed again."""
        self.prompt_tokens += prompt
        self.reused_tokens += reused
        self.prompt = prompt - reused

    def step(self, tokens: int, seconds: float) -> None:
        """Count a step of one sequence that chose `tokens` tokens: the first one ends its prompt."""
        if self.prompt:
            self.end_pass(self.prompt, 0, seconds)
        else:
            self.end_pass(tokens, tokens, seconds)
        self.new_tokens += tokens

    def end_pass(self, tokens: int, continued: int, seconds: float) -> None:
        """Count a pass of `tokens` tokens, of which as many as were `continued` sequences were no prompt's."""
        self.passes += 1
        self.tokens += tokens
        if continued:
            self.decode = self.decode.plus(continued, seconds)
        if tokens > continued:
            self.prefill = self.prefill.plus(tokens - continued, seconds)
        self.prompt = 0


class Watched(Protocol):
    """A runner."""

    plan: Plan
    pool: ExpertPool
    thread: ComputeThread
    work: Work

    def requests(self) -> Requests:
        """Return how many requests it answers."""


class Requests(NamedTuple):
    """Running requests, waiting requests, and places."""

    running: int = 1
    waiting: int = 0
    places: int = 1


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of main memory or of a GPU that are in use, and their ceiling."""

    name: str
    used: int
    budget: int


@dataclass(frozen=True, slots=True)
class Figures:
    """A snapshot. Rates and shares are of the last seconds; `bytes_read` is of the whole run.

    `tiers` [layer][expert] says where each record lies: "gpu:0", "ram" or "disk". `use` and `hits` [layer][expert]
    count requests of the last seconds and those found in memory; captured steps on a GPU do not count its residents.
    `prefill` and `decode` are tokens/s, of the last work of each kind. `prompt` tokens are being read, 0 for none, and
    `layer` is the last that was requested. `limits` are the parts of the time, largest first: the first limits now.
    """

    seconds: float
    tiers: tuple[tuple[str, ...], ...]
    use: tuple[tuple[float, ...], ...]
    hits: tuple[tuple[float, ...], ...]
    layer: int
    prompt: int
    prefill: float
    decode: float
    new_tokens: int
    read_rate: float
    bytes_read: int
    hit_rate: float
    memory: tuple[Memory, ...]
    requests: Requests
    limits: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the figures for a page: a string of letters for each layer's tiers, whole numbers for counts."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        fields["tiers"] = ["".join(letter(tier) for tier in row) for row in self.tiers]
        fields |= {
            name: [[round(count, 1) for count in row] for row in getattr(self, name)] for name in ("use", "hits")
        }
        return fields | {"requests": self.requests._asdict()}


def letter(tier: str) -> str:
    """Return a tier as one letter: r for main memory, d for the disk, a digit for a GPU."""
    return tier[0] if tier in (RAM, DISK) else tier.rpartition(":")[2][-1]


class _Recent:
    """Sums in which the last `span` seconds count most."""

    def __init__(self, first: npt.NDArray[np.float64], span: float) -> None:
        self._last, self._span, self.sums = first, span, np.zeros_like(first)

    def add(self, now: npt.NDArray[np.float64], since: float) -> npt.NDArray[np.float64]:
        """Take counts as they are now, `since` seconds after the last ones, and return the sums.

        Of a longer time in which nobody looked, only `span` seconds' share is taken.
        """
        share = min(1.0, self._span / since) if since > 0 else 1.0
        self.sums = self.sums * math.exp(-since / self._span) + share * np.maximum(now - self._last, 0.0)
        self._last = now
        return self.sums


class Watch:
    """Takes figures of a runner, for one thread. `requests` says how many there are where others wait outside of it."""

    def __init__(
        self,
        runner: Watched,
        requests: Callable[[], Requests] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner, self._requests, self._clock = runner, requests or runner.requests, clock
        self._placement = runner.plan.placement
        self._begun = self._now = clock()
        self._counts = _Recent(self._read_counts(), RECENT)
        self._times, self._limiting = _Recent(self._read_times(), RECENT), _Recent(self._read_times(), NOW)
        self._rates = {"prefill": 0.0, "decode": 0.0}

    def figures(self) -> Figures:
        """Return the figures of now."""
        runner, now = self._runner, self._clock()
        since, self._now = now - self._now, now
        asked, missed = self._counts.add(self._read_counts(), since)
        read = self._read_times()
        times, limiting = self._times.add(read, since), self._limiting.add(read, since)
        wall, nbytes = times[0], times[4]
        for name, (tokens, seconds) in zip(self._rates, times[5:].reshape(2, 2), strict=True):
            if seconds > 1e-9:
                self._rates[name] = float(tokens / seconds)
        total, pool, requests = asked.sum(), runner.pool, self._requests()
        return Figures(
            seconds=now - self._begun,
            tiers=self._tiers(),
            use=_rows(asked),
            hits=_rows(np.maximum(asked - missed, 0.0)),
            layer=pool.layer,
            prompt=runner.work.prompt,
            **self._rates,
            new_tokens=runner.work.new_tokens,
            read_rate=float(nbytes / wall) if wall > 0 else 0.0,
            bytes_read=pool.counters.bytes_read,
            hit_rate=float(1 - missed.sum() / total) if total > 1e-6 else pool.counters.hit_rate,
            memory=self._memory(),
            requests=requests,
            limits=self._limits(*limiting[:4]),
        )

    def _read_counts(self) -> npt.NDArray[np.float64]:
        counts = self._runner.pool.by_expert
        return np.array([counts.asked, counts.missed], np.float64)  # [2, L, E]

    def _read_times(self) -> npt.NDArray[np.float64]:
        pool, work = self._runner.pool, self._runner.work
        times = (self._now, self._runner.thread.busy, pool.waited, pool.computed, pool.counters.bytes_read)
        return np.array([*times, *work.prefill, *work.decode], np.float64)

    def _tiers(self) -> tuple[tuple[str, ...], ...]:
        """Return where records lie now: those outside of the pool on the GPU that the plan names for their layer."""
        held, elsewhere = self._runner.pool.held(), self._runner.pool.elsewhere

        def tiers(layer: int, row: Sequence[str]) -> Iterator[str]:
            gpu = next((tier for tier in row if tier not in (RAM, DISK)), DISK)
            for expert in range(len(row)):
                key = layer, expert
                yield gpu if key in elsewhere else RAM if key in held else DISK

        return tuple(tuple(tiers(layer, row)) for layer, row in enumerate(self._placement))

    def _memory(self) -> tuple[Memory, ...]:
        plan = self._runner.plan
        found = [Memory("RAM", own_memory(), plan.ram)]
        if plan.devices:
            from torch import cuda

            for index, device in enumerate(plan.devices):
                found.append(Memory(device.name, cuda.memory_allocated(index) + device.cuda, device.budget))
        return tuple(found)

    def _limits(self, wall: float, busy: float, waited: float, computed: float) -> tuple[tuple[str, float], ...]:
        """Return the parts of the last seconds. With GPUs, products on the CPU are those of experts outside of them."""
        rest = REST_GPU if self._runner.plan.devices else REST_CPU
        parts = {
            IDLE: wall - busy,
            ON_DISK: waited,
            EXPERTS: computed,
            rest: busy - waited - computed,
        }
        seconds = {name: max(0.0, float(part)) for name, part in parts.items()}
        whole = sum(seconds.values()) or 1.0
        return tuple(sorted(((name, part / whole) for name, part in seconds.items()), key=lambda part: -part[1]))


def _rows(counts: npt.NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, counts.tolist()))
