"""Draw where experts lie, and how much each is used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

MARGIN = 4  # columns for the numbers of experts
GPU_COLOURS = ("green", "cyan", "blue", "magenta")
COLOURS = {"ram": "yellow", "disk": "red"}
LETTERS = {"ram": "r", "disk": "."}
USED = {"r": "R", ".": "*"}  # letters of tiers where there are no colours
INKS = " ·+#"  # from unused to much used, on a tier's colour
LEAST_USE = 0.02  # of the most used expert's, to be drawn
AXES = "layers across, experts down: "

Uses = Sequence[Sequence[float]]


class ExpertMap:
    """A map of experts, layers across: cells are coloured if the terminal has colours, and letters if not.

    `placement` [layer][expert] names the tiers: "gpu:0", "ram" or "disk". With `uses` [layer][expert] the cells show
    how much each expert is used, compared with the one that is used most.
    """

    def __init__(self, placement: Sequence[Sequence[str]], uses: Uses | None = None) -> None:
        self.placement, self.uses = placement, uses
        self._most = max((use for row in uses for use in row), default=0.0) if uses else 0.0

    def height(self, width: int) -> int:
        """Return the number of lines that it takes in `width` columns."""
        blocks = -(-len(self.placement) // max(1, width - MARGIN))
        return blocks * (1 + len(self.placement[0])) + 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = console.color_system is None or console.no_color
        experts = len(self.placement[0])
        width = max(1, options.max_width - MARGIN)
        for start in range(0, len(self.placement), width):
            block = range(start, min(start + width, len(self.placement)))
            yield self._scale(start, len(block))
            for expert in range(experts):
                line = Text(f"{expert:>{MARGIN - 1}} ", no_wrap=True)
                for layer in block:
                    line.append(*cell(self.placement[layer][expert], plain, self._ink(layer, expert)))
                yield line
        yield self._legend(plain, options.max_width)

    def _ink(self, layer: int, expert: int) -> int:
        """Return how much an expert is used, from 0 to the last of INKS."""
        share = self.uses[layer][expert] / self._most if self.uses and self._most > 0 else 0.0
        return math.ceil(share * (len(INKS) - 1)) if share > LEAST_USE else 0

    def _scale(self, start: int, count: int) -> Text:
        """Return a line with the number of every tenth layer above its column."""
        line = [" "] * count
        for layer in range(start, start + count):
            name = str(layer)
            if layer % 10 == 0 and layer - start + len(name) <= count:
                line[layer - start : layer - start + len(name)] = name
        return Text(" " * MARGIN + "".join(line), no_wrap=True, style="dim")

    def _legend(self, plain: bool, width: int) -> Text:
        """Return the tiers with their cells and counts. With uses it is one line, without the axes if it is narrow."""
        counts = Counter(where for row in self.placement for where in row)
        line = Text()
        for where in sorted(counts, key=lambda name: (name == "disk", name == "ram", name)):
            line.append(*cell(where, plain))
            line.append(f" {where} {counts[where]} ")
        if self.uses:
            line.append("* R in use" if plain else f"{' '.join(INKS[1:])} use")
        line.rstrip()
        if self.uses is None:
            return Text(AXES).append_text(line)
        fits = len(AXES) + len(line) <= width
        return Text(AXES if fits else "", no_wrap=True, overflow="ellipsis").append_text(line)


def cell(where: str, plain: bool, ink: int = 0) -> tuple[str, str]:
    """Return a tier's character and its style, with so much ink on it."""
    if plain:
        letter = LETTERS.get(where) or where.removeprefix("gpu:")[:1]
        return USED.get(letter, letter) if ink else letter, ""
    colour = COLOURS.get(where) or GPU_COLOURS[int(where.removeprefix("gpu:")) % len(GPU_COLOURS)]
    return INKS[ink], f"black on {colour}" if ink else f"on {colour}"
