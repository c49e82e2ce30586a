"""A calibration's findings on a terminal: the map of expert use, and tables.

Readable from 60 columns on, and without colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from qmix.pool.replay import BELADY, STATIC, Replay

SHADES = " ░▒▓█"
MARGIN = len("layer ")
CELL = 6  # columns of an expert's cell, at most
# matplotlib's viridis, by eighths
VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))

Use = Sequence[Sequence[float]]  # [layers][experts]
Point = tuple[int, float]  # bytes of all experts, error
POLICY_NAMES = {
    "lru": "least recently used",
    "lfu": "decayed frequency",
    "uses-per-time": "decayed use",
    STATIC: "most used, fixed",
    BELADY: "best possible",
}


class UseMap:
    """Layers down, experts across: the percentage of its layer's requests that went to each expert.

    `use` [layers][experts] holds counts, or anything in proportion to them.
    """

    def __init__(self, use: Use) -> None:
        self.shares = shares(use)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = console.color_system is None or console.no_color
        experts = len(self.shares[0])
        width = max(1, min(CELL, (options.max_width - MARGIN) // experts))
        low, high = min(map(min, self.shares)), max(map(max, self.shares))
        yield Text(f"Use of experts: % of a layer's requests, {100 / experts:.3g} by chance", style="bold")
        every, side = (1, "^") if width > len(str(experts)) else (5, "<")
        scale = "".join(f"{expert:{side}{width * every}}" for expert in range(0, experts, every))
        yield Text(f"{'layer':<{MARGIN}}{scale.rstrip()}", style="dim", no_wrap=True)
        for layer, row in enumerate(self.shares):
            line = Text(f"{layer:>{MARGIN - 1}} ", no_wrap=True)
            for share in row:
                line.append(*_cell(share, (share - low) / (high - low or 1.0), width, plain))
            if plain:
                line.rstrip()
            yield line
        legend = Text(f"{'':{MARGIN}}{100 * low:.1f}% ")
        for step, shade in enumerate(SHADES):
            legend.append(*((shade * 3, "") if plain else ("   ", _background(step / (len(SHADES) - 1)))))
        yield legend.append(f" {100 * high:.1f}%")


def language_table(use: Use, by_language: Mapping[str, Use]) -> Table:
    """Return a row for each language: how far its use is from that of all text, and where it differs most."""
    table = _table(
        "Languages beside all text", "differs: requests that would have to go to other experts to match all text"
    )
    table.add_column("language")
    for name in ("differs", "most in layer", "prefers", "its use", "of all"):
        table.add_column(name, justify="right")
    whole = shares(use)
    for language, own in by_language.items():
        mine = shares(own)
        distances = [distance(*pair) for pair in zip(mine, whole, strict=True)]
        at = max(range(len(whole)), key=lambda layer: distances[layer])
        lead = {(i, j): b - whole[i][j] for i, row in enumerate(mine) for j, b in enumerate(row)}
        layer, expert = max(lead, key=lambda key: lead[key])
        mean, most = sum(distances) / len(distances), distances[at]
        cells = (f"{mean:.1%}", f"{at} ({most:.1%})", f"{layer}.{expert}")
        table.add_row(language, *cells, f"{mine[layer][expert]:.1%}", f"{whole[layer][expert]:.1%}")
    return table


def hit_table(replay: Replay) -> Table:
    """Return a row for each pool size: the share of requests that each policy finds in memory."""
    table = _table(
        "Hit rate by pool size", f"* best policy of a run; over all sizes: {POLICY_NAMES[replay.recommended()]}"
    )
    table.add_column("slots", justify="right")
    table.add_column("share", justify="right")
    for curve in replay.curves:
        table.add_column(POLICY_NAMES[curve.policy], justify="right")
    for size in replay.curves[0].slots:
        best = replay.best(size)
        rates = {curve.policy: f"{replay.hit_rate(curve.policy, size):.1%}" for curve in replay.curves}
        cells = (Text(f"{rate} *", "bold") if name == best else f"{rate}  " for name, rate in rates.items())
        table.add_row(str(size), f"{size / replay.records:.0%}", *cells)
    return table


def error_table(frontier: Sequence[Point], uniform: Mapping[str, Point], chosen: Point | None = None) -> Table:
    """Return a row for each precision and for the chosen mixture, by size.

    Each row has the error of the best mixture, one of `frontier`, that takes no more bytes.
    """
    factor, unit = unit_of(max(size for size, _ in uniform.values()))
    table = _table("Error against bytes of experts")
    table.add_column("experts")
    for name in (unit, "error", "best mixture"):
        table.add_column(name, justify="right")
    named = sorted({**uniform, **({"chosen": chosen} if chosen else {})}.items(), key=lambda item: item[1])
    for name, (size, error) in named:
        best = min((mixed for nbytes, mixed in frontier if nbytes <= size), default=None)
        cells = (f"{size / factor:.4g}", f"{error:.3g}", "" if best is None else f"{best:.3g}")
        table.add_row(Text(name, "bold" if name == "chosen" else ""), *cells)
    return table


def shares(use: Use) -> list[list[float]]:
    """Return each layer's use of its experts in parts of 1; zeros for a layer without requests."""
    return [[count / (sum(row) or 1) for count in row] for row in use]


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the part of a layer's requests that must move for one distribution to become the other."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2


def unit_of(most: float) -> tuple[int, str]:
    """Return the largest binary unit that `most` bytes fill, and its name."""
    return next((unit for unit in UNITS if most >= unit[0]), (1, "B"))


def viridis(value: float) -> tuple[int, int, int]:
    """Return red, green and blue for a value from 0 to 1."""
    at = min(max(value, 0.0), 1.0) * (len(VIRIDIS) - 1)
    index = min(int(at), len(VIRIDIS) - 2)
    low, high = (tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in VIRIDIS[index : index + 2])
    red, green, blue = (round(a + (b - a) * (at - index)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _cell(share: float, heat: float, width: int, plain: bool) -> tuple[str, str | Style]:
    """Return an expert's share, a number where there is room, on its colour or behind its shade; `heat` is 0 to 1."""
    number = f"{100 * share:.0f}"
    if not plain:
        return f"{number if width > 2 else '':^{width}}", _background(heat)
    shade = SHADES[round(heat * (len(SHADES) - 1))]
    if width < 4:
        return (shade * max(1, width - 1)).ljust(width), ""
    return f"{shade * (width - 4)}{number:>3} ", ""


def _background(heat: float) -> Style:
    """Return a colour of the scale, with black or white on it."""
    red, green, blue = viridis(heat)
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 120
    return Style(color="#000000" if light else "#ffffff", bgcolor=Color.from_rgb(red, green, blue))


def _table(title: str, caption: str | None = None) -> Table:
    return Table(
        title=Text(title, "bold"),
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
