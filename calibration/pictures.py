"""What a calibration found, in a terminal: use of experts, hit rates by pool size, error against bytes.

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

from calibration.chart import Axis, Chart, Line, Mark
from calibration.palette import (
    CHOSEN,
    MIXED,
    POLICY_COLOURS,
    POLICY_NAMES,
    UNIFORM,
    ErrorScale,
    Point,
    Use,
    apart,
    shares,
    steps_between,
    unit_of,
    viridis,
)
from qmix.pool.replay import BELADY, STATIC, Replay

LETTERS = {"lru": "r", "lfu": "f", "uses-per-time": "u", STATIC: "s", BELADY: "b"}
SHADES = " ░▒▓█"
MARGIN = len("layer ")
CELL = 6  # columns of an expert's cell, at most


class UseMap:
    """Layers down, experts across: the percentage of its layer's requests that went to each expert.

    `use` [layers][experts] are counts, or anything in proportion.
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
    """A row for each language: how much of its use is not the whole text's, and where it stands out most."""
    table = _table("differs: requests that would have to go to other experts to be as those of all text")
    table.title = Text("Languages beside all text", style="bold")
    table.add_column("language")
    for name in ("differs", "most in layer", "prefers", "its use", "of all"):
        table.add_column(name, justify="right")
    whole = shares(use)
    for language, own in by_language.items():
        mine = shares(own)
        distances = [apart(*pair) for pair in zip(mine, whole, strict=True)]
        at = max(range(len(whole)), key=lambda layer: distances[layer])
        lead = {(i, j): b - whole[i][j] for i, row in enumerate(mine) for j, b in enumerate(row)}
        layer, expert = max(lead, key=lambda key: lead[key])
        mean, most = sum(distances) / len(distances), distances[at]
        cells = (f"{mean:.1%}", f"{at} ({most:.1%})", f"{layer}.{expert}")
        table.add_row(language, *cells, f"{mine[layer][expert]:.1%}", f"{whole[layer][expert]:.1%}")
    return table


def hit_chart(replay: Replay) -> Chart:
    """Hit rate over pool size, a line for each policy, the recommended one on top."""
    ticks = [(replay.records * part / 4, str(round(replay.records * part / 4))) for part in range(5)]
    first = replay.recommended()
    order = sorted(replay.curves, key=lambda curve: (curve.policy == first, curve.policy == BELADY))
    lines = [
        Line(
            POLICY_NAMES[curve.policy],
            LETTERS[curve.policy],
            POLICY_COLOURS[curve.policy],
            [(size, hits / max(1, replay.requests)) for size, hits in zip(curve.slots, curve.hits, strict=True)],
        )
        for curve in order
    ]
    return Chart(
        f"Hit rate by pool size: best policy {POLICY_NAMES[first]}",
        Axis(f"experts in memory, of {replay.records}", 0, replay.records, ticks),
        Axis("requests found in memory", 0.0, 1.0, [(part / 4, f"{25 * part}%") for part in range(5)]),
        lines,
    )


def hit_table(replay: Replay) -> Table:
    """The chart's numbers, a row for each pool size."""
    table = _table("* most hits of the policies that a pool can follow")
    table.add_column("slots", justify="right")
    table.add_column("share", justify="right")
    for curve in replay.curves:
        table.add_column(curve.policy.replace("-", " "), justify="right")
    for size in replay.curves[0].slots:
        best = replay.best(size)
        rates = {curve.policy: f"{replay.hit_rate(curve.policy, size):.1%}" for curve in replay.curves}
        cells = (Text(f"{rate} *", "bold") if name == best else f"{rate}  " for name, rate in rates.items())
        table.add_row(str(size), f"{size / replay.records:.0%}", *cells)
    return table


def error_chart(
    frontier: Sequence[Point],
    uniform: Mapping[str, Point],
    chosen: Point | None = None,
) -> Chart:
    """Error over bytes: the best mixtures as a line, one precision throughout as marks; logarithmic, down to 0.

    Of mixtures, what lies far below every mark is drawn near 0.
    """
    points = [*frontier, *uniform.values(), *([chosen] if chosen else [])]
    sizes = sorted(size for size, _ in points)
    factor, unit = unit_of(sizes[-1])
    across = steps_between(sizes[0] / factor, sizes[-1] / factor, 5)
    single = [error for _, error in (*uniform.values(), *([chosen] if chosen else []))]
    scale = ErrorScale.of((error for _, error in frontier), single)
    room = 0.05 * scale.decades or 0.1

    def at(point: Point) -> tuple[float, float]:
        return point[0] / factor, scale.place(point[1])

    marks = [Mark("chosen", "◆", CHOSEN, at(chosen))] if chosen else []
    marks += [Mark(name, "o", UNIFORM, at(point)) for name, point in uniform.items()]
    return Chart(
        "Error against bytes of experts",
        Axis(f"bytes of all experts, {unit}", across[0], across[-1], [(value, f"{value:g}") for value in across]),
        Axis(
            scale.label,
            -scale.below or -room,
            scale.decades + room,
            [(scale.place(value), f"{value:g}") for value in scale.ticks],
        ),
        [Line("best mixture of precisions", "*", MIXED, [at(point) for point in sorted(frontier)])],
        marks,
    )


def error_table(uniform: Mapping[str, Point], chosen: Point | None = None) -> Table:
    """The marks' numbers, smallest first."""
    factor, unit = unit_of(max(size for size, _ in uniform.values()))
    table = _table()
    table.add_column("experts")
    table.add_column(unit, justify="right")
    table.add_column("error", justify="right")
    named = sorted({**uniform, **({"chosen": chosen} if chosen else {})}.items(), key=lambda item: item[1])
    for name, (size, error) in named:
        table.add_row(Text(name, "bold" if name == "chosen" else ""), f"{size / factor:.4g}", f"{error:.3g}")
    return table


def _cell(share: float, heat: float, width: int, plain: bool) -> tuple[str, str | Style]:
    """An expert's share: a number where there is room, on its colour or behind its shade, by a `heat` from 0 to 1."""
    number = f"{100 * share:.0f}"
    if not plain:
        return f"{number if width > 2 else '':^{width}}", _background(heat)
    shade = SHADES[round(heat * (len(SHADES) - 1))]
    if width < 4:
        return (shade * max(1, width - 1)).ljust(width), ""
    return f"{shade * (width - 4)}{number:>3} ", ""


def _background(heat: float) -> Style:
    """A colour of the scale, and black or white on it."""
    red, green, blue = viridis(heat)
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 120
    return Style(color="#000000" if light else "#ffffff", bgcolor=Color.from_rgb(red, green, blue))


def _table(caption: str | None = None) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
