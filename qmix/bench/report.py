"""The report of a benchmark: samples, rows of a table, and conditions. Loads no torch."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qmix.bench.roofline import Bound, Cost, Workload
from qmix.plan import Plan

if TYPE_CHECKING:  # it imports torch
    from qmix.machine.ceilings import Ceilings


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition. `bytes_read` and the hit rate are those of the timed part.

    `cost` is the least cost of that part: of the whole prompt, or of one token.
    """

    ttft_s: float
    tpot_s: float | None
    rate: float
    hit_rate: float
    bytes_read: int
    cost: Cost

    @property
    def seconds(self) -> float:
        """Seconds that `cost` took: to the first token of a prompt, or for each token after it."""
        return self.ttft_s if self.tpot_s is None else self.tpot_s


@dataclass(frozen=True, slots=True)
class Row:
    """A workload's samples and bounds. Rates are in tokens/s, times in seconds; all are means over the repetitions."""

    workload: Workload
    samples: tuple[Sample, ...]
    bounds: tuple[Bound, ...]

    @property
    def tokens(self) -> int:
        """Tokens timed in one repetition."""
        return self.workload.decode_steps or self.workload.prompt_tokens

    @property
    def rate(self) -> float:
        return self._mean("rate")

    @property
    def rate_sd(self) -> float:
        """Standard deviation over the repetitions; 0 for a single one."""
        return statistics.stdev(sample.rate for sample in self.samples) if len(self.samples) > 1 else 0.0

    @property
    def ttft_s(self) -> float:
        return self._mean("ttft_s")

    @property
    def tpot_s(self) -> float | None:
        return self._mean("tpot_s") if self.workload.decode_steps else None

    @property
    def hit_rate(self) -> float:
        return self._mean("hit_rate")

    @property
    def bytes_per_token(self) -> float:
        return self._mean("bytes_read") / self.tokens

    @property
    def least_bytes_per_token(self) -> float:
        """`bytes_per_token` of a pool that knows the future."""
        unit = 1 if self.workload.decode_steps else self.tokens
        return statistics.mean(sample.cost.disk_bytes for sample in self.samples) / unit

    @property
    def bound_rate(self) -> float:
        """Tokens/s if every repetition took the least time."""
        unit = 1 if self.workload.decode_steps else self.tokens
        return unit / statistics.mean(bound.seconds for bound in self.bounds)

    @property
    def bound_by(self) -> str:
        return statistics.mode(bound.by for bound in self.bounds)

    @property
    def share_of_bound(self) -> float:
        """The least time over the time taken."""
        shares = [bound.seconds / sample.seconds for bound, sample in zip(self.bounds, self.samples, strict=True)]
        return statistics.mean(shares)

    def _mean(self, field: str) -> float:
        return statistics.mean(getattr(sample, field) for sample in self.samples)

    def to_json(self) -> dict[str, Any]:
        pairs = zip(self.samples, self.bounds, strict=True)
        measured = ("rate", "rate_sd", "ttft_s", "tpot_s", "hit_rate", "bytes_per_token")
        names = (*measured, "least_bytes_per_token", "bound_rate", "bound_by", "share_of_bound")
        return {
            "test": self.workload.name,
            **asdict(self.workload),
            **{name: getattr(self, name) for name in names},
            "samples": [asdict(sample) | {"bound_s": bound.seconds, "bound_by": bound.by} for sample, bound in pairs],
        }


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Rows, the ceilings they are compared with, and the conditions. Memory is in bytes.

    `fast_kernels` is True if no 4-bit matrix of the model was dequantised to be multiplied.
    """

    model: str
    precision: str
    dtype: str
    plan: Plan
    peak_memory: int
    cpu: str
    threads: int
    fast_kernels: bool
    versions: dict[str, str]
    ceilings: Ceilings
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        plan, ceilings = self.plan, self.ceilings
        names = ("model", "precision", "dtype", "peak_memory", "cpu", "threads", "fast_kernels", "versions")
        return {
            "schema": "qmix-bench-1",
            **{name: getattr(self, name) for name in names},
            "budget": plan.ram,
            "context": plan.context,
            "slots": plan.slots,
            "num_records": plan.num_records,
            "ceilings": {
                "memory_read": ceilings.memory_read.to_json(),
                "disk_read": ceilings.disk_read and ceilings.disk_read.to_json(),
                "matmul": ceilings.matmul.to_json(),
            },
            "gpu_ceilings": [{name: rate.to_json() for name, rate in gpu.items()} for gpu in ceilings.gpus],
            "rows": [row.to_json() for row in self.rows],
        }
