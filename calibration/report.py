"""The report of a calibration: tables and pictures for a terminal, and one picture for a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from calibration.measure import UNKNOWN, Calibration
from calibration.plot import draw as draw_picture
from calibration.routing import RoutingStatistics
from calibration.tables import UseMap, error_table, hit_table, language_table
from qmix.pool.replay import BELADY
from qmix.units import format_bytes, plural


@dataclass(frozen=True, slots=True)
class PoolSize:
    """The pool of a machine: `slots` experts under a budget of `ram` bytes."""

    ram: int
    slots: int


def report(found: Calibration, pool: PoolSize | None) -> list[RenderableType]:
    """Return all parts in reading order; `pool` is this machine's, None if the model does not fit it."""
    routing, chosen = found.routing, found.chosen
    use = routing.total.tolist()
    languages = {name: table.tolist() for name, table in routing.counts.items() if name != UNKNOWN}
    point = (chosen.nbytes, chosen.error) if chosen else None
    parts: list[RenderableType] = [UseMap(use)]
    if len(languages) > 1:
        parts.append(language_table(use, languages))
    parts += [Text("\n".join(_sentences(found, pool))), hit_table(found.replay)]
    parts.append(error_table(found.allocator.frontier(), found.uniform, point))
    return [part for each in parts for part in (each, Text())][:-1]


def draw(found: Calibration, path: Path) -> None:
    """Draw the pictures into a file. Raises QmixError if it cannot be written."""
    routing, chosen = found.routing, found.chosen
    languages = {name: table.tolist() for name, table in routing.counts.items() if name != UNKNOWN}
    draw_picture(
        path,
        found.name,
        routing.total.tolist(),
        found.replay,
        found.allocator.frontier(),
        found.uniform,
        (chosen.nbytes, chosen.error) if chosen else None,
        languages if len(languages) > 1 else None,
    )


def _sentences(found: Calibration, pool: PoolSize | None) -> Iterator[str]:
    routing, replay, geometry = found.routing, found.replay, found.geometry
    tokens = sum(routing.tokens.values())
    yield f"{tokens} tokens; each expert got {routing.total.min()} to {routing.total.max()} of them"
    chance = geometry.experts_per_token / geometry.num_experts
    if not np.isnan(routing.repeated).all():
        yield f"experts shared with the previous token: {np.nanmean(routing.repeated):.0%} ({chance:.0%} by chance)"
    yield f"experts predicted correctly: {_guesses(routing)}"
    if pool is not None:
        best = replay.best(pool.slots)
        yield (
            f"with {format_bytes(pool.ram)} of RAM, {min(pool.slots, replay.records)} of {replay.records} experts are "
            f"in memory: best policy {best} ({replay.hit_rate(best, pool.slots):.1%} hits, "
            f"at most {replay.hit_rate(BELADY, pool.slots):.1%} possible)"
        )
    yield f"policy of the profile: {found.profile.policy}"


def _guesses(routing: RoutingStatistics) -> str:
    """Return the share of correct guesses by layers ahead, as means over the layers."""
    shares = [
        (ahead, float(np.nanmean(column)))
        for ahead, column in enumerate(routing.lookahead.T, 1)
        if not np.isnan(column).all()
    ]
    return ", ".join(f"{share:.0%} {plural(ahead, 'layer')} ahead" for ahead, share in shares)
