"""A model's profile: how often its experts are used, and the errors that quantisation makes in them.

    {"schema": "qmix-profile-2",
     "model": {"name": "org/name", "fingerprint": "3f..." or null},
     "use": [[0.31, 0.22, ...], ...],            [layer][expert]: share of tokens routed to it; a layer's sum is k
     "errors": {"nf4": [[0.8, ...], ...], ...},  optional: each expert's quantisation error, by precision
     "precisions": [["nf4", ...], ...],          optional: chosen for a number of bytes
     "policy": "lfu"}                            optional: the eviction policy that replay found best

`qmix calibrate` writes it, with further fields for people to read. `fingerprint` is the checkpoint's, as in a store's
manifest; where both are known they must be equal. Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from qmix.disk.faults import write_advice
from qmix.errors import QmixError, UsageError, arg
from qmix.files import read_versioned, written_whole
from qmix.geometry import Geometry
from qmix.precision.formats import PRECISIONS
from qmix.precision.record import record_layout
from qmix.store.allocation import Allocator, Precisions, too_small

SCHEMA = "qmix-profile-2"
AGAIN = "make the profile again with `qmix calibrate`"
SUM_TOLERANCE = 0.02  # of a layer's shares
AUTO = "auto"  # as a precision: the profile's own

Table = tuple[tuple[float, ...], ...]  # [layer][expert]
POLICIES = ("lru", "lfu", "uses-per-time")  # names of eviction policies, implemented in `qmix.pool.eviction`


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile as it is used. `use` and `precisions` are [layer][expert], `errors` by precision."""

    name: str
    fingerprint: str | None
    use: Table
    errors: Mapping[str, Table] = field(default_factory=dict)
    precisions: Precisions | None = None
    policy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of the profile's file."""
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "model": {"name": self.name, "fingerprint": self.fingerprint},
            "use": [list(row) for row in self.use],
        }
        if self.errors:
            found["errors"] = {name: [list(row) for row in table] for name, table in self.errors.items()}
        if self.precisions is not None:
            found["precisions"] = [list(row) for row in self.precisions]
        if self.policy is not None:
            found["policy"] = self.policy
        return found

    def allocator(self, geometry: Geometry, dtype: str) -> Allocator:
        """Return the allocator over precisions that a store can hold. Raises UsageError without any errors."""
        storable = {name: table for name, table in self.errors.items() if name in PRECISIONS}
        if not storable:
            raise UsageError(f"the profile of {self.name} has no quantisation errors; {AGAIN}")
        exact = tuple(tuple(0.0 for _ in row) for row in self.use)
        errors = {**storable, "half": exact}
        return Allocator(errors, {name: record_layout(geometry, name, dtype).nbytes for name in errors})

    def spec(self, precision: str | None, budget: int | None, geometry: Geometry, dtype: str) -> str | None:
        """Return the precisions that an option's `precision` and a `budget` select, in the syntax of parse_precisions.

        With `auto`, or neither given, they are the profile's own; None if neither is given and the profile has none.
        Raises what `auto` raises.
        """
        if precision not in (None, AUTO):
            return precision
        nothing = precision is None and budget is None and self.precisions is None
        return None if nothing else self.auto(budget, geometry, dtype)

    def auto(self, budget: int | None, geometry: Geometry, dtype: str) -> str:
        """Return the precisions of least error within `budget`, or without one the profile's own, as `spec` does.

        Raises UsageError where there is neither, DoesNotFitError where the budget is too small.
        """
        if budget is not None:
            return precision_spec(self.allocator(geometry, dtype).within(budget).precisions)
        if self.precisions is None:
            auto = f"{arg('precision')} {AUTO}"
            raise UsageError(f"{auto}: the profile has no precisions; give a {arg('budget')} for the experts' bytes")
        return precision_spec(self.precisions)


def check_budget(budget: int, geometry: Geometry, dtype: str) -> None:
    """Raise DoesNotFitError where the budget does not hold all experts in any precision."""
    smallest = geometry.num_records * min(record_layout(geometry, name, dtype).nbytes for name in PRECISIONS)
    if budget < smallest:
        raise too_small(budget, smallest)


def precision_spec(precisions: Sequence[Sequence[str]]) -> str:
    """Return the shortest parse_precisions syntax of a table [layer][expert]: the commonest, then what differs."""
    common = _commonest([name for row in precisions for name in row])
    rules = [common]
    for layer, row in enumerate(precisions):
        here = _commonest(row)
        if here != common:
            rules.append(f"{layer}.*={here}")
        rules += [f"{layer}.{expert}={name}" for expert, name in enumerate(row) if name != here]
    return ",".join(rules)


def _commonest(names: Sequence[str]) -> str:
    return max(dict.fromkeys(names), key=names.count)


class _Model(msgspec.Struct):
    name: str
    fingerprint: str | None = None


class _Content(msgspec.Struct):
    """The content of a profile's file."""

    model: _Model
    use: Table
    errors: dict[str, Table] = {}
    precisions: Precisions | None = None
    policy: str | None = None


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises UsageError naming the file, and the field that is not as a profile has it."""
    content = read_versioned(path, _Content, SCHEMA, "a profile", AGAIN)
    model = content.model
    return Profile(model.name, model.fingerprint, content.use, content.errors, content.precisions, content.policy)


def write_profile(path: Path, content: Mapping[str, Any]) -> None:
    """Write a profile's JSON (`to_json`, with any further fields) in one step. Raises QmixError naming the file."""
    try:
        with written_whole(path) as file:
            file.write(json.dumps(content).encode() + b"\n")
    except OSError as error:
        advice = write_advice(error, "choose another path")
        raise QmixError(f"{path}: {error.strerror}; the profile was not written: {advice}") from None


def check_profile(profile: Profile, path: Path, geometry: Geometry, fingerprint: str | None) -> None:
    """Raise UsageError where a profile belongs to another model, or one of its numbers is impossible."""
    tables = [profile.use, *profile.errors.values(), *([profile.precisions] if profile.precisions else [])]
    shape = (geometry.num_layers, {geometry.num_experts})
    if any((len(table), {len(row) for row in table}) != shape for table in tables):
        raise UsageError(f"{path}: is a profile of {profile.name}, which has other layers or experts than this model")
    if fingerprint and profile.fingerprint and fingerprint != profile.fingerprint:
        raise UsageError(f"{path}: is a profile of {profile.name}, whose weights are not this model's")
    if any(not 0 <= share <= 1 for row in profile.use for share in row):
        raise UsageError(f"{path}: a frequency is not between 0 and 1; {AGAIN}")
    experts = geometry.experts_per_token
    if any(abs(sum(row) - experts) > SUM_TOLERANCE * experts for row in profile.use):
        raise UsageError(f"{path}: a layer's frequencies do not add up to {experts}")
    if any(not 0 <= error < float("inf") for table in profile.errors.values() for row in table for error in row):
        raise UsageError(f"{path}: an expert's error is not a number of at least 0; {AGAIN}")
    if any(name not in PRECISIONS for row in profile.precisions or () for name in row):
        raise UsageError(f"{path}: a precision is not one of {', '.join(PRECISIONS)}; {AGAIN}")
    if profile.policy is not None and profile.policy not in POLICIES:
        raise UsageError(f"{path}: the policy {profile.policy!r} is not one of {', '.join(POLICIES)}; {AGAIN}")
