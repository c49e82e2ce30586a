"""Plans for the machine that qmix runs on, with the defaults of `qmix.load`."""

from __future__ import annotations

from collections.abc import Sequence

from qmix.disk.places import cache_directory
from qmix.errors import UsageError, arg
from qmix.machine.found import default_budget, found_gpus, free_disk, interpreter_memory
from qmix.machine.measured import four_bit_products, measured_rates
from qmix.machine.rates import Machine
from qmix.plan import Plan, default_context, make_plan
from qmix.precision.formats import uses_kernels
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout
from qmix.units import parse_bytes


def this_machine(ram: int | str | None = None, gpus: Sequence[int] | None = None) -> Machine:
    """This machine as it is found and was measured, with the memory that is given."""
    budget = default_budget() if ram is None else parse_bytes(ram)
    return Machine(
        ram=budget,
        gpus=found_gpus() if gpus is None else tuple(gpus),
        disk=free_disk(cache_directory()),
        rates=measured_rates(),
        four_bit=four_bit_products(),
    )


def plan_for(
    layout: StoreLayout,
    ram: int | str | None,
    context: int | None,
    attention: str = "sdpa",
    batch: int = 1,
    *,
    machine: Machine | None = None,
    use: ExpertFrequency | None = None,
) -> Plan:
    """The plan of a store on a machine, by default this one, with the defaults that `qmix.load` has."""
    longest = layout.geometry.max_position
    if context is not None and not 1 <= context <= longest:
        raise UsageError(f"{arg('context')} {context}: must be 1 to {longest}, the model's longest")
    on = machine or this_machine(ram)
    tokens = context or default_context(layout.geometry)
    own = interpreter_memory(kernels=uses_kernels(layout.geometry))
    return make_plan(layout, on.ram, tokens, own, attention, batch, gpus=on.gpus, rates=on.speeds, use=use)
