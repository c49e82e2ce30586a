"""Work out what a step of an arrangement moves and computes: the loads that `qmix.plan.predict` turns into seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from qmix.geometry import Geometry
from qmix.plan.demand import Arrangement, StepUse
from qmix.plan.device_work import DeviceLayer, attention_flops, device_layers, expert_weights
from qmix.plan.memory import is_short
from qmix.precision.formats import uses_kernels

ONE_CALL = 4  # layers whose overhead a step in one call of the CPU's threads has (docs/performance.md, "By threads")
LOCALITY = 0.3  # what the pool finds beyond the most used experts: misses are (1 - share held) ** LOCALITY of theirs


@dataclass(frozen=True, slots=True)
class Load:
    """Bytes, FLOP and counts of one step; expected values.

    `dense`, `experts` and `flops` are those of layers on the CPU, and `layers` as many as have the overhead of one;
    `on_gpus` are the others, in a decode step or not. `missed` is read from disk in `reads` records; `crossings` are
    the changes of device between layers.
    """

    layers: int
    dense: float = 0.0
    experts: float = 0.0
    four_bit: bool = True
    flops: float = 0.0
    missed: float = 0.0
    reads: float = 0.0
    on_gpus: tuple[DeviceLayer, ...] = ()
    decodes: bool = True
    crossings: int = 0


def decode_load(found: Arrangement, step: StepUse) -> Load:
    """Return the load of one decode step at half the context."""
    demand = found.demand
    geometry, position = demand.geometry, ceil(demand.context / 2)
    hosts = found.elsewhere
    missed = found.missed
    share = missed_share(1 - len(missed) / len(hosts)) if missed else 0.0
    more = demand.batch - 1  # tokens whose arithmetic does not hide behind the reading of weights
    resident = not (missed or found.holdings) and demand.attention == "sdpa"
    ours = resident and demand.layout.dtype == "bf16" and uses_kernels(geometry)
    one_call = ours and is_short(demand.batch, position)
    return Load(
        layers=min(ONE_CALL, found.cpu_layers) if one_call else found.cpu_layers,
        dense=demand.read_of(0, found.cpu_layers, position),
        experts=_on_cpu(found, step),
        four_bit=demand.four_bit,
        flops=found.cpu_layers * more * (attention_flops(geometry, 0) + _expert_flops(geometry)),
        missed=share * _sum(step.record, missed),
        reads=share * _sum(step.chance, missed),
        on_gpus=tuple(device_layers(found, step, demand.batch, decodes=True)),
        crossings=len(found.holdings),
    )


def prefill_load(found: Arrangement, chunk: StepUse, tokens: int, before: int = 0) -> Load:
    """Return the load of `tokens` prompt tokens behind `before` others, in one sweep over all experts."""
    demand = found.demand
    geometry, missed = demand.geometry, found.missed
    return Load(
        layers=found.cpu_layers,
        dense=demand.read_of(0, found.cpu_layers, 0),
        experts=_on_cpu(found, chunk),
        four_bit=demand.four_bit,
        flops=found.cpu_layers * tokens * (attention_flops(geometry, before + tokens / 2) + _expert_flops(geometry)),
        missed=_sum(chunk.record, missed),
        reads=_sum(chunk.chance, missed),
        on_gpus=tuple(device_layers(found, chunk, tokens, decodes=False, before=before)),
        decodes=False,
        crossings=len(found.holdings),
    )


def missed_share(held: float) -> float:
    """Return the share of the uses of experts without a slot, by expected use, that really miss.

    `held` is the share of the host's experts that have a slot. Expected use alone would miss all of them; the pool
    keeps what was used lately, and consecutive tokens share experts more often than chance has it.
    """
    return float((1 - held) ** LOCALITY)


def _on_cpu(found: Arrangement, step: StepUse) -> float:
    """Return the expected bytes of the experts of layers on the CPU."""
    every = len(found.demand.order)
    return sum(step.up_to(layer, every)[0] for layer in range(found.cpu_layers))


def _sum(values: list[float], ranks: Iterable[int]) -> float:
    return sum(map(values.__getitem__, ranks))


def _expert_flops(geometry: Geometry) -> float:
    """Return the FLOP of one token's experts in one layer."""
    return 2.0 * geometry.experts_per_token * expert_weights(geometry)
