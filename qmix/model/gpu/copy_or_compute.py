"""Choose between copying a layer's experts from main memory to its GPU and computing them on the CPU.

Pure arithmetic. For one token copying never pays: an expert is read once in either case, and memory is faster than
PCIe. With many tokens the CPU's products take longer than the copy. Reads from the disk are the same either way and
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmix.geometry import HALF_BYTES
from qmix.machine.rates import Rates


@dataclass(frozen=True, slots=True)
class ExpertSize:
    """An expert's bytes, the number of its weights, and true for 4-bit weights."""

    record: int
    weights: int
    four_bit: bool


def read_seconds(size: ExpertSize, rates: Rates) -> float:
    """Return the seconds in which the CPU reads an expert's weights for a product with one token."""
    return size.record / (rates.four_bit_read if size.four_bit else rates.memory_read)


def exchange_seconds(size: ExpertSize, rates: Rates) -> float:
    """Return the seconds in which an expert changes places with a resident: a copy to the GPU, then one from it."""
    return 2 * size.record / rates.pcie


def host_seconds(size: ExpertSize, tokens: Sequence[int], hidden: int, rates: Rates) -> float:
    """Return the seconds of a layer's experts on the CPU; `tokens` has an entry for each of them.

    An expert takes the longer of reading its weights and multiplying them. x is downloaded and the results are
    uploaded once.
    """
    reading = read_seconds(size, rates)
    products = sum(max(reading, 2 * count * size.weights / rates.matmul) for count in tokens)
    return products + 2 * sum(tokens) * hidden * HALF_BYTES / rates.pcie


def copy_seconds(size: ExpertSize, tokens: Sequence[int], rates: Rates) -> float:
    """Return the seconds on the GPU: an expert is copied while the one before computes, so the last product adds."""
    copying = size.record / rates.pcie
    products = [
        max(2 * size.record / rates.gpu_memory, 2 * count * size.weights / rates.gpu_matmul) for count in tokens
    ]
    return sum(max(copying, product) for product in products) + (products[-1] if products else 0.0)


def copying_pays(size: ExpertSize, tokens: Sequence[int], hidden: int, rates: Rates) -> bool:
    """Return True to copy a layer's experts to the GPU for this step; `tokens` has an entry for each of them."""
    return copy_seconds(size, tokens, rates) < host_seconds(size, tokens, hidden, rates)


def copied_share(size: ExpertSize, tokens: Sequence[int], rates: Rates, most: int) -> int:
    """Return how many of a layer's experts to copy, at most `most`, while the CPU computes the others.

    `tokens` has an entry for each of them, descending: those with the most tokens are copied. Both ways read main
    memory, and together no faster than it allows. Among equally fast shares the smallest is taken.
    """
    reading = read_seconds(size, rates)
    products = [max(reading, 2 * count * size.weights / rates.matmul) for count in tokens]

    def seconds(copied: int) -> float:
        both = len(tokens) * size.record / rates.memory_read if copied else 0.0
        return max(copied * size.record / rates.pcie, sum(products[copied:]), both)

    return min(range(min(most, len(tokens)) + 1), key=seconds)
