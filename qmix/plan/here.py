"""Plan for the machine that qmix runs on, with the defaults of `qmix.load`."""

from __future__ import annotations

from collections.abc import Sequence

from qmix.disk.places import cache_directory
from qmix.errors import UsageError, arg
from qmix.geometry import Geometry
from qmix.machine.cards import Card, card_named, gpu_budget, typical_card
from qmix.machine.found import default_budget, found_gpus, free_disk, gpu_names, interpreter_memory
from qmix.machine.measured import four_bit_products, measured_gpus, measured_rates
from qmix.machine.rates import Machine, Rates
from qmix.plan.device_memory import CUDA_CONTEXT_BYTES
from qmix.plan.make import make_plan
from qmix.plan.memory import STRUCTURED_BYTES
from qmix.plan.plan import Plan
from qmix.precision.formats import uses_kernels
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout
from qmix.units import format_bytes, parse_bytes, plural, size_option

DEFAULT_CONTEXT = 4096


def default_context(geometry: Geometry) -> int:
    """Return the context where none is given: 4096 tokens, or the model's longest."""
    return min(DEFAULT_CONTEXT, geometry.max_position)


Gpus = Sequence[int | str] | int | str | None  # budgets of GPUs, see `this_machine`


def run_machine(ram: int | str | None = None, gpus: Gpus = None) -> Machine:
    """Return this machine for a run, with `gpus` as `this_machine` takes them, or a single one.

    Raises UsageError where the GPUs are not there or have less free.
    """
    machine = this_machine(ram, [gpus] if isinstance(gpus, int | str) else gpus)
    if gpus is not None:
        check_gpus(machine)
    return machine


def this_machine(ram: int | str | None = None, gpus: Sequence[int | str] | None = None) -> Machine:
    """Return this machine as found and measured.

    `ram` is a budget in place of the free memory. `gpus` are budgets in place of the GPUs that were found: bytes, sizes
    like "24GiB", or names of cards like "RTX 4090", whose published rates then count unless such a card was measured
    here; "none" alone leaves all out. Raises UsageError.
    """
    known = measured_gpus()
    asked = None if gpus is None else _asked(gpus)
    budgets = free_gpus(known.context) if asked is None else tuple(budget for budget, _ in asked)
    cards = found_cards() if asked is None else [card for _, card in asked]
    return Machine(
        ram=default_budget() if ram is None else parse_bytes(ram),
        gpus=budgets,
        disk=free_disk(cache_directory()),
        rates=gpu_rates(measured_rates(), budgets, cards, known.names),
        four_bit=four_bit_products(),
        cuda=known.context,
    )


def _asked(gpus: Sequence[int | str]) -> list[tuple[int, Card | None]]:
    """Return the bytes and the card of each GPU. Raises UsageError."""
    if "none" in gpus:
        if len(gpus) > 1:
            raise UsageError(f"{arg('gpu', 'none')}: not together with other GPUs; leave one of them out")
        return []
    try:
        return [gpu_budget(gpu) for gpu in gpus]
    except UsageError as error:
        raise UsageError(f"{arg('gpu')}: {error.message}") from None


def free_gpus(context: int | None) -> tuple[int, ...]:
    """Return what this process can take of each GPU; its own context of CUDA, made by asking, is a part of that."""
    return tuple(free + (context or CUDA_CONTEXT_BYTES) for free in found_gpus())


def found_cards() -> list[Card | None]:
    """Return the cards of the GPUs that were found, None for a card that is not in the table."""
    return [_card_of(name, nbytes) for name, nbytes in gpu_names()]


def gpu_rates(
    rates: Rates, budgets: Sequence[int], named: Sequence[Card | None] = (), measured: Sequence[str] = ()
) -> Rates:
    """Return `rates` with the GPUs' of the cards that were `named`, or of typical ones for these budgets.

    Rates that were measured stay, unless a card was named that is none of the `measured` ones. Of several cards each
    rate is the slowest one's.
    """
    cards = [card for card in named if card is not None]
    if not budgets:
        return rates
    if cards and not all(any(_card_of(name, card.budget) == card for name in measured) for card in cards):
        return rates.with_card(_slowest(cards), _names(cards), named=True)
    missing = [name for name in ("gpu_memory", "gpu_matmul", "pcie") if rates.source(name) == "typical"]
    if not missing:
        return rates
    cards = cards or [typical_card(budget) for budget in budgets]
    return rates.with_card({name: _slowest(cards)[name] for name in missing}, _names(cards), named=any(named))


def _card_of(name: str, nbytes: int) -> Card | None:
    """Return the card that a driver names, with about so many bytes; None where it is not in the table."""
    try:
        return card_named(name, nbytes)
    except UsageError:
        return None


def _slowest(cards: Sequence[Card]) -> dict[str, float]:
    return {name: min(card.rates[name] for card in cards) for name in cards[0].rates}


def _names(cards: Sequence[Card]) -> str:
    return " and ".join(dict.fromkeys(card.name for card in cards))


def check_gpus(machine: Machine) -> None:
    """Raise UsageError where this computer has not the GPUs, or not the free memory on them, of `machine`."""
    if not machine.gpus:
        return
    free = free_gpus(machine.cuda)
    if len(free) < len(machine.gpus):
        have = plural(len(free), "GPU") if free else "no GPU"
        why = "" if free else f"; `qmix doctor` tells more, and {arg('gpu', 'none')} runs on the CPU"
        raise UsageError(f"{arg('gpu')}: {plural(len(machine.gpus), 'GPU')} given, and torch finds {have} here{why}")
    for index, (budget, most) in enumerate(zip(machine.gpus, free, strict=False)):
        if budget > most:
            small = f"{size_option(budget)} is more than what is free on gpu:{index}"
            raise UsageError(f"{arg('gpu')}: {small}; give {arg('gpu', size_option(most, up=False))}")


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
    cuda = on.cuda or CUDA_CONTEXT_BYTES
    return make_plan(layout, on.ram, tokens, own, attention, batch, gpus=on.gpus, rates=on.speeds, use=use, cuda=cuda)
