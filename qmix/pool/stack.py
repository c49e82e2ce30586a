"""Replay a trace through caches of every size at once, by Mattson's stack.

If a policy's worths do not depend on the cache's size, a cache of s slots holds a part of what s + 1 slots hold. So
one list serves all sizes: its first s records are what s slots hold, and the place at which a request is found is the
least number of slots, less one, that have it in memory (R. L. Mattson, J. Gecsei, D. R. Slutz and
I. L. Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal 9, 1970). A requested record is
carried down the list from its top and changes places with each record worth less, until it comes to its old place.
With worths a 4, b 2, c 3, d 1, and c requested, now worth 5:

    list          a b c d      before: 3 slots or more hit
    c carried     c b c d      a carried on
                  c a . d      b carried on, to where c was
                  c a b d

A record's worth follows from its last use: the worth then, times what the visits of its layer since leave of it, over
the layers until its next turn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def stack_depths(
    records: Array, ends: Array, at_use: Array, fade: Array, by_turn: bool, layers: int, experts: int, deepest: int
) -> Array:
    """Return the number of requests found at each place of the list, [deepest + 1]; the last counts the others.

    `records` [R] are layer * experts + expert, step after step; `ends` [S] are the steps' ends, and no step is empty.
    `at_use` [R] is the worth of a record after that request. `fade` [visits] is the part of it that remains so many
    visits of its layer later, empty where it does not fade. `by_turn` divides by the layers until its next turn. Of
    equals, the higher record stays. All records of a step are looked up before any of them is put in.

    Runs in Python, or compiled by numba.
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
