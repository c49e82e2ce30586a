"""Keep the residents of GPUs that a run ended with: the next run with the same plan begins with them.

Runs of one stream exchange residents for experts that are used more (`qmix.model.gpu.promotion`), which takes some
tokens to find out. What one run has found is kept in the user's state directory, for the same store, planned places,
GPUs and processor. A file that is damaged, or does not fit the plan, is as good as none. A kept placement changes a
text at most as any other placement does: by the rounding of another kernel.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from qmix.disk.places import state_directory
from qmix.files import read_state, write_whole
from qmix.machine.found import cpu_name
from qmix.model.gpu.spread import residents as planned
from qmix.plan import Plan
from qmix.pool.eviction import Key
from qmix.store.opened import Store

Place = tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


class _Kept(msgspec.Struct, frozen=True):
    """The file's content: (layer, expert) of every resident of a plan's GPUs, and what they belong to."""

    schema: Literal["qmix-placement-1"]
    belongs_to: str
    residents: list[Place]


def identity(store: Store, plan: Plan, cards: Iterable[str]) -> str:
    """Return a digest of all that a kept placement depends on; `cards` are the GPUs' names.

    Of the plan it is where each layer and expert lies. Budgets count as far as they change that: without a limit they
    follow the memory that happens to be free.
    """
    parts = [store.digest, plan.layer_devices, plan.placement, list(cards), cpu_name()]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def with_kept(store: Store, plan: Plan, cards: Sequence[str]) -> Plan:
    """Return the plan with the residents that an earlier run by it ended with; as it is where none are kept."""
    belongs = identity(store, plan, cards)
    kept = read_state(_path(belongs), _Kept)
    if kept is None or kept.belongs_to != belongs or not fits(store, plan, kept.residents):
        return plan
    return exchanged(plan, kept.residents)


def keep(store: Store, plan: Plan, cards: Sequence[str], residents: Iterable[Key]) -> None:
    """Keep the residents that a run by `plan` ended with, where they are others than the plan's.

    What cannot be written is not kept: the next run begins with the plan's residents.
    """
    found, belongs = sorted(residents), identity(store, plan, cards)
    if not fits(store, plan, found):  # a run that was stopped amid an exchange
        return
    content = msgspec.json.encode(_Kept("qmix-placement-1", belongs, found)) + b"\n"
    path = _path(belongs)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


def fits(store: Store, plan: Plan, residents: Sequence[Key]) -> bool:
    """Return whether as many experts of each layer and precision are residents as in the plan, and none twice."""
    precisions = store.layout.precisions
    known = all(layer < len(precisions) and expert < len(precisions[layer]) for layer, expert in residents)
    if not known or len(set(residents)) != len(residents):
        return False
    wanted, found = (
        Counter((layer, precisions[layer][expert]) for layer, expert in keys) for keys in (planned(plan), residents)
    )
    return wanted == found


def exchanged(plan: Plan, residents: Iterable[Key]) -> Plan:
    """Return the plan with these residents; an expert that is none any more lies where one of the new ones did."""
    now, before = set(residents), set(planned(plan))
    placement = [list(row) for row in plan.placement]
    for layer, row in enumerate(placement):
        arriving = [expert for expert in range(len(row)) if (layer, expert) in now - before]
        leaving = [expert for expert in range(len(row)) if (layer, expert) in before - now]
        for one, other in zip(arriving, leaving, strict=True):
            row[one], row[other] = row[other], row[one]
    return replace(plan, placement=tuple(map(tuple, placement)))


def _path(belongs: str) -> Path:
    return state_directory() / "placements" / f"{belongs[:32]}.json"
