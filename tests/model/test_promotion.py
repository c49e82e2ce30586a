"""Experts change places with residents where that would have paid, by hand-made routing."""

from __future__ import annotations

import math

import pytest

from qmix.model.gpu import promotion
from qmix.model.gpu.promotion import Exchange, Group, Promotion, long_used


def even(start, layer=0, exchanged=3.0):
    """Return a group of 4 experts, 2 a token, and exchanges that cost as much as `exchanged` uses."""
    return Group(layer, frozenset(start), dict(enumerate(long_used([0.5] * 4))), 1.0, exchanged)


def run(made, tokens, chosen, layer=0):
    """Return the exchanges of so many tokens of one routing, with their token."""
    found = []
    for number in range(tokens):
        made.used(layer, [chosen])
        found += [(number + 1, each) for each in made.exchanges(1)]
    return found


def test_experts_that_are_used_replace_those_that_are_not():
    """Expert 2 and 3 are used alone: imagined after 16 tokens, made once 64 tokens have shown what it saves."""
    made = Promotion([even({0, 1})])
    assert run(made, 200, [2, 3]) == [(64, Exchange(0, 2, 0)), (64, Exchange(0, 3, 1))]
    assert made.groups[0].real == {2, 3}


def test_no_exchange_where_residents_are_used_or_all_experts_alike():
    assert run(Promotion([even({0, 1})]), 300, [0, 1]) == []
    made = Promotion([even({0, 1})])
    assert [run(made, 1, [number % 4, (number + 1) % 4]) for number in range(300)] == [[]] * 300


def test_no_exchange_where_it_costs_more_than_it_saves():
    assert run(Promotion([even({0, 1}, exchanged=1000.0)]), 300, [2, 3]) == []
    # imagined exchanges that come too often save nothing: the favourites change as often as they are followed
    made = Promotion([even({0, 1}, exchanged=12.0)])
    favourites = [[2, 3], [0, 1]] * 20
    assert [run(made, 32, chosen) for chosen in favourites] == [[]] * 40


def test_only_layers_and_precisions_with_residents_and_others_take_part():
    made = Promotion([even({0}, layer=1)])
    made.used(0, [[2, 3]])
    assert made._stayed == 0
    assert run(made, 64, [2, 3], layer=1) == [(64, Exchange(1, 2, 0))]


@pytest.mark.parametrize("tokens", [1, 4])
def test_use_fades_by_tokens_whatever_their_number_in_a_step(tokens):
    made = Promotion([even({0, 1})])
    for _ in range(16 // tokens):
        made.used(0, [[2, 3]])
        made.exchanges(tokens)
    old, new = long_used([0.5])[0] * math.exp(-16 / promotion.DECAY), made.groups[0].use[2]
    assert made.groups[0].use[0] == pytest.approx(old)
    assert new == pytest.approx(old + sum(math.exp(-(16 - at) / promotion.DECAY) for at in range(0, 16, tokens)))
