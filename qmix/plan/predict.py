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
EXPERT_SHARE = 0.7  # of memory's rate that 4-bit products reach over a whole pool (the same)
PRODUCT_SHARE = 0.9  # of a product's own rate, where that is the limit; stated, not measured
COMPUTE_SHARE = 0.65  # of bf16 products' rate that a prefill chunk reaches (the same)
CROSSING_SECONDS = 40e-6  # activations from one device to another and the wait for them; stated
BANDS = {  # either side of a prediction, by its limit's source
    "measured": 0.25,
    "stated": 0.35,
    "scaled": 0.45,
    "published": 0.5,
    "typical": 0.6,
}
GPU_BAND = 0.5
LONG_PROMPT = 4096  # tokens


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
    """The speed of one decode step at half the context and of one chunk of a prompt, both after some use, and of a
    whole prompt of LONG_PROMPT tokens, or of the context where that is less.
    """

    prefill: Speed
    decode: Speed
    prompt: Speed

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_json() for name in ("prefill", "decode", "prompt")}


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
    return Prediction(
        prefill=speed_of(prefill, rates, tokens),
        decode=speed_of(decode, rates, plan.batch),
        prompt=_prompt_speed(found, rates, min(LONG_PROMPT, plan.context), plan.prefill),
    )


def _prompt_speed(found: Arrangement, rates: Rates, tokens: int, together: int) -> Speed:
    """Return the speed of a prompt that goes through each layer `together` tokens at a time: each expert without a slot
    is read once for them.
    """
    parts = []
    for before in range(0, tokens, together):
        some = min(together, tokens - before)
        load = prefill_load(found, StepUse.of(found.demand, some), some, before)
        parts.append(speed_of(load, rates, some))
    longest = max(parts, key=lambda part: part.seconds)
    return Speed(sum(part.seconds for part in parts), tokens, longest.limit, longest.band)


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
    dense = min(rates.memory_read * DENSE_SHARE, rates.half_read * PRODUCT_SHARE)
    reading, rate = "memory", dense
    if load.four_bit:
        reading = "4-bit products"
        rate = min(rates.memory_read * EXPERT_SHARE, rates.four_bit_read * PRODUCT_SHARE)
    host = HostRates(rate, rates.matmul * COMPUTE_SHARE)
    parts = {
        "memory": load.dense / dense,
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
