"""Choose each expert's precision so that the sum of errors is least within a number of bytes; exact.

Each expert takes one of a few precisions with an error each, and the records' bytes must stay within a budget: a
multiple-choice knapsack (H. Kellerer, U. Pferschy and D. Pisinger, "Knapsack Problems", 2004, chapter 11). A record's
bytes depend on its precision alone, so a state of the dynamic program counts experts of each size, not bytes; its
optimum is exact, for every budget at once. With two experts and the errors

                nf4    int8
    first        5      1       1 byte in nf4, 2 in int8
    second       3      2

2 bytes lose 8; 3 bytes lose 4, the first in int8; 4 bytes lose 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from qmix.errors import DoesNotFitError, arg
from qmix.units import format_bytes

Errors = Mapping[str, Sequence[Sequence[float]]]  # precision -> [layer][expert]
Precisions = tuple[tuple[str, ...], ...]  # [layer][expert]


@dataclass(frozen=True, slots=True)
class Allocation:
    """Experts' precisions [layer][expert], the bytes of their records, and the sum of their errors."""

    precisions: Precisions
    nbytes: int
    error: float


class Allocator:
    """The best allocations of experts by their `errors` and the bytes of a record, `sizes`; both by precision."""

    def __init__(self, errors: Errors, sizes: Mapping[str, int]) -> None:
        self._names = list(errors)
        self._rows = [len(row) for row in errors[self._names[0]]]  # experts of each layer
        costs = np.array([[error for row in errors[name] for error in row] for name in self._names])  # [P, N]
        self._levels = sorted(set(sizes.values()))
        of_level = [[index for index, name in enumerate(self._names) if sizes[name] == size] for size in self._levels]
        # for each size and expert, the precision with the least error
        self._best = np.array([np.array(some)[costs[some].argmin(0)] for some in of_level])  # [S, N]
        self._costs = np.take_along_axis(costs, self._best, 0)  # [S, N]
        self._sums, self._choices = _sums_and_choices(self._costs)
        states = product(range(self._costs.shape[1] + 1), repeat=len(self._levels) - 1)
        self._states = sorted((self._bytes(state), self._sums[state], state) for state in states if self._valid(state))

    @property
    def smallest(self) -> int:
        """Return the bytes of the smallest allocation."""
        return self._states[0][0]

    def frontier(self) -> list[tuple[int, float]]:
        """Return (bytes, error) of the allocations that no other beats in both; bytes rise, errors fall."""
        found: list[tuple[int, float]] = []
        for nbytes, error, _ in self._states:
            if not found or error < found[-1][1]:
                found.append((nbytes, float(error)))
        return found

    def within(self, budget: int) -> Allocation:
        """Return the allocation of least error in `budget` bytes, with the fewest bytes. Raises DoesNotFitError."""
        fitting = [entry for entry in self._states if entry[0] <= budget]
        if not fitting:
            raise too_small(budget, self.smallest)
        nbytes, error, state = min(fitting, key=lambda entry: (entry[1], entry[0]))
        names = iter(self._names_of(state))
        rows = tuple(tuple(next(names) for _ in range(count)) for count in self._rows)
        return Allocation(rows, nbytes, float(error))

    def _valid(self, state: tuple[int, ...]) -> bool:
        return sum(state) <= self._costs.shape[1]

    def _bytes(self, state: tuple[int, ...]) -> int:
        """Return the bytes of all records; `state` counts those of each size above the smallest."""
        smallest = self._costs.shape[1] - sum(state)
        return sum(count * size for count, size in zip((smallest, *state), self._levels, strict=True))

    def _names_of(self, state: tuple[int, ...]) -> list[str]:
        """Return each expert's precision, followed back from the last expert."""
        names = []
        for expert in range(self._costs.shape[1] - 1, -1, -1):
            level = int(self._choices[expert][state])
            names.append(self._names[self._best[level, expert]])
            state = tuple(count - (axis == level - 1) for axis, count in enumerate(state))
        return names[::-1]


def too_small(budget: int, smallest: int) -> DoesNotFitError:
    """Return the error for a budget that no allocation fits."""
    least = f"the experts take at least {format_bytes(smallest)}; give {smallest} bytes or more"
    return DoesNotFitError(f"{arg('budget')} {format_bytes(budget)}: {least}", smallest)


def _sums_and_choices(costs: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Return each state's least sum [N + 1, ...] and its last expert's size [N, N + 1, ...], from costs [S, N].

    A state has an axis for each size but the smallest: the number of experts with that size.
    """
    sizes, experts = costs.shape
    shape = (experts + 1,) * (sizes - 1)
    sums = np.full(shape, np.inf)
    sums[(0,) * len(shape)] = 0
    choices = np.zeros((experts, *shape), np.uint8)
    for expert in range(experts):
        least = sums + costs[0, expert]
        for axis in range(len(shape)):
            with_this = np.full(shape, np.inf)
            into, out = [slice(None)] * len(shape), [slice(None)] * len(shape)
            into[axis], out[axis] = slice(1, None), slice(None, -1)
            with_this[tuple(into)] = sums[tuple(out)] + costs[axis + 1, expert]
            better = with_this < least
            least[better] = with_this[better]
            choices[expert][better] = axis + 1
        sums = least
    return sums, choices
