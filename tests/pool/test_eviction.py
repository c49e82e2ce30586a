"""Eviction policies, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import TINY_CONFIG

from qmix.geometry import Geometry
from qmix.pool.eviction import LeastFrequentlyUsed, UsesPerTime
from qmix.pool.replay import replay

GEOMETRY = Geometry.from_config(TINY_CONFIG | {"num_hidden_layers": 4, "num_local_experts": 8})  # top 2


def test_the_rate_of_use_starts_at_chance_and_decays_with_each_visit():
    policy = LeastFrequentlyUsed(GEOMETRY, decay=0.5)
    assert policy.rate((0, 3)) == 0.25
    policy.used(0, [3, 4])
    assert policy.rate((0, 3)) == 0.25 / 2 + 0.5
    assert policy.rate((0, 5)) == 0.25 / 2
    policy.used(0, [4, 5])
    assert policy.rate((0, 3)) == 0.625 / 2
    assert policy.rate((0, 4)) == 0.625 / 2 + 0.5
    assert policy.rate((1, 3)) == 0.25  # its layer was not visited


def test_the_rate_of_use_starts_at_what_is_expected():
    use = [[0.9, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]] + [[0.25] * 8] * 3
    policy = LeastFrequentlyUsed(GEOMETRY, use, decay=0.5)
    assert [policy.rate((0, expert)) for expert in range(3)] == [0.9, 0.3, 0.2]
    policy.used(0, [1, 2])
    assert [policy.rate((0, expert)) for expert in range(3)] == pytest.approx([0.45, 0.65, 0.6])
    # seen from layer 1, layer 0's turn comes in three steps
    assert UsesPerTime(GEOMETRY, use).worth((0, 0), layer=1) == pytest.approx(0.9 / 3)


def test_of_equal_experts_the_one_whose_turn_is_farthest_goes_first():
    policy = UsesPerTime(GEOMETRY)
    worth = [policy.worth((layer, 0), layer=1) for layer in range(4)]
    # seen from layer 1: layer 2 comes next, then 3, then 0, and 1 itself in four steps
    assert worth == pytest.approx([0.25 / 3, 0.25 / 4, 0.25 / 1, 0.25 / 2])


@pytest.mark.parametrize(("held", "factors"), [(0.4, (1, 1, 1, 1)), (0.6, (4, 2, 1, 1))])
def test_hits_in_the_first_layers_count_more_where_most_experts_have_a_slot(held, factors):
    policy = UsesPerTime(GEOMETRY, held=held)
    worth = [policy.worth((layer, 0), layer=3) for layer in range(4)]
    assert worth == pytest.approx([0.25 * factor / away for away, factor in enumerate(factors, 1)])


def test_going_round_everything_uses_per_time_is_as_good_as_knowing_the_future():
    """Every pass needs every expert, as prefill does; evicting the least recently used hits nothing."""
    found = replay(np.tile(np.arange(8), (4 * 10, 1)), 4, 8, [16], top_k=2)
    assert found.hit_rate("lru", 16) == 0
    assert found.hit_rate("uses-per-time", 16) == found.hit_rate("belady", 16) > 0.4
