"""How often each expert is used, and which of them are therefore to be held first. Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qmix.geometry import Geometry
from qmix.store.layout import StoreLayout

ExpertFrequency = Sequence[
    Sequence[float]
]  # [layer][expert]: the share of a layer's tokens that are routed to an expert


def uniform_frequency(geometry: Geometry) -> tuple[tuple[float, ...], ...]:
    """Every expert used as often as any other."""
    share = geometry.experts_per_token / geometry.num_experts
    return ((share,) * geometry.num_experts,) * geometry.num_layers


def by_frequency(layout: StoreLayout, use: ExpertFrequency) -> list[tuple[int, int]]:
    """All (layer, expert), the most used first.

    Equals a layer after the other, so that all layers get their share; and so that any first part of them has the same
    share of the records of each size.
    """
    keys = sorted(layout.experts, key=lambda key: (-use[key[0]][key[1]], key[1], key[0]))
    kinds = [(use[layer][expert], layout.record(layer, expert).nbytes) for layer, expert in keys]
    counts, seen, places = Counter(kinds), Counter[tuple[float, int]](), {}
    for key, kind in zip(keys, kinds, strict=True):
        places[key] = (seen[kind] + 0.5) / counts[kind]
        seen[kind] += 1
    return sorted(keys, key=lambda key: (-use[key[0]][key[1]], places[key]))
