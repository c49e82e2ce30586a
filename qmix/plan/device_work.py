"""Work out how long a step's layers on GPUs take: the GPU, the CPU and the copies between them side by side.

A layer begins with its dense part on the GPU. In decode its residents are then computed there while the experts that
lie on the host are computed by the CPU, and some of them copied to the GPU and computed there, whichever way ends
first. In prefill every host expert is copied once while the GPU computes, or computed by the CPU where that is faster.
A step is one captured graph, or two a layer where experts lie on the host: then Python stands between. Loads no torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, comb

from qmix.geometry import HALF_BYTES, Geometry
from qmix.machine.rates import Rates
from qmix.plan.demand import Arrangement, Demand, Holding, StepUse

# Shares of a GPU's rates, and fixed times, fitted to kernels of this kind on an H100 (docs/plan.md).
DENSE_SHARE = 0.95  # of memory's rate, reached by products of dense weights with one token
EXPERT_SHARE = 0.85  # the same of 4-bit records, besides LAYER_SECONDS
MATMUL_SHARE = 0.6  # of the rate of large products, reached by a prompt's
LAYER_SECONDS = 40e-6  # of a layer in decode, on any GPU: nine kernels that begin and end
ROUND_TRIP = 25e-6  # ids and x to the host, the wait for them, and the results back
HOST_SECONDS = 60e-6  # of Python in a layer whose experts the host computes or copies (AMD EPYC, one or two experts)
BOTH_SHARE = 0.85  # of its own rate, reached by the CPU and by the copies while both read main memory
OVERLAP = 3.0  # work side by side: 1 would be one after the other, infinity perfectly side by side


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """A layer on a GPU in one step; expected values, in bytes, FLOP and numbers of experts.

    `dense` are weights and cache to read. `resident` are the records used on the GPU, `host` those used of other
    experts, which are `away` of all `used`. `split` is true if some expert of the layer lies elsewhere. `weights` are
    those of one expert, `tokens` those of the step.
    """

    dense: float
    flops: float
    resident: float
    host: float
    used: float
    away: float
    split: bool
    weights: int
    tokens: int
    top_k: int

    @property
    def expert_flops(self) -> float:
        """FLOP of all tokens' experts."""
        return 2.0 * self.tokens * self.top_k * self.weights


@dataclass(frozen=True, slots=True)
class HostRates:
    """Rates that the host reaches with experts: bytes/s of records multiplied, and FLOP/s."""

    read: float
    flops: float


def device_layers(found: Arrangement, use: StepUse, tokens: int, decodes: bool, before: int = 0) -> list[DeviceLayer]:
    """Return the layers on GPUs in a step of `tokens` tokens: a decode step at half the context, or a prompt's.

    A prompt's tokens come behind `before` others.
    """
    demand, made = found.demand, use.device_layers
    position = ceil(demand.context / 2) if decodes else 0
    flops = 0.0 if decodes else tokens * attention_flops(demand.geometry, before + tokens / 2)
    layers = []
    for held in found.holdings:
        for index in range(held.first, held.last):
            key = index, held.limit, tokens, decodes, before
            if key not in made:  # the same in most of the arrangements that are compared
                made[key] = _layer(demand, use, held, index, position, flops, tokens)
            layers.append(made[key])
    return layers


def _layer(
    demand: Demand, use: StepUse, held: Holding, index: int, position: int, flops: float, tokens: int
) -> DeviceLayer:
    geometry = demand.geometry
    resident, here, count = use.up_to(index, held.limit)
    every, used, number = use.up_to(index, len(demand.order))
    return DeviceLayer(
        dense=demand.read_of(index, index + 1, position),
        flops=flops,
        resident=resident,
        host=every - resident,
        used=used,
        away=used - here if count < number else 0.0,
        split=count < number,
        weights=expert_weights(geometry),
        tokens=tokens,
        top_k=geometry.experts_per_token,
    )


def decode_parts(layers: Iterable[DeviceLayer], rates: Rates, host: HostRates, reading: str) -> dict[str, float]:
    """Return the seconds of layers in a decode step by what limits them; `reading` names the host's own limit."""
    parts: dict[str, float] = defaultdict(float)
    for layer, count in Counter(layers).items():
        dense = layer.dense / (rates.gpu_memory * DENSE_SHARE)
        residents = layer.resident / (rates.gpu_memory * EXPERT_SHARE)
        parts["GPU memory"] += count * dense
        parts["GPU launches"] += count * (LAYER_SECONDS + ROUND_TRIP * layer.split)
        limit, seconds = max(("GPU memory", residents), (reading, _host_decode(layer, rates, host)), key=_seconds)
        parts[limit] += count * seconds
    return parts


