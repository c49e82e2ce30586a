"""Guesses of the experts of later layers."""

from __future__ import annotations

import pytest
import torch
from checkpoints import make_checkpoint
from stores import make_model, make_pool, make_store

from qmix.pool.prefetch import EMBEDDING, FEW_TOKENS, Prefetcher


def test_by_hand():
    """Two features, two layers: layer 1's gate prefers expert 0 for the first, expert 1 for the second."""
    gates = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    norms = torch.tensor([[1.0, 4.0], [1.0, 1.0]])
    prefetcher = Prefetcher(norms, gates, top_k=1)
    # the stream (2, 1) reaches layer 0's experts as (2, 4), and layer 1's as (2, 1)
    assert prefetcher.coming(0, torch.tensor([[2.0, 4.0]])) == [(1, 0)]
    assert prefetcher.coming(EMBEDDING, torch.tensor([[2.0, 1.0]])) == [(0, 1), (1, 0)]
    assert prefetcher.coming(1, torch.tensor([[2.0, 1.0]])) == []


def test_guesses_that_prove_wrong_are_no_longer_acted_upon_until_they_prove_right():
    prefetcher = Prefetcher(torch.ones(2, 2), torch.eye(2).expand(2, 2, 2), top_k=1)
    first = torch.tensor([[1.0, 0.0]])
    tries = 0
    while prefetcher.coming(0, first):
        prefetcher.chosen(1, [1])
        tries += 1
    assert 1 <= tries < 10
    assert prefetcher.precision(1) == 0.0
    prefetcher.chosen(1, [0])
    while not prefetcher.coming(0, first):
        prefetcher.chosen(1, [0])
    assert 0.0 < prefetcher.precision(1) < 1.0


def test_for_many_tokens_all_experts_of_the_next_layer_are_coming():
    prefetcher = Prefetcher(torch.ones(3, 4), torch.randn(3, 5, 4), top_k=2)
    assert prefetcher.coming(0, torch.randn(FEW_TOKENS + 1, 4)) == [(1, expert) for expert in range(5)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prefetcher")
    return make_store(make_checkpoint(directory / "checkpoint"), directory / "store")


def test_a_guess_is_what_the_router_says_when_layers_add_nothing(store):
    """Without attention and experts the stream does not change, and every guess is right."""
    model = make_model(store, slots=4)
    prefetcher = model.model.layers[0].mlp.experts.prefetcher
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.experts.activation = torch.zeros_like
    with torch.inference_mode():
        for token in range(3, 20):
            model(torch.tensor([[token]]))
    assert prefetcher.guesses[1] >= 17
    assert prefetcher.precision(1) == prefetcher.precision(2) == 1.0


def test_where_every_expert_has_a_slot_nothing_is_guessed(store):
    assert make_model(store).model.layers[0].mlp.experts.prefetcher is None


def test_the_text_does_not_depend_on_what_is_read_ahead(store):
    ids = torch.arange(5, 12)[None]
    with torch.inference_mode():
        full, small = (make_model(store, slots)(ids).logits for slots in (8, 4))
    assert torch.equal(full, small)


def test_a_pool_that_holds_all_says_so(store):
    pools = [make_pool(store, slots) for slots in (7, 8)]
    assert [pool.holds_all for pool in pools] == [False, True]
    for pool in pools:
        pool.close()
