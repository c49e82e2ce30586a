"""The plan of a run: the bytes of each part, and where each layer and expert lies."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from qmix.plan.memory import PREFILL_CHUNK, with_reserve
from qmix.plan.slots import SlotClass

SCHEMA = "qmix-plan-4"


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Bytes of each part of a run on one GPU, whose ceiling is `budget`. `experts` are the residents.

    `cuda` is CUDA's own context, which torch does not count.
    """

    name: str  # "gpu:0"
    budget: int
    dense: int
    kv_cache: int
    experts: int
    work: int
    cuda: int = 0

    @property
    def total(self) -> int:
        """The predicted peak of torch's allocations."""
        return self.dense + self.kv_cache + self.experts + self.work

    @property
    def headroom(self) -> int:
        """Bytes that the budget leaves free, the allocator's slack included."""
        return self.budget - self.total - self.cuda


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of each part of a run, and where each layer and expert lies.

    `interpreter`, `dense`, `kv_cache`, `work` and the pool are the host's. `layer_devices` names the device of each
    layer's dense weights and KV cache, "cpu" or "gpu:0"; embeddings lie with the first layer, the last norm and the
    head with the last. `placement` is [layer][expert]: "gpu:0" for a resident, which stays there, "ram" or "disk" for
    where each other expert is at the start; use decides which of them the pool holds later. `slot_classes` are the
    pool's slots, one class for each size of record. `prefill` is how many tokens of prompts go through a layer
    together, and `prefill_work` the part of the host's `work` that more than one chunk takes.
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
    prefill: int = PREFILL_CHUNK
    prefill_work: int = 0

    @property
    def slots(self) -> int:
        """Slots of all sizes together."""
        return sum(each.slots for each in self.slot_classes)

    @property
    def slots_by_size(self) -> dict[int, int]:
        """Slots by the bytes of the records that they hold, as a pool takes them."""
        return {each.nbytes: each.slots for each in self.slot_classes}

    @property
    def pool(self) -> int:
        """Bytes of all slots."""
        return sum(each.nbytes * each.slots for each in self.slot_classes)

    @property
    def total(self) -> int:
        """The predicted peak of resident memory."""
        return self.interpreter + self.dense + self.kv_cache + self.work + self.pool

    @property
    def headroom(self) -> int:
        """Bytes that the budget leaves free, the reserve for page tables and allocator slack included."""
        return self.ram - self.total

    @property
    def on_disk(self) -> int:
        """Bytes of the expert records that neither a GPU nor the pool has room for."""
        return sum(each.nbytes * each.on_disk for each in self.slot_classes)

    @property
    def records_on_disk(self) -> int:
        """The number of the records that neither a GPU nor the pool has room for."""
        return sum(each.on_disk for each in self.slot_classes)

    @property
    def host_records(self) -> int:
        """The number of experts that lie on no GPU, which the pool serves."""
        return sum(where in ("ram", "disk") for row in self.placement for where in row)

    @property
    def expert_total(self) -> int:
        """Bytes of all expert records."""
        return sum(self.expert_bytes.values())

    @property
    def smallest(self) -> int:
        """The smallest budget that this model and context run in."""
        least = sum(each.nbytes * each.least for each in self.slot_classes)
        return with_reserve(self.total - self.prefill_work - self.pool + least)

    @property
    def roomy(self) -> int:
        """The smallest budget with which nothing is read from disk once the experts are loaded."""
        most = sum(each.nbytes * max(each.served, each.least) for each in self.slot_classes)
        return with_reserve(self.total - self.prefill_work - self.pool + most)

    def with_slots(self, most: int) -> Plan:
        """Return the plan with at most `most` slots of each size."""
        fewer = (replace(each, slots=min(each.slots, most)) for each in self.slot_classes)
        return replace(self, slot_classes=tuple(fewer))

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the figures that follow from them; `qmix.plan.file.read_plan` reads them back."""
        derived = ("slots", "pool", "total", "headroom", "on_disk", "smallest", "roomy", "host_records")
        devices = [asdict(device) | {"total": device.total, "headroom": device.headroom} for device in self.devices]
        fields = asdict(self) | {"devices": devices}
        return {"schema": SCHEMA, **fields, **{name: getattr(self, name) for name in derived}}
