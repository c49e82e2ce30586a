"""Plan for the machine that qmix runs on, with the defaults of `qmix.load`."""

from __future__ import annotations

from collections.abc import Sequence

from qmix.disk.places import cache_directory
from qmix.errors import UsageError, arg
from qmix.geometry import Geometry
from qmix.machine.found import default_budget, found_gpus, free_disk, interpreter_memory
from qmix.machine.measured import four_bit_products, measured_rates
from qmix.machine.rates import Machine
from qmix.plan.make import make_plan
from qmix.plan.memory import STRUCTURED_BYTES
from qmix.plan.plan import Plan
from qmix.precision.formats import uses_kernels
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout
from qmix.units import format_bytes, parse_bytes

DEFAULT_CONTEXT = 4096


def default_context(geometry: Geometry) -> int:
    """Return the context where none is given: 4096 tokens, or the model's longest."""
    return min(DEFAULT_CONTEXT, geometry.max_position)


def this_machine(ram: int | str | None = None, gpus: Sequence[int] | None = None) -> Machine:
    """Return this machine as found and measured; `ram` and `gpus` are budgets in place of the free memory."""
    budget = default_budget() if ram is None else parse_bytes(ram)
    return Machine(
        ram=budget,
        gpus=found_gpus() if gpus is None else tuple(gpus),
        disk=free_disk(cache_directory()),
        rates=measured_rates(),
        four_bit=four_bit_products(),
    )


def python_bytes(geometry: Geometry) -> int:
    """Return the bytes that Python takes with all that a run of this geometry imports."""
    return interpreter_memory(kernels=uses_kernels(geometry))


def check_structured(geometry: Geometry, plan: Plan) -> None:
    """Raise UsageError where a plan has no room for answers with a grammar."""
    if plan.ram - plan.total < STRUCTURED_BYTES and plan.interpreter - python_bytes(geometry) < STRUCTURED_BYTES:
        need = f"takes {format_bytes(STRUCTURED_BYTES)} that the plan does not have"
        raise UsageError(f"{arg('json_schema')}: {need}; load the model with structured=True, and without a plan file")


def plan_for(
    layout: StoreLayout,
    ram: int | str | None,
    context: int | None,
    attention: str = "sdpa",
    batch: int = 1,
    *,
    machine: Machine | None = None,
    use: ExpertFrequency | None = None,
    structured: bool = False,
) -> Plan:
    """Return the plan of a store on `machine`, by default this one. Raises UsageError and DoesNotFitError.

    `structured` leaves room for answers with a grammar.
    """
    longest = layout.geometry.max_position
    if context is not None and not 1 <= context <= longest:
        raise UsageError(f"{arg('context')} {context}: must be 1 to {longest}, the model's longest")
    on = machine or this_machine(ram)
    tokens = context or default_context(layout.geometry)
    own = python_bytes(layout.geometry) + (STRUCTURED_BYTES if structured else 0)
    return make_plan(layout, on.ram, tokens, own, attention, batch, gpus=on.gpus, rates=on.speeds, use=use)
