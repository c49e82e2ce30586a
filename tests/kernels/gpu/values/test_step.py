"""Norms, router, rotary positions, attention, dense products and sampling equal transformers and torch."""

from __future__ import annotations

import pytest
import torch
from records import DTYPES, error
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral as theirs

from qmix.kernels.gpu import attention, dense, norms, sample
from qmix.kernels.gpu.shapes import ATTENTION_SPLIT, attention_splits, sample_blocks

EPS = 1e-5
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether numbers differ by a rounding at most; on the CPU, whose order of sums differs least, by less."""
    return error(found, wanted) < torch.finfo(dtype).eps / 4


class Block:
    """The parts of a layer that `norm` replaces: 3 tokens, 96 columns, 2 of 6 experts."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        config = MixtralConfig(hidden_size=96, num_local_experts=6, num_experts_per_tok=2)
        self.norm, self.router = theirs.MixtralRMSNorm(96, EPS).to(dtype), theirs.MixtralTopKRouter(config).to(dtype)
        torch.nn.init.uniform_(self.norm.weight)
        torch.nn.init.normal_(self.router.weight)
        self.stream = torch.randn(3, 96).to(dtype)
        self.out = torch.empty_like(self.stream)
        self.ids, self.weights = torch.empty(3, 2, dtype=torch.int64), torch.empty(3, 2)


@both_dtypes
@torch.no_grad()
def test_norm_and_router_equal_transformers(dtype):
    block = Block(DTYPES[dtype])
    delta, before = torch.randn(3, 96).to(block.dtype), block.stream.clone()
    positions = torch.tensor([4, -1, 0])
    router = norms.Router(block.router.weight, block.ids, block.weights, positions)
    norms.norm(block.stream, block.norm.weight, block.out, EPS, delta=delta, router=router)
    assert torch.equal(block.stream, before + delta)
    wanted = block.norm(before + delta)
    assert close(block.out, wanted, block.dtype)
    _, weights, ids = block.router(wanted)
    assert torch.equal(block.ids[::2], ids[::2])
    torch.testing.assert_close(block.weights[::2], weights[::2])
    assert block.ids[1].tolist() == [-1, -1]
    assert block.weights[1].tolist() == [0, 0]
    norms.norm(block.stream, block.norm.weight, block.out, EPS)
    assert torch.equal(block.stream, before + delta)
    assert close(block.out, wanted, block.dtype)


def test_router_takes_the_first_of_equals():
    stream, gate = torch.ones(1, 64).bfloat16(), torch.zeros(5, 64).bfloat16()
    gate[1] = gate[2] = gate[4] = 0.5
    ids, weights = torch.empty(1, 3, dtype=torch.int64), torch.empty(1, 3)
    norms.norm(stream, stream[0], torch.empty_like(stream), EPS, router=norms.Router(gate, ids, weights))
    assert ids.tolist() == [[1, 2, 4]]
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))


@both_dtypes
@pytest.mark.parametrize("away", [True, False])
@torch.no_grad()
def test_mixture_adds_experts_in_router_order(dtype, away):
    block = Block(DTYPES[dtype])
    before, ids = block.stream.clone(), torch.tensor([[3, 0], [1, 5], [-1, -1]])
    parts, elsewhere = torch.randn(2, 6, 96), torch.randn(6, 96).to(block.dtype)
    parts[:, [1, 3, 4, 5]] = float("nan")  # nobody wrote there
    addresses, weights = torch.tensor([0, 64, 64, 64, 0, 0]), torch.rand(3, 2)
    mixture = norms.Mixture(parts, ids, weights, addresses, elsewhere if away else None)
    norms.norm(block.stream, block.norm.weight, block.out, EPS, mixture=mixture)
    results = (parts[0] + parts[1]).to(block.dtype)
    results[[1, 3]] = elsewhere[[1, 3]] if away else 0
    results[4:] = 0
    total = (results.view(3, 2, 96).float() * weights[..., None]).sum(1).to(block.dtype)
    assert close(block.stream, before + total, block.dtype)
    assert close(block.out, block.norm(before + total), block.dtype)


