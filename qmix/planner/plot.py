"""Draw a plan: the map of experts, and the bytes of each tier. Imports matplotlib, an optional extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmix.planner.planned import Planned
from qmix.terminal.figure import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GPU_COLOURS = ("#1b7f5c", "#2f6fb0", "#6a51a3", "#b0568f")
COLOURS = {"ram": "#e6a93c", "disk": "#c9ccd1"}
PARTS = {  # parts of a tier's bar in order, and their colours
    "Python": "#4d4d4d",
    "dense weights": "#7a5195",
    "KV cache": "#ef5675",
    "work space": "#ffa600",
    "experts": "#2f6fb0",
    "headroom": "#eceef1",
}


def draw(planned: Planned, path: Path) -> None:
    """Draw a plan to a file. Raises QmixError where it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(1, 1.1))
    figure.suptitle(f"{planned.subject.name}: {planned.prediction.decode.rate:.3g} tok/s predicted", fontsize=12)
    _map(upper, planned)
    _bars(lower, planned)
    save(figure, path)


def draw_compared(found: Mapping[str, Planned], path: Path) -> None:
    """Draw the plans of several machines to a file, by name: the bytes of their tiers, and the speed of each.

    Raises QmixError where the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 2.6 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (name, planned) in zip(rows, found.items(), strict=True):
        _bars(axes, planned)
        axes.set_title(f"{name}: {planned.prediction.decode.rate:.3g} tok/s predicted", loc="left", fontsize=11, pad=22)
    figure.suptitle(next(iter(found.values())).subject.name, fontsize=12)
    save(figure, path)


def _map(axes: Axes, planned: Planned) -> None:
    """Draw the map of experts: layers across, experts down, a cell each."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    placement = planned.plan.placement
    devices = [device.name for device in planned.plan.devices]
    tiers = [name for name in (*devices, "ram", "disk") if any(name in row for row in placement)]
    colours = [_colour(name) for name in tiers]
    cells = [[tiers.index(row[expert]) for row in placement] for expert in range(len(placement[0]))]
    axes.pcolormesh(cells, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(tiers) - 0.5, edgecolors="white", lw=0.5)
    axes.invert_yaxis()
    axes.set(xlabel="layer", ylabel="expert", yticks=[at + 0.5 for at in range(len(cells))])
    axes.set_yticklabels([str(expert) for expert in range(len(cells))])
    axes.spines[:].set_visible(False)
    handles = [Patch(color=colour, label=_legend(name)) for name, colour in zip(tiers, colours, strict=True)]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(tiers), frameon=False)


def _bars(axes: Axes, planned: Planned) -> None:
    """Draw a bar for each tier, by parts, in GB."""
    bars = _tiers(planned)
    names = list(bars)
    left = [0.0] * len(names)
    for part, colour in PARTS.items():
        widths = [bars[name].get(part, 0) / 1e9 for name in names]
        if any(widths):
            axes.barh(names, widths, left=left, color=colour, label=part, height=0.6)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, end in zip(names, left, strict=True):
        axes.annotate(f" {end:.3g} GB", (end, name), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="GB", xlim=(0, 1.12 * max(left)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(PARTS), frameon=False, fontsize=9)


def _tiers(planned: Planned) -> dict[str, dict[str, Any]]:
    """Return bytes by tier and part."""
    plan = planned.plan
    found: dict[str, dict[str, Any]] = {}
    for each in plan.devices:
        found[each.name] = _parts(each, each.experts)
    found["RAM"] = {"Python": plan.interpreter, **_parts(plan, plan.pool)}
    found["disk"] = {"experts": plan.on_disk}
    return found


def _parts(tier: Any, experts: int) -> dict[str, int]:
    return {
        "dense weights": tier.dense,
        "KV cache": tier.kv_cache,
        "work space": tier.work,
        "experts": experts,
        "headroom": tier.headroom,
    }


def _colour(name: str) -> str:
    return COLOURS.get(name) or GPU_COLOURS[int(name.removeprefix("gpu:")) % len(GPU_COLOURS)]


def _legend(name: str) -> str:
    return {"ram": "RAM", "disk": "disk"}.get(name, name)
