"""Make a plan: a pure function from sizes and budgets. Loads no torch.

A process holds the interpreter, the dense weights, the KV cache, the work space of one step, and a pool of expert
records; records that do not fit the pool stay on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from qmix.errors import DoesNotFitError, arg
from qmix.machine.rates import Rates
from qmix.plan.demand import Arrangement, Demand
from qmix.plan.device_memory import CUDA_CONTEXT_BYTES, CUDA_HOST_BYTES, captured_tokens, pinned_bytes
from qmix.plan.memory import (
    PREFILL_CHUNK,
    PREFILL_SHARE,
    expert_work_bytes,
    prefill_bytes,
    prefill_tokens,
    sampling_bytes,
    usable_bytes,
    with_reserve,
    work_bytes,
)
from qmix.plan.placement import arrange
from qmix.plan.plan import Plan
from qmix.plan.slots import SlotClass, least_slots, share_slots
from qmix.store.expert_frequency import ExpertFrequency, uniform_frequency
from qmix.store.layout import StoreLayout
from qmix.units import format_bytes, size_option

TYPICAL = Rates()


def make_plan(
    layout: StoreLayout,
    ram: int,
    context: int,
    interpreter: int,
    attention: str = "sdpa",
    batch: int = 1,
    *,
    gpus: Sequence[int] = (),
    rates: Rates = TYPICAL,
    use: ExpertFrequency | None = None,
    cuda: int = CUDA_CONTEXT_BYTES,
) -> Plan:
    """Return the plan of a store under budgets of `ram` bytes and `gpus` bytes, for `batch` sequences of `context`
    tokens.

    `interpreter` is what Python takes without GPUs, `cuda` what CUDA's context takes of each GPU. `rates` decide
    between the ways to use the GPUs. The experts that `use` says are used most are placed first; without it all count
    the same. Raises DoesNotFitError with the smallest `ram` that works.
    """
    demand = Demand(layout, context, batch, attention, use or uniform_frequency(layout.geometry))
    host = _Host(demand, ram, interpreter, len(gpus))
    found = arrange(demand, gpus, host.slots, rates, cuda)
    if found is None:
        raise DoesNotFitError(host.refusal(), host.smallest)
    parts = host.parts(found.cpu_layers)
    prefill = _device_prefill(found, gpus) if found.holdings else host.prefill(found.slots)
    # a GPU's work is its own
    prefill_work = 0 if found.holdings else prefill_bytes(layout.geometry, context, prefill, batch)
    parts["work"] += prefill_work
    if not found.cpu_layers and not found.elsewhere:  # the host only chooses the next token
        parts["work"] = sampling_bytes(layout.geometry, batch)
    return Plan(
        ram=ram,
        context=context,
        batch=batch,
        **parts,
        slot_classes=_classes(found),
        num_records=layout.geometry.num_records,
        expert_bytes=layout.expert_bytes,
        store_bytes=layout.total_bytes,
        devices=tuple(held.plan for held in found.holdings),
        layer_devices=found.layer_devices,
        placement=found.placement,
        prefill=prefill,
        prefill_work=prefill_work,
    )


def _device_prefill(found: Arrangement, gpus: Sequence[int]) -> int:
    """Return how many tokens of a prompt go through a layer together: a chunk where some layers are on the CPU."""
    return PREFILL_CHUNK if found.cpu_layers else min(map(found.demand.device_prefill, gpus))


def _classes(found: Arrangement) -> tuple[SlotClass, ...]:
    records, served = found.demand.layout.record_counts, Counter(found.wanted)
    return tuple(SlotClass(nbytes, found.slots[nbytes], count, served[nbytes]) for nbytes, count in records.items())


class _Host:
    """The host's bytes by the number of layers on the CPU, and the least budget of all numbers tried."""

    def __init__(self, demand: Demand, ram: int, interpreter: int, gpus: int) -> None:
        self.demand, self.ram, self.interpreter, self.gpus = demand, ram, interpreter, gpus
        self.least = least_slots(demand.layout)
        self.least_bytes = sum(nbytes * count for nbytes, count in self.least.items())
        self._smallest: tuple[int, int] | None = None  # budget, and its layers on the CPU

    def parts(self, cpu_layers: int) -> dict[str, int]:
        """Return the bytes of a plan's parts on the host, by field."""
        demand, layout = self.demand, self.demand.layout
        geometry = demand.geometry
        whole = cpu_layers == geometry.num_layers
        if cpu_layers:
            work = work_bytes(geometry, demand.context, demand.attention, demand.batch)
        else:
            work = expert_work_bytes(geometry, demand.context, demand.batch)
        tokens = captured_tokens(geometry, demand.context, demand.batch)
        cuda = 0 if whole else CUDA_HOST_BYTES + pinned_bytes(geometry, tokens, self.gpus)
        return {
            "interpreter": self.interpreter + cuda,
            "dense": layout.dense.size - len(layout.dense.header) if whole else demand.dense_of(0, cpu_layers),
            "kv_cache": demand.layer_kv * cpu_layers,
            "work": work,
        }

    def slots(self, cpu_layers: int, wanted: Sequence[int]) -> dict[int, int] | None:
        """Return slots for records of `wanted` bytes beside the host's other parts; None where too few fit."""
        fixed = sum(self.parts(cpu_layers).values())
        smallest = with_reserve(fixed + self.least_bytes)
        if self._smallest is None or smallest < self._smallest[0]:
            self._smallest = smallest, cpu_layers
        if self.ram < smallest:
            return None
        room = usable_bytes(self.ram) - fixed
        if sum(wanted) > room and self._layerwise(cpu_layers):
            geometry, context, batch = self.demand.geometry, self.demand.context, self.demand.batch
            wish = prefill_bytes(geometry, context, prefill_tokens(geometry, context, room, batch), batch)
            room = max(self.least_bytes, room - min(wish, int(room * PREFILL_SHARE)))
        return share_slots(wanted, self.least, room)

    def prefill(self, slots: Mapping[int, int]) -> int:
        """Return how many tokens of prompts go through a layer together beside these slots, without GPUs.

        A single chunk where every expert has a slot: nothing is read then.
        """
        geometry = self.demand.geometry
        pool = sum(nbytes * count for nbytes, count in slots.items())
        if pool == sum(self.demand.layout.expert_bytes.values()) or not self._layerwise(geometry.num_layers):
            return PREFILL_CHUNK
        room = usable_bytes(self.ram) - sum(self.parts(geometry.num_layers).values()) - pool
        return prefill_tokens(geometry, self.demand.context, room, self.demand.batch)

    def _layerwise(self, cpu_layers: int) -> bool:
        """Return True if prompts can go through the layers one by one: wholly on the CPU."""
        return cpu_layers == self.demand.geometry.num_layers

    @property
    def smallest(self) -> int:
        """The smallest budget that works; known once `slots` was called."""
        assert self._smallest is not None
        return self._smallest[0]

    def refusal(self) -> str:
        """Return the message of a budget that is too small."""
        assert self._smallest is not None
        smallest, cpu_layers = self._smallest
        parts, tokens = self.parts(cpu_layers), self.demand.context * self.demand.batch
        return (
            f"does not fit {format_bytes(self.ram)} of RAM: needs {format_bytes(smallest)} "
            f"(Python {format_bytes(parts['interpreter'])}, dense weights {format_bytes(parts['dense'])}, "
            f"KV cache for {tokens} tokens {format_bytes(parts['kv_cache'])}, "
            f"work space {format_bytes(parts['work'])}, "
            f"{sum(self.least.values())} experts {format_bytes(self.least_bytes)}); the smallest budget that works is "
            f"{arg('ram', size_option(smallest))}"
        )
