"""What lies where under a budget: a pure function from sizes to a frozen plan. Loads no torch.

A process holds the interpreter, the dense weights, the KV cache, the work space of one step, and a pool of expert
records; what does not fit the pool stays on disk. `total` is the peak that a run is predicted to reach.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qmix.errors import DoesNotFitError, arg
from qmix.geometry import HALF_BYTES, Geometry
from qmix.machine.rates import Rates
from qmix.plan.demand import PREFILL_CHUNK, Arrangement, Demand, DevicePlan, Holding, StepUse
from qmix.plan.placement import arrange
from qmix.plan.predict import Prediction, speed_of
from qmix.plan.slots import SlotClass, least_slots, share_slots
from qmix.plan.traffic import decode_load, prefill_load
from qmix.store.expert_frequency import ExpertFrequency, uniform_frequency
from qmix.store.layout import StoreLayout
from qmix.units import format_bytes

SCHEMA = "qmix-plan-3"
DEFAULT_CONTEXT = 4096
TYPICAL = Rates()
CUDA_HOST_BYTES = 2**30  # CUDA's libraries and pinned buffers in the process' own memory; stated, not measured
RESERVE_BYTES = 16 * 2**20  # page tables, the allocator's slack
RESERVE_SHARE = 0.01
SAMPLING_BYTES = 40  # a token of the vocabulary: scores, probabilities, and their sorted copies with indices
SLOW_PATH_BYTES = 8 * 2**20  # rows dequantised where no kernel takes a matrix


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of each part of a run, and where each layer and expert lies.

    `layer_devices` says for each layer where its dense weights and KV cache lie, "cpu" or "gpu:0"; embeddings lie with
    the first layer, the last norm and the head with the last. `placement` is [layer][expert]: "gpu:0" for a resident
    that stays there, "ram" or "disk" for where the others are at the start; which of them the pool holds later is
    decided by use. `slot_classes` are the pool's, one for each size of record. `interpreter`, `dense`, `kv_cache`,
    `work` and the pool are the host's.
    """

    ram: int
    context: int
    batch: int
    interpreter: int
    dense: int
    kv_cache: int
    work: int
    slot_classes: tuple[SlotClass, ...]
    num_records: int
    expert_bytes: dict[str, int]
    store_bytes: int
    devices: tuple[DevicePlan, ...] = ()
    layer_devices: tuple[str, ...] = ()
    placement: tuple[tuple[str, ...], ...] = ()

    @property
    def slots(self) -> int:
        """Of all sizes together."""
        return sum(each.slots for each in self.slot_classes)

    @property
    def slots_by_size(self) -> dict[int, int]:
        """By the bytes of the records that they hold, as a pool takes them."""
        return {each.nbytes: each.slots for each in self.slot_classes}

    @property
    def pool(self) -> int:
        return sum(each.nbytes * each.slots for each in self.slot_classes)

    @property
    def total(self) -> int:
        """The predicted peak of resident memory."""
        return self.interpreter + self.dense + self.kv_cache + self.work + self.pool

    @property
    def headroom(self) -> int:
        """What the budget leaves free, the reserve for page tables and allocator slack included."""
        return self.ram - self.total

    @property
    def on_disk(self) -> int:
        """Bytes of the expert records that neither a GPU nor the pool has room for."""
        return sum(each.nbytes * each.on_disk for each in self.slot_classes)

    @property
    def records_on_disk(self) -> int:
        """How many these are."""
        return sum(each.on_disk for each in self.slot_classes)

    @property
    def host_records(self) -> int:
        """Experts that lie on no GPU: those that the pool serves."""
        return sum(where in ("ram", "disk") for row in self.placement for where in row)

    @property
    def expert_total(self) -> int:
        return sum(self.expert_bytes.values())

    @property
    def smallest(self) -> int:
        """The smallest budget that this model and context run in."""
        least = sum(each.nbytes * each.least for each in self.slot_classes)
        return _with_reserve(self.total - self.pool + least)

    @property
    def roomy(self) -> int:
        """The smallest budget of memory with which nothing is read from disk once it is loaded."""
        most = sum(each.nbytes * max(each.served, each.least) for each in self.slot_classes)
        return _with_reserve(self.total - self.pool + most)

    def with_slots(self, most: int) -> Plan:
        """The same with no more slots of each size than that."""
        fewer = (replace(each, slots=min(each.slots, most)) for each in self.slot_classes)
        return replace(self, slot_classes=tuple(fewer))

    def to_json(self) -> dict[str, Any]:
        """Fields and what follows from them; `plan_file.read_plan` reads it back."""
        derived = ("slots", "pool", "total", "headroom", "on_disk", "smallest", "roomy", "host_records")
        devices = [asdict(device) | {"total": device.total, "headroom": device.headroom} for device in self.devices]
        fields = asdict(self) | {"devices": devices}
        return {"schema": SCHEMA, **fields, **{name: getattr(self, name) for name in derived}}


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
) -> Plan:
    """The plan of a store under `ram` bytes and those of each GPU, for `batch` sequences of `context` tokens.

    `interpreter` is what Python takes without GPUs. Of several ways to use the GPUs, `rates` decide; experts are
    preferred by `use`, else evenly. Raises DoesNotFitError with the smallest `ram` that works.
    """
    demand = Demand(layout, context, batch, attention, use or uniform_frequency(layout.geometry))
    host = _Host(demand, ram, interpreter)
    found = arrange(demand, gpus, host.slots, rates)
    if found is None:
        raise DoesNotFitError(host.refusal(), host.smallest)
    parts = host.parts(found.cpu_layers)
    if not found.cpu_layers and not found.elsewhere:  # the host only chooses the next token
        parts["work"] = layout.geometry.vocab_size * SAMPLING_BYTES * batch
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
    )