class Heads:
    """Three tokens, two of sequence 1 and none, of 6 query heads, 2 key heads of width 16 and 600 positions."""

    def __init__(self, dtype: torch.dtype, positions: list[int]) -> None:
        self.dtype, self.positions = dtype, torch.tensor(positions)
        self.rows = torch.tensor([1, 1, 0])
        self.qkv = torch.randn(3, 10 * 16).to(dtype)
        self.keys, self.values = (torch.randn(2, 2, 600, 16).to(dtype) for _ in range(2))
        angles = torch.arange(600.0)[:, None] / 1e4 ** (torch.arange(0, 16, 2) / 16)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turned(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries and keys as transformers turns them, and values: [T, heads, D]."""
        q, k, v = self.qkv.clone().view(3, 10, 16).split((6, 2, 2), 1)
        cos, sin = (torch.cat((table, table), 1)[self.positions] for table in (self.cos, self.sin))
        return *theirs.apply_rotary_pos_emb(q, k, cos, sin), v

    def rotate(self) -> None:
        tables = self.cos, self.sin
        attention.rotate(self.qkv, *tables, self.keys, self.values, self.rows, self.positions)

    def attend(self) -> torch.Tensor:
        parts = attention_splits(600)
        sums, stats = torch.full((3, 6, parts, 16), float("nan")), torch.full((3, 6, parts, 2), float("nan"))
        out = torch.full((3, 6 * 16), float("nan"), dtype=self.dtype)
        attention.attend(self.qkv, self.keys, self.values, self.rows, self.positions, sums, stats, out)
        return out.view(3, 6, 16)


@both_dtypes
def test_rotary_positions_and_cache_equal_transformers(dtype):
    heads = Heads(DTYPES[dtype], [520, 521, -1])
    q, k, v = heads.turned()
    keys, values = heads.keys.clone(), heads.values.clone()
    for token in (0, 1):
        keys[1, :, heads.positions[token]], values[1, :, heads.positions[token]] = k[token], v[token]
    heads.rotate()
    assert torch.equal(heads.keys, keys)
    assert torch.equal(heads.values, values)
    assert torch.equal(heads.qkv.view(3, 10, 16)[:2, :6], q[:2])


@both_dtypes
@pytest.mark.parametrize("first", [0, ATTENTION_SPLIT - 1, 580])
def test_attention_sees_the_positions_up_to_its_own(dtype, first):
    heads = Heads(DTYPES[dtype], [first, first + 1, -1])
    heads.rotate()
    found = heads.attend()
    q = heads.qkv.view(3, 10, 16)[:, :6].double()
    for token in (0, 1):
        seen = slice(0, first + token + 1)
        keys, values = (cache[1, :, seen].repeat_interleave(3, 0).double() for cache in (heads.keys, heads.values))
        shares = torch.softmax(torch.einsum("hd,hpd->hp", q[token], keys) / 4, -1)
        assert error(found[token], torch.einsum("hp,hpd->hd", shares, values)) < torch.finfo(heads.dtype).eps
    assert (found[2] == 0).all()


@both_dtypes
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 40, 72), (9, 16, 512)])
def test_dense_products(dtype, tokens, rows, columns):
    x, weight = torch.randn(tokens, columns).to(DTYPES[dtype]), torch.randn(rows, columns).to(DTYPES[dtype])
    wanted = x.double() @ weight.double().T
    for out, tolerance in ((torch.empty(tokens, rows), 1e-6), (x.new_empty(tokens, rows), torch.finfo(x.dtype).eps)):
        dense.linear(x, weight, out)
        assert error(out, wanted) < tolerance


def next_tokens(logits: torch.Tensor, temperature: float, seeds: list[int], positions: list[int]) -> list[int]:
    tokens, vocabulary = logits.shape
    best = torch.empty(tokens, sample_blocks(vocabulary))
    out = torch.empty(tokens, dtype=torch.int64)
    places, ask = best.int(), torch.full((tokens,), temperature)
    sample.sample(logits, ask, torch.tensor(seeds), torch.tensor(positions), best, places, out)
    return out.tolist()


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.randn(3, 2500)
    logits[1, 7] = logits[1, 1700] = 9
    logits[2] = float("nan")
    assert next_tokens(logits, 0, [0] * 3, [0] * 3) == [logits[0].argmax().item(), 7, 2499]


def test_draws_follow_softmax_and_depend_on_seed_and_position_alone():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().repeat(120, 1)
    drawn = next_tokens(logits * 2, 2.0, list(range(120)), [3] * 120)
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 120
    assert (shares - probabilities).abs().max() < 0.14  # three standard deviations
    again = next_tokens(logits[:12], 1.0, list(range(12)), [3] * 12)
    assert again == drawn[:12]
    assert next_tokens(logits[:12], 1.0, list(range(12)), [4] * 12) != again
    assert next_tokens(logits[:12], 1.0, [7] * 12, list(range(12))) != again
