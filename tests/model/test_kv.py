"""One cache, written in two ways: what is read is what was written, and where."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from qmix.model.kv import Chunk, KVCache, Rows, positions_of

SIZES = SimpleNamespace(num_layers=2, num_kv_heads=1, head_dim=10)


def states(*values: float) -> torch.Tensor:
    """[1, 1, T, 10], a token for each value."""
    return torch.tensor(values, dtype=torch.bfloat16)[None, None, :, None].expand(1, 1, len(values), 10)


def test_a_stream_is_appended_and_read_in_place():
    cache = KVCache(SIZES, 4, torch.bfloat16)
    cache.update(states(1, 2), states(-1, -2), 0)
    keys, values = cache.update(states(3), states(-3), 0)
    assert (keys[0, 0, :, 0].tolist(), values[0, 0, :, 9].tolist()) == ([1, 2, 3], [-1, -2, -3])
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr()
    assert (cache.get_seq_length(), cache.complete_length) == (3, 0)  # layer 1 has none yet


def test_a_pass_is_written_to_the_places_of_its_sequences_and_heads_are_filled_up_with_zeros():
    chunks = [Chunk([7, 7], 1, 0, True), Chunk([8], 0, 4, True)]  # two tokens at 1, and one of a sequence from 4 on
    cache = KVCache(SIZES, 6, torch.bfloat16, aligned=True)
    cache.rows = Rows.of(chunks, None)
    keys, _ = cache.update(states(1, 2, 3), states(1, 2, 3), 1)
    assert keys.shape == (1, 1, 6, 16)
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 0, 3, 0]
    assert not keys[..., 10:].any()
    assert positions_of(chunks).tolist() == [1, 2, 0]


def test_a_token_sees_its_own_sequence_and_no_more_than_the_window():
    chunks = [Chunk([7, 7], 1, 0, True), Chunk([8], 0, 4, True)]
    rows = Rows.of(chunks, None)
    assert (rows.first.tolist(), rows.seen.tolist(), rows.longest) == ([0, 0, 4], [2, 3, 1], 3)
    rows = Rows.of(chunks, 2)
    assert (rows.first.tolist(), rows.seen.tolist(), rows.longest) == ([0, 1, 4], [2, 2, 1], 2)
