"""Work out what a step of an arrangement moves and computes: the loads that `qmix.plan.predict` turns into seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from qmix.geometry import Geometry
from qmix.plan.demand import Arrangement, StepUse

LOCALITY = 0.3  # what the pool finds beyond the most used experts: misses are (1 - share held) ** LOCALITY of theirs


@dataclass(frozen=True, slots=True)
class Load:
    """Bytes, FLOP and counts of one step; expected values.

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


def decode_load(found: Arrangement, step: StepUse) -> Load:
    """Return the load of one decode step at half the context."""
    demand = found.demand
    geometry, layers, position = demand.geometry, demand.geometry.num_layers, ceil(demand.context / 2)
    on_cpu, beside = _elsewhere(found, step)
    hosts = found.elsewhere
    missed = found.missed
    share = missed_share(1 - len(missed) / len(hosts)) if missed else 0.0
    on_gpus = sum(demand.read_of(held.first, held.last, position) for held in found.holdings)
    more = demand.batch - 1  # tokens whose arithmetic does not hide behind the reading of weights
    return Load(
        layers=layers,
        dense=demand.read_of(0, found.cpu_layers, position),
        experts=on_cpu + beside,
        four_bit=demand.four_bit,
        flops=found.cpu_layers * more * (_attention_flops(geometry, 0) + _expert_flops(geometry)),
        missed=share * _sum(step.record, missed),
        reads=share * _sum(step.chance, missed),
        gpu_bytes=on_gpus + _sum(step.device, found.residents),
        crossings=_crossings(found),
    )


def prefill_load(found: Arrangement, chunk: StepUse, tokens: int, before: int = 0) -> Load:
    """Return the load of `tokens` prompt tokens behind `before` others, in one sweep over all experts."""
    demand = found.demand
    geometry, layers = demand.geometry, demand.geometry.num_layers
    on_cpu, beside = _elsewhere(found, chunk)
    missed = found.missed
    attention, routed = tokens * _attention_flops(geometry, before + tokens / 2), tokens * _expert_flops(geometry)
    on_gpus = layers - found.cpu_layers
    expert_total = demand.expert_total / layers * on_gpus
    apart = min(1.0, beside / expert_total) if on_gpus else 0.0
    return Load(
        layers=layers,
        dense=demand.read_of(0, found.cpu_layers, 0),
        experts=on_cpu,
        four_bit=demand.four_bit,
        flops=found.cpu_layers * (attention + routed),
        missed=_sum(chunk.record, missed),
        reads=_sum(chunk.chance, missed),
        gpu_bytes=_sum(chunk.device, found.residents)
        + sum(demand.read_of(held.first, held.last, 0) for held in found.holdings),
        gpu_flops=on_gpus * (attention + routed * (1 - apart)),
        copied=beside,
        copied_flops=on_gpus * routed * apart,
        crossings=_crossings(found),
    )


def missed_share(held: float) -> float:
    """Return the share of the uses of experts without a slot, by expected use, that really miss.

    `held` is the share of the host's experts that have a slot. Expected use alone would miss all of them; the pool
    keeps what was used lately, and consecutive tokens share experts more often than chance has it.
    """
    return float((1 - held) ** LOCALITY)


def _elsewhere(found: Arrangement, step: StepUse) -> tuple[float, float]:
    """Return the expected bytes of the experts on no GPU: of layers on the CPU, and of layers on a GPU."""
    layers, first, ranks = found.demand.layers, found.cpu_layers, found.elsewhere
    if first == 0 or not found.holdings:
        whole = _sum(step.record, ranks)
        return (whole, 0.0) if first else (0.0, whole)
    on_cpu = _sum(step.record, (rank for rank in ranks if layers[rank] < first))
    return on_cpu, _sum(step.record, (rank for rank in ranks if layers[rank] >= first))


def _sum(values: list[float], ranks: Iterable[int]) -> float:
    return sum(map(values.__getitem__, ranks))


def _crossings(found: Arrangement) -> int:
    """Return how often activations change devices in a pass: between runs of layers, and to experts elsewhere."""
    parted = set(map(found.demand.layers.__getitem__, found.elsewhere))
    return len(found.holdings) + sum(layer >= found.cpu_layers for layer in parted)


def _attention_flops(geometry: Geometry, seen: float) -> float:
    """Return the FLOP of one token in one layer: projections, router, and attention to `seen` positions."""
    hidden, q_rows = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    weights = 2 * hidden * (q_rows + geometry.num_kv_heads * geometry.head_dim) + geometry.num_experts * hidden
    return 2.0 * (weights + 2 * q_rows * seen)


def _expert_flops(geometry: Geometry) -> float:
    """Return the FLOP of one token's experts in one layer."""
    return 2.0 * geometry.experts_per_token * 3 * geometry.hidden_size * geometry.intermediate_size
