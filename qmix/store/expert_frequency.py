"""The share of tokens routed to each expert, and the order in which experts are held in memory. Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qmix.geometry import Geometry
from qmix.store.layout import StoreLayout

ExpertFrequency = Sequence[Sequence[float]]  # [layer][expert]: share of a layer's tokens routed to the expert


def uniform_frequency(geometry: Geometry) -> tuple[tuple[float, ...], ...]:
    """Return equal shares for all experts."""
    share = geometry.experts_per_token / geometry.num_experts
    return ((share,) * geometry.num_experts,) * geometry.num_layers


def by_frequency(layout: StoreLayout, use: ExpertFrequency) -> list[tuple[int, int]]:
    """Return all (layer, expert), the most used first.

    Experts of equal use alternate between layers, so that every layer gets its share, and between record sizes, so that
    any first part of them has the same share of each size.
    """
    keys = sorted(layout.experts, key=lambda key: (-use[key[0]][key[1]], key[1], key[0]))
    kinds = [(use[layer][expert], layout.record(layer, expert).nbytes) for layer, expert in keys]
    counts, seen, places = Counter(kinds), Counter[tuple[float, int]](), {}
    for key, kind in zip(keys, kinds, strict=True):
        places[key] = (seen[kind] + 0.5) / counts[kind]
        seen[kind] += 1
    return sorted(keys, key=lambda key: (-use[key[0]][key[1]], places[key]))
