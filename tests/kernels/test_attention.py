"""Grouped attention compared with transformers' own and with fp64; it copies no keys or values."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qmix.model import attention
from qmix.model.attention import grouped_sdpa

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # largest relative error of one rounding


class Heads(torch.nn.Module):
    """A module with the attributes that attention functions read."""

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
    """Return a mask, True where a query sees a position; the first sequence begins with `padding` hidden ones."""
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


def caches(batch: int, groups: int, positions: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return keys and values [batch, groups, positions, width], part of a cache whose other positions are NaN."""
    both = torch.full((2, batch + 1, groups, positions + 3, width), torch.nan, dtype=dtype)
    part = both[:, :batch, :, :positions]
    part[:] = torch.randn(part.shape, generator=torch.Generator().manual_seed(positions))
    return part[0], part[1]


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, scaling: float):
    """Return attention in fp64 without the positions `hidden` [B, S], and the error that fp32 may have."""
    shared = query.shape[1] // key.shape[1]
    keys, values = (tensor.double().repeat_interleave(shared, 1) for tensor in (key, value))
    scores = query.double() @ keys.mT * scaling
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    largest = (query.double().abs() @ keys.abs().mT * scaling).amax()
    return (weights @ values).transpose(1, 2), 1e-6 * (1 + largest) * (weights @ values.abs()).transpose(1, 2)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 8),
    positions=st.integers(1, 1100),
    width=st.sampled_from([16, 64, 80, 128]),
    masked=st.sampled_from([None, "bool", "additive", "shared"]),
)
@settings(max_examples=60, deadline=None)
def test_the_decode_kernel_is_exact_to_one_rounding(dtype, batch, groups, shared, positions, width, masked):
    key, value = caches(batch, groups, positions, width, dtype)
    query = torch.randn(batch, groups * shared, 1, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    hidden = torch.zeros(batch, positions, dtype=torch.bool)
    if masked:
        hidden[:, : positions // 2] = True
    if masked in ("bool", "additive"):
        hidden[0] = False
    mask = None if masked is None else ~hidden[:, None, None]
    if masked == "shared":
        mask = mask[:1]
    if masked == "additive":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KERNEL_NUMBERS", 0)
        patch.delattr(torch.nn.functional, "scaled_dot_product_attention")
        got, _ = grouped_sdpa(Heads(shared), query, key, value, mask, scaling=0.1)
    want, error = eager(query, key, value, hidden, 0.1)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= ROUNDING[dtype] * want.abs() + error + 1e-7).all()


def decode_inputs(positions: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 12, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16(), *caches(
        2, 2, positions, 64, torch.bfloat16
    )


def test_decode_is_the_same_on_one_and_two_threads():
    query, key, value = decode_inputs(4200)
    assert key[0].numel() >= attention.KERNEL_NUMBERS
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(grouped_sdpa(Heads(6), query, key, value, None)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_sequence_does_not_depend_on_the_others_of_its_batch():
    query, key, value = decode_inputs(4200)
    both, _ = grouped_sdpa(Heads(6), query, key, value, None)
    alone = [grouped_sdpa(Heads(6), query[i : i + 1], key[i : i + 1], value[i : i + 1], None)[0] for i in range(2)]
    assert key[0].numel() >= attention.KERNEL_NUMBERS
    assert torch.equal(both, torch.cat(alone))


def test_a_sequence_of_nothing_but_padding_gives_zeros():
    query, key, value = decode_inputs(4200)
    mask = torch.ones(2, 1, 1, 4200, dtype=torch.bool)
    mask[0] = False
    got, _ = grouped_sdpa(Heads(6), query, key, value, mask)
    assert (got[0] == 0).all()
    assert torch.equal(got[1:], grouped_sdpa(Heads(6), query, key, value, None)[0][1:])


def test_small_caches_do_not_load_numba():
    code = """
import sys, torch
from qmix.model.attention import grouped_sdpa
grouped_sdpa(None, *(torch.ones(1, h, n, 64).bfloat16() for h, n in ((6, 1), (2, 100), (2, 100))), None)
print("numba" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout == "False\n"
