"""Plan a scoring pass: how many tokens go through together, and how many experts stay in memory. Loads no torch.

A pass reads every expert without a slot once, whatever its number of tokens. Where not all experts fit, memory brings
more as room for tokens than as slots: with room M for both, R records of S bytes and t bytes a token, a token costs
(1 - s / R) / ((M - s S) / t) of reading all experts, which falls with s only if M > R S, when all fit anyway. So
either every expert has a slot, or tokens come first, up to where a pass computes far longer than it reads. The rest of
the room goes to slots again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qmix.errors import DoesNotFitError, UsageError, arg
from qmix.machine.found import default_budget, interpreter_memory
from qmix.plan.memory import scoring_fixed_bytes, scoring_token_bytes, usable_bytes, with_reserve
from qmix.plan.slots import least_slots, share_slots
from qmix.store.expert_frequency import by_frequency, uniform_frequency
from qmix.store.layout import StoreLayout
from qmix.units import format_bytes, size_option

MOST_TOKENS = 2**14  # of a pass: reading is a small part of it then, even for 8x22B and many fast cores
ENOUGH_TOKENS = 2**11  # from here on, slots to read ahead are worth more than still more tokens
SLOTS_AHEAD = 8  # of each size, with which the pool reads two records ahead


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    """A pass of `tokens` rows, and a pool of `slots` by the bytes of their records; `total` bytes in all.

    Sequences have `longest` tokens at most.
    """

    ram: int
    tokens: int
    longest: int
    slots: dict[int, int]
    total: int


def plan_scoring(
    layout: StoreLayout,
    longest: int,
    rows: int,
    ram: int | None = None,
    held: int = 0,
    batch_tokens: int | None = None,
) -> ScoringPlan:
    """Return the plan for `rows` tokens in sequences of at most `longest`; `held` are bytes that the caller takes.

    Raises DoesNotFitError, and UsageError where a sequence is longer than `batch_tokens`.
    """
    if batch_tokens is not None and batch_tokens < longest:
        raise UsageError(
            f"{arg('batch_tokens')} {batch_tokens}: must be at least {longest}, the tokens of the longest request"
        )
    budget = default_budget() if ram is None else ram
    fixed = scoring_fixed_bytes(layout, longest) + interpreter_memory(kernels=True) + held
    each, least = scoring_token_bytes(layout.geometry), least_slots(layout)
    smallest = with_reserve(fixed + longest * each + _bytes(least))
    if budget < smallest:
        raise does_not_fit(budget, f"requests of up to {longest} tokens", smallest)
    room = usable_bytes(budget) - fixed
    wanted = max(longest, min(rows, batch_tokens or MOST_TOKENS))
    enough = max(longest, min(wanted, ENOUGH_TOKENS)) * each
    every = layout.record_counts
    ahead = {nbytes: min(count, SLOTS_AHEAD) for nbytes, count in every.items()}
    kept = next((slots for slots in (every, ahead) if room - _bytes(slots) >= enough), least)
    tokens = min(wanted, (room - _bytes(kept)) // each)
    order = [layout.record(*key).nbytes for key in by_frequency(layout, uniform_frequency(layout.geometry))]
    slots = share_slots(order, least, room - tokens * each)
    tokens = min(wanted, (room - _bytes(slots)) // each)
    return ScoringPlan(budget, tokens, longest, slots, fixed + tokens * each + _bytes(slots))


def does_not_fit(budget: int, requests: str, smallest: int) -> DoesNotFitError:
    """Return the refusal of a budget that is too small for the model and requests."""
    return DoesNotFitError(
        f"does not fit {format_bytes(budget)} of RAM: the model and {requests} take {format_bytes(smallest)}; "
        f"the smallest budget that works is {arg('ram', size_option(smallest))}",
        smallest,
    )


def _bytes(slots: Mapping[int, int]) -> int:
    return sum(nbytes * count for nbytes, count in slots.items())