def _classes(found: Arrangement) -> tuple[SlotClass, ...]:
    records, served = found.demand.layout.record_counts, Counter(found.wanted)
    return tuple(SlotClass(nbytes, found.slots[nbytes], count, served[nbytes]) for nbytes, count in records.items())


class _Host:
    """The host's bytes by how many layers lie on the CPU, and the least budget of all that were tried."""

    def __init__(self, demand: Demand, ram: int, interpreter: int) -> None:
        self.demand, self.ram, self.interpreter = demand, ram, interpreter
        self.least = least_slots(demand.layout)
        self.least_bytes = sum(nbytes * count for nbytes, count in self.least.items())
        self._smallest: tuple[int, int] | None = None  # budget, and its layers on the CPU

    def parts(self, cpu_layers: int) -> dict[str, int]:
        demand, layout = self.demand, self.demand.layout
        geometry = demand.geometry
        whole = cpu_layers == geometry.num_layers
        work = work_bytes if cpu_layers else expert_work_bytes
        return {
            "interpreter": self.interpreter + (0 if whole else CUDA_HOST_BYTES),
            "dense": layout.dense.size - len(layout.dense.header) if whole else demand.dense_of(0, cpu_layers),
            "kv_cache": demand.layer_kv * cpu_layers,
            "work": work(geometry, demand.context, demand.attention, demand.batch),
        }

    def slots(self, cpu_layers: int, wanted: Sequence[int]) -> dict[int, int] | None:
        """Slots for records of `wanted` bytes beside what else the host holds; None where too few fit."""
        fixed = sum(self.parts(cpu_layers).values())
        smallest = _with_reserve(fixed + self.least_bytes)
        if self._smallest is None or smallest < self._smallest[0]:
            self._smallest = smallest, cpu_layers
        if self.ram < smallest:
            return None
        room = int((self.ram - RESERVE_BYTES) / (1 + RESERVE_SHARE)) - fixed
        return share_slots(wanted, self.least, room)

    @property
    def smallest(self) -> int:
        assert self._smallest is not None
        return self._smallest[0]

    def refusal(self) -> str:
        assert self._smallest is not None
        smallest, cpu_layers = self._smallest
        parts, tokens = self.parts(cpu_layers), self.demand.context * self.demand.batch
        return (
            f"does not fit {format_bytes(self.ram)} of RAM: needs {format_bytes(smallest)} "
            f"(Python {format_bytes(parts['interpreter'])}, dense weights {format_bytes(parts['dense'])}, "
            f"KV cache for {tokens} tokens {format_bytes(parts['kv_cache'])}, "
            f"work space {format_bytes(parts['work'])}, "
            f"{sum(self.least.values())} experts {format_bytes(self.least_bytes)}); the smallest budget that works is "
            f"{arg('ram', f'{math.ceil(smallest / 2**20)}MiB')}"
        )


