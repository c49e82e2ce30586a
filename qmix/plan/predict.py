"""How fast a plan will be: from bytes and rates to seconds. Pure arithmetic; loads no torch.

Decode reads the dense weights, the cache and the experts of one step once; what is missed comes from the disk
meanwhile. A prompt is computed in chunks, each of which needs nearly every expert. What no GPU holds is computed on
the CPU in decode; in prefill it is copied to the GPU where that is sooner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmix.machine.rates import Rates

DENSE_SHARE = 0.84  # of memory's rate that dense products reach between all else (docs/performance.md, "Full size")
EXPERT_SHARE = 0.7  # of the 4-bit product's rate by itself that it has over a whole pool (the same)
COMPUTE_SHARE = 0.65  # of bf16 products' rate that a prefill chunk reaches (the same)
GPU_SHARE = 0.5  # of a GPU's rates; stated, not measured
LOCALITY = 0.3  # what the pool finds beyond the most used experts: misses are (1 - share held) ** LOCALITY of theirs
OVERLAP = 3.0  # reads beside products: 1 would be one after the other, infinity perfectly side by side
CROSSING_SECONDS = 40e-6  # activations from one device to another and the wait for them; stated
BANDS = {"measured": 0.25, "stated": 0.35, "typical": 0.6}  # either side of a prediction, by its limit's source
GPU_BAND = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """What one step moves and computes, in bytes, FLOP and counts; expected values.

    `dense`, `experts`, `flops` are the CPU's; `gpu_bytes` and `gpu_flops` the GPUs', one after the other;
    `missed` is read from disk in `reads` records; `copied` are the experts that could go to a GPU instead of being
    computed on the CPU, with `copied_flops`.
    """

    layers: int
    dense: float = 0.0
    experts: float = 0.0
    four_bit: bool = True
    flops: float = 0.0
    missed: float = 0.0
    reads: float = 0.0
    gpu_bytes: float = 0.0
    gpu_flops: float = 0.0
    copied: float = 0.0
    copied_flops: float = 0.0
    crossings: int = 0


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted `seconds` a step of `tokens` tokens, in which `limit` takes the largest part, right within `band`."""

    seconds: float
    tokens: int
    limit: str
    band: float

    @property
    def rate(self) -> float:
        """Tokens/s."""
        return self.tokens / self.seconds

    @property
    def slowest(self) -> float:
        return self.rate / (1 + self.band)

    @property
    def fastest(self) -> float:
        return self.rate * (1 + self.band)

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens_per_s": self.rate,
            "band": [self.slowest, self.fastest],
            "seconds": self.seconds,
            "tokens": self.tokens,
            "limit": self.limit,
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """`decode` is of one step at half the context, `prefill` of one chunk of a prompt, both after some use."""

    prefill: Speed
    decode: Speed

    def to_json(self) -> dict[str, Any]:
        return {"prefill": self.prefill.to_json(), "decode": self.decode.to_json()}


_SOURCES = {  # a limit's name, and the rate that it follows from
    "disk": "disk_read",
    "memory": "memory_read",
    "4-bit products": "four_bit_read",
    "CPU arithmetic": "matmul",
    "GPU memory": "gpu_memory",
    "GPU arithmetic": "gpu_matmul",
    "PCIe": "pcie",
    "Python": "layer_seconds",
}


def seconds_of(load: Load, rates: Rates) -> float:
    """Of one step."""
    return _total(_parts(load, rates))


def speed_of(load: Load, rates: Rates, tokens: int) -> Speed:
    """Of one step of `tokens` tokens, with its limit named."""
    parts = _parts(load, rates)
    limit = max(parts, key=lambda name: parts[name])
    band = BANDS[rates.source(_SOURCES[limit])]
    if load.gpu_bytes and rates.source("gpu_memory") != "measured":
        band = max(band, GPU_BAND)
    return Speed(_total(parts), tokens, limit, band)


def missed_share(held: float) -> float:
    """Of the uses of experts beyond the most used ones that a pool has slots for, those that are missed indeed.

    `held` is the share of the host's experts that have a slot. Expected use alone would miss all of them; the pool
    keeps what was used lately, and consecutive tokens share experts more often than chance has it.
    """
    return float((1 - held) ** LOCALITY)


def _parts(load: Load, rates: Rates) -> dict[str, float]:
    """Seconds by what takes them."""
    product = rates.four_bit_read * EXPERT_SHARE if load.four_bit else rates.memory_read * DENSE_SHARE
    arithmetic = load.flops / (rates.matmul * COMPUTE_SHARE)
    gpu_bytes = load.gpu_bytes / (rates.gpu_memory * GPU_SHARE)
    gpu_flops = load.gpu_flops / (rates.gpu_matmul * GPU_SHARE)
    parts = {
        "memory": load.dense / (rates.memory_read * DENSE_SHARE),
        "4-bit products" if load.four_bit else "memory, experts": load.experts / product,
        "CPU arithmetic": arithmetic,
        "GPU memory": gpu_bytes,
        "GPU arithmetic": gpu_flops,
        "disk": load.missed / rates.disk_read + load.reads * rates.read_seconds,
        "Python": load.layers * rates.layer_seconds + load.crossings * CROSSING_SECONDS,
        "PCIe": 0.0,
    }
    parts["memory"] += parts.pop("memory, experts", 0.0)
    if load.copied:
        on_cpu = load.copied / product + load.copied_flops / (rates.matmul * COMPUTE_SHARE)
        copying = load.copied / rates.pcie + load.copied_flops / (rates.gpu_matmul * GPU_SHARE)
        if copying < on_cpu:
            parts["PCIe"] = load.copied / rates.pcie
            parts["GPU arithmetic"] += load.copied_flops / (rates.gpu_matmul * GPU_SHARE)
        else:
            parts["4-bit products" if load.four_bit else "memory"] += load.copied / product
            parts["CPU arithmetic"] += load.copied_flops / (rates.matmul * COMPUTE_SHARE)
    return parts


def _total(parts: dict[str, float]) -> float:
    """Overheads, and the disk beside all else, which it overlaps with for the most part."""
    busy = sum(seconds for name, seconds in parts.items() if name not in ("disk", "Python"))
    return parts["Python"] + beside(busy, parts["disk"])


def beside(first: float, second: float) -> float:
    """Seconds of two things done side by side, not quite perfectly: more than the longer, less than the sum."""
    longer, shorter = max(first, second), min(first, second)
    return longer * (1 + (shorter / longer) ** OVERLAP) ** (1 / OVERLAP) if longer else 0.0
