"""Grouped attention against transformers' own, and that it copies no keys or values."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qmix.attention import grouped_sdpa


class Heads(torch.nn.Module):
    """What attention functions look at in their module."""

    is_causal = True

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.num_key_value_groups = shared


def inputs(batch: int, heads: int, groups: int, tokens: int, positions: int):
    rng = torch.Generator().manual_seed(tokens)
    query = torch.randn(batch, heads, tokens, 16, generator=rng)
    key, value = (torch.randn(batch, groups, positions, 16, generator=rng) for _ in range(2))
    return query, key, value


def causal_mask(batch: int, tokens: int, positions: int, padding: int) -> torch.Tensor:
    """True where a query may look; the first `padding` positions of the first sequence are hidden."""
    mask = torch.ones(batch, 1, tokens, positions, dtype=torch.bool).tril(positions - tokens)
    mask[0, :, :, :padding] = False
    return mask


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_it_gives_what_transformers_gives(groups, tokens, masked):
    positions = 9 if masked or tokens == 1 else tokens
    query, key, value = inputs(2, 6, groups, tokens, positions)
    mask = causal_mask(2, tokens, positions, padding=3) if masked else None
    module = Heads(6 // groups)
    got, _ = grouped_sdpa(module, query, key, value, mask, scaling=0.3)
    want, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 8])
def test_keys_and_values_are_used_where_they_lie(monkeypatch, tokens):
    query, key, value = inputs(1, 6, 2, tokens, 40)
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watching(q, k, v, **options):
        seen.append((k.data_ptr(), v.data_ptr()))
        return real(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
    grouped_sdpa(Heads(3), query, key, value, causal_mask(1, tokens, 40, 0))
    assert set(seen) == {(key.data_ptr(), value.data_ptr())}
