"""What is known of a model's routing: a small JSON file that plans read. Loads no torch.

    {"schema": "qmix-profile-1",
     "model": {"name": "org/name", "fingerprint": "3f..." or null},
     "use": [[0.31, 0.22, ...], ...],            [layer][expert]: share of tokens routed to it; a layer's sum is k
     "suffering": [[0, 3], ...]}                 optional: (layer, expert) that 4 bits hurt most

`fingerprint` is that of the checkpoint, as a store's manifest has it; where both are known they must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.plan.json_file import read_object

SCHEMA = "qmix-profile-1"
SUM_TOLERANCE = 0.02  # of a layer's shares
SPARED = "int8"  # the precision of experts that suffer


@dataclass(frozen=True, slots=True)
class Profile:
    """`use` is [layer][expert], the share of tokens routed to an expert; `suffering` the experts that 4 bits hurt."""

    name: str
    fingerprint: str | None
    use: tuple[tuple[float, ...], ...]
    suffering: tuple[tuple[int, int], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "model": {"name": self.name, "fingerprint": self.fingerprint},
            "use": [list(row) for row in self.use],
        }
        if self.suffering is not None:
            found["suffering"] = [list(key) for key in self.suffering]
        return found

    def precisions(self) -> str:
        """What `--precision auto` means for this model, as `--precision` takes it. Raises UsageError."""
        if self.suffering is None:
            raise UsageError("--precision auto: the profile does not say which experts suffer; name a precision")
        return ",".join(["nf4", *(f"{layer}.{expert}={SPARED}" for layer, expert in self.suffering)])


def read_profile(path: Path) -> Profile:
    """Raises UsageError naming the file."""
    content = read_object(path, SCHEMA, "a profile", "make the profile again")
    try:
        use = tuple(tuple(float(share) for share in row) for row in content["use"])
        suffering = content.get("suffering")
        keys = None if suffering is None else tuple((int(layer), int(expert)) for layer, expert in suffering)
        model = content["model"]
        return Profile(str(model["name"]), model.get("fingerprint"), use, keys)
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path}: damaged; make the profile again") from None


def check_profile(profile: Profile, path: Path, geometry: Geometry, fingerprint: str | None) -> None:
    """Raises UsageError where a profile is of another model, or its numbers cannot be shares."""
    shape = len(profile.use), {len(row) for row in profile.use}
    if shape != (geometry.num_layers, {geometry.num_experts}):
        raise UsageError(f"{path}: is a profile of {profile.name}, which has other layers or experts than this model")
    if fingerprint and profile.fingerprint and fingerprint != profile.fingerprint:
        raise UsageError(f"{path}: is a profile of {profile.name}, whose weights are not this model's")
    if any(not 0 <= share <= 1 for row in profile.use for share in row):
        raise UsageError(f"{path}: a share of use is not between 0 and 1; make the profile again")
    if any(
        abs(sum(row) - geometry.experts_per_token) > SUM_TOLERANCE * geometry.experts_per_token for row in profile.use
    ):
        raise UsageError(f"{path}: a layer's shares do not add up to {geometry.experts_per_token} experts a token")
    layers, experts = range(geometry.num_layers), range(geometry.num_experts)
    if any(layer not in layers or expert not in experts for layer, expert in profile.suffering or ()):
        raise UsageError(f"{path}: an expert that suffers is none of this model's; make the profile again")