def _host_decode(layer: DeviceLayer, rates: Rates, host: HostRates) -> float:
    """Return the expected seconds of a layer's host experts; each expert of the step is there with the same chance."""
    if layer.away <= 0:
        return 0.0
    each = layer.host / layer.away
    more = layer.expert_flops / layer.used * (1 - 1 / layer.tokens) / host.flops  # not hidden behind the reading
    on_cpu, copying = each / host.read + more, each / rates.pcie
    most, chance = max(1, round(layer.used)), min(1.0, layer.away / layer.used)
    return sum(
        comb(most, count)
        * chance**count
        * (1 - chance) ** (most - count)
        * (HOST_SECONDS + shared_seconds(count, on_cpu, copying))
        for count in range(1, most + 1)
    )


def shared_seconds(experts: int, on_cpu: float, copying: float) -> float:
    """Return the least seconds of whole experts shared out between the CPU and the copies.

    3 experts, 1 s each on the CPU, 2 s each to copy: all on the CPU take 3 s; two there and one copied take
    2 / 0.85 = 2.35 s.
    """
    found = [experts * on_cpu, experts * copying]
    for copied in range(1, experts):
        found.append(max((experts - copied) * on_cpu, copied * copying) / BOTH_SHARE)
    return min(found)


def prefill_parts(layers: Iterable[DeviceLayer], rates: Rates, host: HostRates, reading: str) -> dict[str, float]:
    """Return the seconds of layers in a step of many tokens by what limits them.

    Copies of host experts are beside the GPU's work; the first one is waited for.
    """
    work: dict[str, float] = defaultdict(float)
    upload, on_cpu, first = 0.0, 0.0, 0.0
    for layer, count in Counter(layers).items():
        share = layer.away / layer.used if layer.used else 0.0
        memory, arithmetic = _device_prefill(layer, rates)
        copied = layer.host / rates.pcie
        slow = layer.host / host.read + layer.expert_flops * share / host.flops
        work["GPU memory"] += count * memory
        if slow < copied:
            on_cpu += count * slow
            arithmetic -= layer.expert_flops * share / (rates.gpu_matmul * MATMUL_SHARE)
        else:
            upload += count * copied
            first = max(first, copied / layer.away if layer.away else 0.0)
        work["GPU arithmetic"] += count * max(0.0, arithmetic)
    device = sum(work.values())
    apart = {"PCIe": upload + min(first, upload), reading: on_cpu}
    beside_it = max(apart, key=lambda name: apart[name])
    total, longer = beside(device, sum(apart.values())), max(device, sum(apart.values()))
    if longer > device:
        return {beside_it: total}
    return {name: seconds * total / device for name, seconds in work.items()} if device else {}


def _device_prefill(layer: DeviceLayer, rates: Rates) -> tuple[float, float]:
    """Return the GPU's seconds of a layer with many tokens: at its memory, and at arithmetic beyond that.

    A record is read, written in half precision and read again for its product, which takes the longer of reading and
    multiplying.
    """
    read, multiplied = rates.gpu_memory * DENSE_SHARE, rates.gpu_matmul * MATMUL_SHARE
    halves = layer.used * layer.weights * HALF_BYTES
    dequantising = (layer.resident + layer.host + halves) / read
    reading = (layer.dense + halves) / read
    return dequantising + reading, max(0.0, (layer.flops + layer.expert_flops) / multiplied - reading)


def attention_flops(geometry: Geometry, seen: float) -> float:
    """Return the FLOP of one token in one layer: projections, router, and attention to `seen` positions."""
    hidden, q_rows = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    weights = 2 * hidden * (q_rows + geometry.num_kv_heads * geometry.head_dim) + geometry.num_experts * hidden
    return 2.0 * (weights + 2 * q_rows * seen)


def expert_weights(geometry: Geometry) -> int:
    """Return the weights of one expert."""
    return 3 * geometry.hidden_size * geometry.intermediate_size


def beside(first: float, second: float) -> float:
    """Return the seconds of two things done side by side: more than the longer, less than the sum."""
    longer, shorter = max(first, second), min(first, second)
    return longer * (1 + (shorter / longer) ** OVERLAP) ** (1 / OVERLAP) if longer else 0.0


def _seconds(pair: tuple[str, float]) -> float:
    return pair[1]
