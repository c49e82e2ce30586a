"""Which tier holds which expert: pure and deterministic."""

from __future__ import annotations

from collections.abc import Sequence

from qmix.geometry import Geometry

Use = Sequence[Sequence[float]]  # [layer][expert]: the share of a layer's tokens that are routed to an expert


def even_use(geometry: Geometry) -> tuple[tuple[float, ...], ...]:
    """Every expert used as often as any other."""
    share = geometry.experts_per_token / geometry.num_experts
    return ((share,) * geometry.num_experts,) * geometry.num_layers


def by_use(use: Use) -> list[tuple[int, int]]:
    """All (layer, expert), the most used first; equals a layer after the other, so that all layers get their share."""
    keys = [(layer, expert) for layer, row in enumerate(use) for expert in range(len(row))]
    return sorted(keys, key=lambda key: (-use[key[0]][key[1]], key[1], key[0]))


def host_placement(use: Use, slots: int) -> tuple[tuple[str, ...], ...]:
    """[layer][expert] without GPUs: "ram" for the most used, "disk" for the rest."""
    held = set(by_use(use)[:slots])
    return tuple(
        tuple("ram" if (layer, expert) in held else "disk" for expert in range(len(row)))
        for layer, row in enumerate(use)
    )