def predict(plan: Plan, layout: StoreLayout, rates: Rates, use: ExpertFrequency | None = None) -> Prediction:
    """The plan's speed: decode at half the context, and one chunk of a prompt."""
    demand = Demand(layout, plan.context, plan.batch, "sdpa", use or uniform_frequency(layout.geometry))
    found = Arrangement(plan.layer_devices.count("cpu"), _holdings(plan, demand), plan.slots_by_size, demand)
    tokens = min(PREFILL_CHUNK, plan.context)
    decode = decode_load(found, StepUse.of(demand, plan.batch))
    prefill = prefill_load(found, StepUse.of(demand, tokens), tokens)
    return Prediction(prefill=speed_of(prefill, rates, tokens), decode=speed_of(decode, rates, plan.batch))


def _holdings(plan: Plan, demand: Demand) -> tuple[Holding, ...]:
    found = []
    for device in plan.devices:
        first = plan.layer_devices.index(device.name)
        last = first + plan.layer_devices.count(device.name)
        ranks = [
            rank for rank, (layer, expert) in enumerate(demand.order) if plan.placement[layer][expert] == device.name
        ]
        found.append(Holding(first, last, device, max(ranks, default=-1)))
    return tuple(found)


def default_context(geometry: Geometry) -> int:
    return min(DEFAULT_CONTEXT, geometry.max_position)


def work_bytes(geometry: Geometry, context: int, attention: str, batch: int = 1) -> int:
    """The most that one step allocates besides weights and cache: a prefill chunk's activations.

    Counted from transformers' Mixtral as it is: RMSNorm works in fp32, rotary makes four tensors the size of q,
    the mask is [1, 1, T, context] and is turned into numbers to add, eager attention repeats keys and values for
    every query head and keeps scores in half and twice in fp32.
    """
    tokens = min(max(PREFILL_CHUNK, batch), context * batch)
    hidden, q_rows = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    kept = tokens * hidden * HALF_BYTES * 3  # residual, normed input, output
    norm = tokens * hidden * 4 * 3
    rotary = tokens * q_rows * HALF_BYTES * 6
    mask = tokens * context * (1 + HALF_BYTES)
    if attention == "eager":
        repeated = 2 * context * q_rows * HALF_BYTES * batch
        scores = geometry.num_heads * tokens * context * (HALF_BYTES + 4 + 4) + repeated  # softmax in fp32
    else:
        scores = tokens * q_rows * (HALF_BYTES + 4)
    step = kept + max(norm, rotary + mask + scores, expert_work_bytes(geometry, context, attention, batch))
    sorting = geometry.vocab_size * SAMPLING_BYTES  # of one sequence at a time
    logits = sorting + geometry.vocab_size * HALF_BYTES * batch
    lookahead = geometry.num_layers * hidden * (geometry.num_experts * 4 + HALF_BYTES)  # gates, once more in fp32
    return max(step, kept + logits) + lookahead


def expert_work_bytes(geometry: Geometry, context: int, attention: str, batch: int = 1) -> int:
    """The most that a step's experts allocate, when all else is computed elsewhere."""
    tokens = min(max(PREFILL_CHUNK, batch), context * batch)
    hidden = geometry.hidden_size
    routed = tokens * geometry.experts_per_token * hidden * (HALF_BYTES + 4)
    expert = tokens * geometry.intermediate_size * HALF_BYTES * 3 + tokens * hidden * HALF_BYTES * 2
    return routed + expert + SLOW_PATH_BYTES


def _with_reserve(needed: int) -> int:
    return math.ceil(needed * (1 + RESERVE_SHARE)) + RESERVE_BYTES
