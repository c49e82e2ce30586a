"""The geometry of published Mixtrals, for plans without a network. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qmix.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Published:
    """A model on the Hub, and the sizes in its config.json."""

    hub_id: str
    geometry: Geometry


PUBLISHED = {
    "mixtral-8x7b": Published("mistralai/Mixtral-8x7B-v0.1", Geometry(4096, 14336, 32, 32, 8, 128, 8, 2, 32000, 32768)),
    "mixtral-8x22b": Published(
        "mistralai/Mixtral-8x22B-v0.1", Geometry(6144, 16384, 56, 48, 8, 128, 8, 2, 32000, 65536)
    ),
}
