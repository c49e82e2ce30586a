"""Read a plan that `qmix plan --json` wrote, and refuse one that this model or machine cannot run.

Loads no torch unless the plan has GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from qmix.errors import UsageError, arg
from qmix.files import read_versioned
from qmix.machine.found import available_memory, found_gpus, own_memory
from qmix.plan.here import python_bytes
from qmix.plan.memory import MOST_PREFILL, PREFILL_CHUNK, prefill_bytes
from qmix.plan.plan import SCHEMA, Plan
from qmix.store.layout import StoreLayout
from qmix.units import format_bytes, plural

AGAIN = "make it again with `qmix plan --json`"
DEVICE = re.compile(r"gpu:\d{1,4}", re.ASCII)
MOST = 2**63  # of any number: the limit of addresses in memory and files


class _Sizes(msgspec.Struct, frozen=True):
    """The parts of a model's geometry that the plan's tables must agree with."""

    num_layers: int
    num_experts: int
    max_position: int


class _Model(msgspec.Struct, frozen=True):
    """The model that a plan was made for; `precision` as `--precision` takes it."""

    name: str
    fingerprint: str | None
    precision: str | None
    precisions: tuple[tuple[str, ...], ...]
    dtype: str
    geometry: dict[str, Any]


class _Fits(msgspec.Struct):
    fits: bool


class _Planned(msgspec.Struct):
    """A plan's file, besides the fields of Plan itself."""

    attention: str
    model: _Model


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A plan from a file, with the attention and the model that it was made for."""

    path: Path
    plan: Plan
    attention: str
    model: _Model

    @property
    def precision(self) -> str | None:
        """The model's precision as `--precision` takes it."""
        return self.model.precision

    def plan_of(self, layout: StoreLayout, fingerprint: str | None = None, attention: str = "sdpa") -> Plan:
        """Return the plan. Raises UsageError where it is for another store, attention or machine."""
        if attention != self.attention:
            needed = f"made for {arg('attention', self.attention)}, which needs other work space than {attention}"
            raise UsageError(f"{self.path}: is {needed}; give the same, or {AGAIN}")
        self._check_model(layout, fingerprint)
        self._check_python(layout)
        self._check_machine()
        return self.plan

    def _check_model(self, layout: StoreLayout, fingerprint: str | None) -> None:
        name, known = self.model.name, self.model.fingerprint
        if self.model.geometry != asdict(layout.geometry):
            raise UsageError(f"{self.path}: is a plan of {name}, a model of other sizes than this one; {AGAIN}")
        if (self.model.precisions, self.model.dtype) != (layout.precisions, layout.dtype):
            raise UsageError(f"{self.path}: is a plan of {name} in another precision than this store's; {AGAIN}")
        prefill = prefill_bytes(layout.geometry, self.plan.context, self.plan.prefill, self.plan.batch)
        if not self.plan.devices and prefill > self.plan.prefill_work:
            raise UsageError(f"{self.path}: damaged: prefill_work; {AGAIN}")
        if known and fingerprint and known != fingerprint:
            raise UsageError(f"{self.path}: is a plan of {name}, whose weights are not this model's; {AGAIN}")

    def _check_python(self, layout: StoreLayout) -> None:
        """Check that Python's own bytes leave the rest its room; in a program of the user's they are more."""
        plan, found = self.plan, python_bytes(layout.geometry)
        if not plan.devices and plan.total - plan.interpreter + found > plan.ram:
            planned = f"Python takes {format_bytes(found)} here, and {format_bytes(plan.interpreter)} in the plan"
            raise UsageError(f"{self.path}: {planned}; give {arg('ram')} in place of the plan")

    def _check_machine(self) -> None:
        free = own_memory() + available_memory()
        if self.plan.total > free:
            need = f"takes {format_bytes(self.plan.total)} of memory, {format_bytes(free)} are free here"
            raise UsageError(f"{self.path}: {need}; {AGAIN} on this machine, with a smaller {arg('ram')}")
        if not self.plan.devices:
            return
        gpus = found_gpus()
        for device in self.plan.devices:
            index = int(device.name.removeprefix("gpu:"))
            if index >= len(gpus):
                raise UsageError(
                    f"{self.path}: wants {device.name}, this machine has {plural(len(gpus), 'GPU')}; {AGAIN} here"
                )
            if device.total > gpus[index]:
                need = f"takes {format_bytes(device.total)} of {device.name}, {format_bytes(gpus[index])} are free"
                raise UsageError(f"{self.path}: {need}; {AGAIN} on this machine")


def read_plan(path: Path) -> PlanFile:
    """Return a plan from a file. Raises UsageError with the file, and the field if its content is wrong."""
    asked = SCHEMA, "what `qmix plan --json` wrote", AGAIN
    if not read_versioned(path, _Fits, *asked).fits:
        raise UsageError(f"{path}: says that the model does not fit; {AGAIN}, with a larger budget")
    planned = read_versioned(path, _Planned, *asked)
    found = PlanFile(path, read_versioned(path, Plan, *asked), planned.attention, planned.model)
    try:
        sizes = msgspec.convert(found.model.geometry, _Sizes)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: damaged: geometry: {error}; {AGAIN}") from None
    for what, holds in _checks(found, sizes):
        if not holds:
            raise UsageError(f"{path}: damaged: {what}; {AGAIN}")
    return found


def _checks(file: PlanFile, sizes: _Sizes) -> Iterator[tuple[str, bool]]:
    """Yield the name and the result of each check: parts agree in one model's layers and one machine's bytes."""
    plan, model = file.plan, file.model
    yield "a number", all(0 <= count < MOST for count in _counts(plan))
    yield "batch", plan.batch >= 1
    yield "context", 1 <= plan.context <= sizes.max_position
    for name, table in (("placement", plan.placement), ("precisions", model.precisions)):
        yield name, (len(table), {len(row) for row in table}) == (sizes.num_layers, {sizes.num_experts})
    names = {device.name for device in plan.devices}
    yield "devices", len(names) == len(plan.devices) and all(DEVICE.fullmatch(name) for name in names)
    yield "devices", all(device.total + device.cuda <= device.budget for device in plan.devices)
    yield "layer_devices", len(plan.layer_devices) == sizes.num_layers
    yield "layer_devices", names <= set(plan.layer_devices) <= names | {"cpu"}
    yield "placement", {where for row in plan.placement for where in row} <= names | {"ram", "disk"}
    yield "slot_classes", all(each.least <= each.slots <= max(each.served, each.least) for each in plan.slot_classes)
    yield "slot_classes", len(plan.slots_by_size) == len(plan.slot_classes)
    yield "num_records", sum(each.records for each in plan.slot_classes) == plan.num_records
    yield "placement", sum(each.served for each in plan.slot_classes) == plan.host_records
    yield "ram", plan.total <= plan.ram
    yield "prefill", plan.prefill in range(PREFILL_CHUNK, MOST_PREFILL + 1, PREFILL_CHUNK)
    yield "prefill_work", plan.prefill_work <= plan.work


def _counts(plan: Plan) -> Iterator[int]:
    """Yield every number of a plan."""
    for part in (asdict(plan), *map(asdict, plan.slot_classes), *map(asdict, plan.devices), plan.expert_bytes):
        yield from (value for value in part.values() if type(value) is int)
