"""A trace through caches of every size at once, by Mattson's stack.

A policy that keeps what is worth most, whatever the cache's size, makes a cache of s slots hold a part of what one of
s + 1 holds. So one list tells all: its first s records are what s slots hold, and the place at which a request is
found is the least number of slots, less one, that have it in memory (R. L. Mattson, J. Gecsei, D. R. Slutz and
I. L. Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal 9, 1970). A record that is asked
for goes down the list from its top and changes places with each that is worth less, until it comes to where the
record was. With worths a 4, b 2, c 3, d 1, and c asked for, now worth 5:

    list          a b c d      before: 3 slots or more hit
    c carried     c b c d      a carried on
                  c a . d      b carried on, to where c was
                  c a b d

What a record is worth follows from its last use: by then so much, times what has faded over the visits of its layer
since, over the layers until its next turn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def stack_depths(
    records: Array, ends: Array, at_use: Array, fade: Array, by_turn: bool, layers: int, experts: int, deepest: int
) -> Array:
    """How many requests are found at each place of the list, [deepest + 1]; the last counts those not found.

    `records` [R] are layer * experts + expert, step after step, `ends` [S] where each step ends, none empty.
    `at_use` [R] is what a record is worth once that request is counted, `fade` [visits] what remains of it so many
    visits of its layer later, empty where it does not fade; `by_turn` divides by the layers until its next turn. Of
    equals, the higher record stays. All of a step are looked up before any of them is put in.

    Runs as it is, and compiled by numba.
    """
    size, turns = layers * experts, layers if by_turn else 1
    stack, filled = np.empty(deepest, np.int64), 0
    value, faded, worth = np.zeros(size), np.zeros(size), np.zeros(size)
    visits, visit = np.zeros(layers, np.int64), np.zeros(size, np.int64)
    found = np.zeros(deepest + 1, np.int64)
    begin = 0
    for end in ends:
        layer = records[begin] // experts
        visits[layer] += 1
        for i in range(begin, end):
            record = records[i]
            value[record], visit[record], worth[record] = at_use[i], visits[layer], at_use[i]
            place = 0
            while place < filled and stack[place] != record:
                place += 1
            found[place if place < filled else deepest] += 1
        if fade.size:
            for record in range(layer * experts, (layer + 1) * experts):
                faded[record] = value[record] * fade[visits[layer] - visit[record]]
            for record in range(size):
                worth[record] = faded[record] / ((record // experts - layer - 1) % turns + 1)
        for i in range(begin, end):
            carried = records[i]
            for place in range(filled):
                held = stack[place]
                if held == records[i]:
                    stack[place] = carried
                    break
                if worth[carried] > worth[held] or (worth[carried] == worth[held] and carried > held):
                    stack[place], carried = carried, held
            else:
                if filled < deepest:
                    stack[filled] = carried
                    filled += 1
        begin = end
    return found
