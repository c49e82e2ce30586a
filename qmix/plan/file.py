"""Reading a plan that `qmix plan --json` wrote, and refusing one that this model or machine cannot run.

Loads no torch unless the plan has GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qmix.errors import UsageError
from qmix.files import read_object
from qmix.layout import StoreLayout
from qmix.machine import available_memory, found_gpus, own_memory
from qmix.plan import SCHEMA, Plan
from qmix.plan.demand import DevicePlan
from qmix.plan.slots import SlotClass
from qmix.units import format_bytes

AGAIN = "make it again with `qmix plan --json`"


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A plan as a file has it, with what it was made for. `precision` is as `--precision` takes it."""

    path: Path
    plan: Plan
    attention: str
    precision: str | None
    model: dict[str, Any]

    def plan_of(self, layout: StoreLayout, fingerprint: str | None = None, attention: str = "sdpa") -> Plan:
        """The plan, for a store of this layout on this machine. Raises UsageError where it is for another."""
        if attention != self.attention:
            needed = f"made for --attn {self.attention}, which takes other work space than {attention}"
            raise UsageError(f"{self.path}: is {needed}; give the same, or {AGAIN}")
        self._check_model(layout, fingerprint)
        self._check_machine()
        return self.plan

    def _check_model(self, layout: StoreLayout, fingerprint: str | None) -> None:
        name, known = self.model["name"], self.model["fingerprint"]
        if any(self.model["geometry"].get(key) != getattr(layout.geometry, key) for key in layout.geometry.__slots__):
            raise UsageError(f"{self.path}: is a plan of {name}, a model of other sizes than this one; {AGAIN}")
        precisions = tuple(map(tuple, self.model["precisions"]))
        if (precisions, self.model["dtype"]) != (layout.precisions, layout.dtype):
            raise UsageError(f"{self.path}: is a plan of {name} in another precision than this store's; {AGAIN}")
        if known and fingerprint and known != fingerprint:
            raise UsageError(f"{self.path}: is a plan of {name}, whose weights are not this model's; {AGAIN}")

    def _check_machine(self) -> None:
        free = own_memory() + available_memory()
        if self.plan.total > free:
            need = f"takes {format_bytes(self.plan.total)} of memory, {format_bytes(free)} are free here"
            raise UsageError(f"{self.path}: {need}; {AGAIN} on this machine, with a smaller --ram")
        if not self.plan.devices:
            return
        gpus = found_gpus()
        for device in self.plan.devices:
            index = int(device.name.removeprefix("gpu:"))
            if index >= len(gpus):
                raise UsageError(f"{self.path}: wants {device.name}, this machine has {len(gpus)} GPUs; {AGAIN} here")
            if device.total > gpus[index]:
                need = f"takes {format_bytes(device.total)} of {device.name}, {format_bytes(gpus[index])} are free"
                raise UsageError(f"{self.path}: {need}; {AGAIN} on this machine")


def read_plan(path: Path) -> PlanFile:
    """Raises UsageError naming the file."""
    content = read_object(path, SCHEMA, "what `qmix plan --json` wrote", AGAIN)
    if content.get("fits") is not True:
        raise UsageError(f"{path}: says that the model does not fit; {AGAIN}, with a larger budget")
    try:
        found = PlanFile(
            path, _plan(content), str(content["attention"]), content["model"]["precision"], content["model"]
        )
        if not _consistent(found):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UsageError(f"{path}: damaged; {AGAIN}") from None
    return found


def _plan(content: dict[str, Any]) -> Plan:
    values = {field.name: content[field.name] for field in fields(Plan)}
    names = [field.name for field in fields(DevicePlan)]
    values["devices"] = tuple(DevicePlan(**{name: device[name] for name in names}) for device in content["devices"])
    values["slot_classes"] = tuple(SlotClass(**each) for each in content["slot_classes"])
    values["layer_devices"] = tuple(content["layer_devices"])
    values["placement"] = tuple(map(tuple, content["placement"]))
    return Plan(**values)


def _consistent(file: PlanFile) -> bool:
    """Whether every number is one, and layers, experts and devices are those of one model and machine."""
    plan, geometry = file.plan, file.model["geometry"]
    names = {device.name for device in plan.devices}
    counts = [plan.ram, plan.context, plan.batch, plan.interpreter, plan.dense, plan.kv_cache, plan.work]
    counts += [count for each in plan.slot_classes for count in (each.nbytes, each.slots, each.records, each.served)]
    counts += [count for device in plan.devices for count in (device.budget, device.total)]
    shape = len(plan.placement), {len(row) for row in plan.placement}
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and shape == (geometry["num_layers"], {geometry["num_experts"]})
        and len(plan.layer_devices) == geometry["num_layers"]
        and names.union({"cpu"}).issuperset(plan.layer_devices)
        and names.union({"ram", "disk"}).issuperset(where for row in plan.placement for where in row)
        and all(each.least <= each.slots <= max(each.served, each.least) for each in plan.slot_classes)
        and sum(each.records for each in plan.slot_classes) == plan.num_records
        and sum(each.served for each in plan.slot_classes) == plan.host_records
        and plan.total <= plan.ram
        and all(device.total <= device.budget for device in plan.devices)
    )
