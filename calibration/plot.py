"""A calibration's findings as one picture in a file. Imports matplotlib, an optional extra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.tables import POLICY_NAMES, Point, Use, shares, unit_of
from qmix.pool.replay import BELADY, STATIC, Replay
from qmix.terminal.figure import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# Colours that the colour-blind tell apart (M. Okabe and K. Ito, "Color universal design", 2008).
POLICY_COLOURS = {
    "lru": "#d55e00",
    "lfu": "#e69f00",
    "uses-per-time": "#0072b2",
    STATIC: "#009e73",
    BELADY: "#808080",
}
MIXED, UNIFORM, CHOSEN = "#0072b2", "#808080", "#d55e00"
WIDTH, CHARTS_HEIGHT = 12.0, 4.2  # inches
LAYER_HEIGHT, LEAST_HEIGHT = 0.105, 2.2  # of the maps, inches
DASHES = {BELADY: (0, (5, 2)), STATIC: (0, (1, 1.5))}
LABEL_POINTS = 12.0  # from one label to the next
PANEL_POINTS = (350.0, 220.0)  # a chart's width and height, near enough to keep labels apart


def draw(
    path: Path,
    name: str,
    use: Use,
    replay: Replay,
    frontier: Sequence[Point],
    uniform: Mapping[str, Point],
    chosen: Point | None = None,
    by_language: Mapping[str, Use] | None = None,
) -> None:
    """Draw maps of use above, hit rates and errors below, for the model `name`.

    `use`, and that of each language, are [layers][experts] counts, or anything in proportion to them; `frontier` are
    the best mixtures of precisions, `uniform` single ones by name. Raises QmixError where the file cannot be written;
    call `qmix.terminal.figure.check_target` before the work.
    """
    from matplotlib.figure import Figure

    maps_height = max(LEAST_HEIGHT, 0.8 + LAYER_HEIGHT * len(use))
    figure = Figure(figsize=(WIDTH, maps_height + CHARTS_HEIGHT), layout="constrained")
    figure.suptitle(f"{name}: which experts are used, what a pool of them finds, what their precision costs")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(maps_height, CHARTS_HEIGHT), hspace=0.02).flat
    if by_language:
        ratios = (1, 0.5 + 0.4 * len(by_language))
        left, right = upper.subfigures(1, 2, squeeze=False, width_ratios=ratios, wspace=0.02).flat
        _use_map(left, use)
        _language_maps(right, use, by_language)
    else:
        _use_map(upper, use)
    hits, errors = lower.subplots(1, 2)
    _hit_rates(hits, replay)
    _errors(errors, frontier, uniform, chosen)
    save(figure, path)


def _use_map(figure: SubFigure, use: Use) -> None:
    """Draw layers down, experts across, coloured by share."""
    axes = figure.subplots()
    percent = [[100 * share for share in row] for row in shares(use)]
    mesh = axes.pcolormesh(percent, cmap="viridis", edgecolors="white", linewidth=0.3)
    _map_axes(axes, len(use), len(use[0]))
    axes.set(ylabel="layer")
    axes.set_title(f"Use of experts: % of a layer's requests\n({100 / len(use[0]):.3g} by chance)", fontsize=10)
    figure.colorbar(mesh, ax=axes, aspect=40, pad=0.02)


def _language_maps(figure: SubFigure, use: Use, by_language: Mapping[str, Use]) -> None:
    """Draw a map for each language: its shares above (orange) or below (violet) those of all text."""
    whole = shares(use)
    differences = {
        language: [[100 * (a - b) for a, b in zip(*rows, strict=True)] for rows in zip(shares(own), whole, strict=True)]
        for language, own in by_language.items()
    }
    most = max(abs(value) for rows in differences.values() for row in rows for value in row) or 1.0
    panels = figure.subplots(1, len(differences), sharey=True, squeeze=False)[0]
    for axes, (language, rows) in zip(panels, differences.items(), strict=True):
        mesh = axes.pcolormesh(rows, cmap="PuOr_r", vmin=-most, vmax=most, edgecolors="white", linewidth=0.3)
        _map_axes(axes, len(use), len(use[0]))
        axes.set_title(language, fontsize=10)
    figure.suptitle("Each language's use, less that of all text: percentage points", fontsize=10)
    figure.colorbar(mesh, ax=panels, aspect=40, pad=0.02)


def _map_axes(axes: Axes, layers: int, experts: int) -> None:
    axes.set(xlabel="expert", ylim=(layers, 0))
    axes.set_xticks([expert + 0.5 for expert in range(experts)], [str(expert) for expert in range(experts)])
    shown = range(0, layers, 1 if layers <= 16 else 5)
    axes.set_yticks([layer + 0.5 for layer in shown], [str(layer) for layer in shown])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def _hit_rates(axes: Axes, replay: Replay) -> None:
    """Draw a line for each policy, the recommended one thick and on top."""
    first = replay.recommended()
    for curve in replay.curves:
        axes.plot(
            curve.slots,
            [100 * hits / max(1, replay.requests) for hits in curve.hits],
            color=POLICY_COLOURS[curve.policy],
            linestyle=DASHES.get(curve.policy, "-"),
            linewidth=2.4 if curve.policy == first else 1.4,
            zorder=3 if curve.policy == first else 2,
            label=POLICY_NAMES[curve.policy],
        )
    quarters = [round(replay.records * part / 4) for part in range(5)]
    axes.set_xticks(quarters, [f"{size}\n{25 * part}%" for part, size in enumerate(quarters)])
    axes.set(xlabel=f"experts in memory, of {replay.records}", ylabel="requests found in memory, %")
    axes.set(xlim=(0, replay.records), ylim=(0, 101))
    axes.set_title(f"Hit rate by pool size; best policy: {POLICY_NAMES[first]}", fontsize=10)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    _lighten(axes)


def _errors(axes: Axes, frontier: Sequence[Point], uniform: Mapping[str, Point], chosen: Point | None) -> None:
    """Draw errors on a logarithmic scale down to the power of ten below the least single one, then linearly to 0.

    Nearer to 0 the mixtures' errors fall through decades that do not matter.
    """
    from matplotlib.ticker import SymmetricalLogLocator

    named = {**uniform, **({"chosen": chosen} if chosen else {})}
    errors = [error for _, error in [*frontier, *named.values()]]
    most = max(errors)
    factor, unit = unit_of(max(size for size, _ in [*frontier, *named.values()]))
    least = min((error for _, error in named.values() if error > 0), default=1.0)
    linear = 10.0 ** math.floor(math.log10(least))
    axes.set_yscale("symlog", linthresh=linear, linscale=0.5)
    steps = (1, 2, 5) if most < 100 * linear else (1,)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(linthresh=linear, base=10, subs=steps))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    places = [(size / factor, error) for size, error in sorted(frontier)]
    axes.plot(*zip(*places, strict=True), color=MIXED, linewidth=2, label="best mixture of precisions")
    for name, (size, error) in named.items():
        colour, marker = (CHOSEN, "D") if name == "chosen" else (UNIFORM, "o")
        axes.plot(size / factor, error, marker, color=colour, markersize=6, zorder=4)
    axes.set(xlabel=f"bytes of all experts, {unit}", ylabel=f"error, logarithmic down to {linear:g}")
    bottom = -0.3 * linear if min(errors) < linear else 0.8 * min(errors)
    axes.set_ylim(bottom, most * (most / linear) ** 0.3 or linear)  # room for labels above the largest error
    axes.set_title("Error against bytes: mixtures of precisions and single ones", fontsize=10)
    _labels(axes, {name: (size / factor, error) for name, (size, error) in named.items()})
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    _lighten(axes)


def _labels(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write a name beside each point; one that would lie on the name below it is moved above it."""
    to_share = axes.transScale + axes.transLimits  # of the panel's width and height
    start, height = 0.0, float("-inf")  # of the last label, in points
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        at = [share * size for share, size in zip(to_share.transform((x, y)), PANEL_POINTS, strict=True)]
        start = max(start, at[0] + LABEL_POINTS) if at[1] < height + LABEL_POINTS else at[0] + LABEL_POINTS
        height = max(at[1] + LABEL_POINTS / 3, height + LABEL_POINTS)
        colour = CHOSEN if name == "chosen" else UNIFORM
        axes.annotate(
            name,
            (x, y),
            (start - at[0], height - at[1]),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )


def _lighten(axes: Axes) -> None:
    axes.grid(color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
