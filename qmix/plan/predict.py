"""Predict how fast a plan will be: from bytes and rates to seconds. Pure arithmetic; loads no torch.

Decode reads the dense weights, the cache and the experts of one step once; misses come from the disk meanwhile. A
prompt is computed in chunks, each of which needs nearly every expert. `qmix.plan.device_work` has the layers on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmix.machine.rates import Rates
from qmix.plan.demand import Arrangement, Demand, Holding, StepUse
from qmix.plan.device_work import HostRates, beside, decode_parts, prefill_parts
from qmix.plan.memory import PREFILL_CHUNK
from qmix.plan.plan import Plan
from qmix.plan.traffic import Load, decode_load, prefill_load
from qmix.store.expert_frequency import ExpertFrequency, uniform_frequency
from qmix.store.layout import StoreLayout

DENSE_SHARE = 0.84  # of memory's rate that dense products reach between all else (docs/performance.md, "Full size")
EXPERT_SHARE = 0.7  # of the 4-bit product's own rate that it reaches over a whole pool (the same)
COMPUTE_SHARE = 0.65  # of bf16 products' rate that a prefill chunk reaches (the same)
CROSSING_SECONDS = 40e-6  # activations from one device to another and the wait for them; stated
# Either side of a prediction, by its limit's source.
BANDS = {"measured": 0.25, "stated": 0.35, "published": 0.5, "typical": 0.6}
GPU_BAND = 0.5


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted `seconds` a step of `tokens` tokens, right within `band`; `limit` takes the largest part."""

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
        """Tokens/s at the lower end of the band."""
        return self.rate / (1 + self.band)

    @property
    def fastest(self) -> float:
        """Tokens/s at the upper end of the band."""
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
    """The speed of one decode step at half the context and of one chunk of a prompt, both after some use."""

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
    "GPU launches": "gpu_memory",
    "PCIe": "pcie",
    "Python": "layer_seconds",
}


def predict(plan: Plan, layout: StoreLayout, rates: Rates, use: ExpertFrequency | None = None) -> Prediction:
    """Return the plan's predicted speed."""
    demand = Demand(layout, plan.context, plan.batch, "sdpa", use or uniform_frequency(layout.geometry))
    found = Arrangement(plan.layer_devices.count("cpu"), _holdings(plan, demand), plan.slots_by_size, demand)
    tokens = min(PREFILL_CHUNK, plan.context)
    decode = decode_load(found, StepUse.of(demand, plan.batch))
    prefill = prefill_load(found, StepUse.of(demand, tokens), tokens)
    return Prediction(prefill=speed_of(prefill, rates, tokens), decode=speed_of(decode, rates, plan.batch))


def _holdings(plan: Plan, demand: Demand) -> tuple[Holding, ...]:
    """Return what each GPU of a plan holds."""
    found = []
    for device in plan.devices:
        first = plan.layer_devices.index(device.name)
        last = first + plan.layer_devices.count(device.name)
        ranks = [
            rank for rank, (layer, expert) in enumerate(demand.order) if plan.placement[layer][expert] == device.name
        ]
        found.append(Holding(first, last, device, max(ranks, default=-1)))
    return tuple(found)


def seconds_of(load: Load, rates: Rates) -> float:
    """Return the seconds of one step."""
    return _total(_parts(load, rates))


def speed_of(load: Load, rates: Rates, tokens: int) -> Speed:
    """Return the speed of one step of `tokens` tokens, with its limit named."""
    parts = _parts(load, rates)
    limit = max(parts, key=lambda name: parts[name])
    band = BANDS[rates.source(_SOURCES[limit])]
    if load.on_gpus and rates.source("gpu_memory") != "measured":
        band = max(band, GPU_BAND)
    return Speed(_total(parts), tokens, limit, band)


def _parts(load: Load, rates: Rates) -> dict[str, float]:
    """Return seconds by limit."""
    reading, rate = "memory", rates.memory_read * DENSE_SHARE
    if load.four_bit:
        reading, rate = "4-bit products", rates.four_bit_read * EXPERT_SHARE
    host = HostRates(rate, rates.matmul * COMPUTE_SHARE)
    parts = {
        "memory": load.dense / (rates.memory_read * DENSE_SHARE),
        "4-bit products": 0.0,
        "CPU arithmetic": load.flops / host.flops,
        "GPU launches": load.crossings * CROSSING_SECONDS,
        "disk": load.missed / rates.disk_read + load.reads * rates.read_seconds,
        "Python": load.layers * rates.layer_seconds,
    }
    parts[reading] += load.experts / rate
    on_gpus = (decode_parts if load.decodes else prefill_parts)(load.on_gpus, rates, host, reading)
    for name, seconds in on_gpus.items():
        parts[name] = parts.get(name, 0.0) + seconds
    return parts


def _total(parts: dict[str, float]) -> float:
    """Return the seconds of all parts; the disk overlaps with most of the others."""
    busy = sum(seconds for name, seconds in parts.items() if name not in ("disk", "Python"))
    return parts["Python"] + beside(busy, parts["disk"])
