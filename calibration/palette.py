"""What pictures of a calibration share on a terminal and in a file: names, colours, scales. Plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qmix.pool.replay import BELADY, STATIC

# Colours that the colour-blind tell apart (M. Okabe and K. Ito, "Color universal design", 2008), on black and on white.
POLICY_COLOURS = {
    "lru": "#d55e00",
    "lfu": "#e69f00",
    "uses-per-time": "#0072b2",
    STATIC: "#009e73",
    BELADY: "#808080",
}
POLICY_NAMES = {
    "lru": "least recently used",
    "lfu": "decayed frequency",
    "uses-per-time": "decayed use",
    STATIC: "most used, fixed",
    BELADY: "best possible",
}
MIXED, UNIFORM, CHOSEN = "#0072b2", "#808080", "#d55e00"
# matplotlib's, by eighths
VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))

Use = Sequence[Sequence[float]]  # [layers][experts]
Point = tuple[int, float]  # bytes of all experts, error


def shares(use: Use) -> list[list[float]]:
    """Each layer's use of its experts, as parts of 1; of a layer that was not used, zeros."""
    return [[count / (sum(row) or 1) for count in row] for row in use]


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The part of the requests that would have to go elsewhere for one layer's shares to become the other's."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2


def unit_of(most: float) -> tuple[int, str]:
    """The largest binary unit that so many bytes fill, and its name."""
    return next((unit for unit in UNITS if most >= unit[0]), (1, "B"))


def steps_between(low: float, high: float, count: int) -> list[float]:
    """Round numbers, two or more and about `count` of them, from at most `low` to at least `high`."""
    rough = (high - low or abs(high) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(number * step, 12) for number in range(first, last + 1)]


def viridis(value: float) -> tuple[int, int, int]:
    """Red, green and blue of a value from 0 to 1."""
    at = min(max(value, 0.0), 1.0) * (len(VIRIDIS) - 1)
    index = min(int(at), len(VIRIDIS) - 2)
    low, high = (tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in VIRIDIS[index : index + 2])
    red, green, blue = (round(a + (b - a) * (at - index)) for a, b in zip(low, high, strict=True))
    return red, green, blue


@dataclass(frozen=True, slots=True)
class ErrorScale:
    """Logarithmic from `least` to `most`; below, down to 0, in proportion to the error, a decade or less in all."""

    least: float
    most: float
    to_zero: bool  # whether anything lies below `least`

    @classmethod
    def of(cls, frontier: Iterable[float], single: Iterable[float]) -> ErrorScale:
        """For the errors of the best mixtures and of single points, which it shows down to the power of ten below the
        least single one: nearer to 0 the mixtures' errors fall through decades that nobody needs to see."""
        single = list(single)
        errors = sorted([*frontier, *single])
        power = math.floor(math.log10(_least(single) or _least(errors) or 1.0))
        least = max(errors[0], float(f"1e{power}"))
        return cls(least, max(errors[-1], least), errors[0] < least)

    @property
    def decades(self) -> float:
        return math.log10(self.most / self.least)

    @property
    def below(self) -> float:
        """Decades that the part down to 0 is as long as."""
        return min(1.0, max(0.25, 0.2 * self.decades)) if self.to_zero else 0.0

    def place(self, error: float) -> float:
        """Decades above `least`, negative below it."""
        return math.log10(error / self.least) if error >= self.least else self.below * (error / self.least - 1)

    @property
    def label(self) -> str:
        return f"error, logarithmic down to {self.least:.2g}" if self.to_zero else "error, logarithmic"

    @property
    def ticks(self) -> list[float]:
        """0 if it is shown; 1, 2 and 5 times the powers of ten, or where there are many, the powers alone."""
        first, last = math.floor(math.log10(self.least)), math.ceil(math.log10(self.most))
        sizes = (1, 2, 5) if self.decades < 2 else (1,)
        values = [float(f"{size}e{power}") for power in range(first, last + 1) for size in sizes]
        return [0.0] * self.to_zero + [value for value in values if 0.999 * self.least <= value <= 1.001 * self.most]


def _least(errors: Iterable[float]) -> float:
    return min((error for error in errors if error > 0), default=0.0)
