"""The whole model against transformers' own, and against a reference that dequantises the same records."""

from __future__ import annotations

import pytest
import torch
from checkpoints import make_checkpoint, reference_model
from stores import make_model, make_store

from qmix.model.experts import PooledExperts
from qmix.model.kv import KVCache

SHAPES = {
    "plain": {},
    "explicit head_dim": {"head_dim": 24},
    "six experts, three a token": {"num_local_experts": 6, "num_experts_per_tok": 3},
    "one expert a token": {"num_experts_per_tok": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "sliding window": {"sliding_window": 8},
    "no multiple of 32": {"hidden_size": 72, "intermediate_size": 100},
    "odd sizes": {"hidden_size": 65, "intermediate_size": 31},
}


@pytest.fixture
def prompt():
    """Two sequences, the first padded on the left by five."""
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


def logits(model, ids, mask):
    """Logits [B, T, V] in fp32 of a prefill of all but four tokens and four cached decode steps."""
    with torch.inference_mode():
        out = model(ids[:, :-4], attention_mask=mask[:, :-4], use_cache=True)
        parts, cache = [out.logits], out.past_key_values
        for end in range(ids.shape[1] - 3, ids.shape[1] + 1):
            position = mask[:, :end].sum(1, keepdim=True) - 1
            out = model(
                ids[:, end - 1 : end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                position_ids=position,
            )
            parts.append(out.logits)
    return torch.cat(parts, dim=1).float()


def error(a, b, mask):
    """Root mean square difference of a position's logits, its median over all that are not padding.

    A median, because where two experts are nearly tied, rounding may choose the other one: right, yet far away.
    """
    return (a - b)[mask.bool()].pow(2).mean(-1).sqrt().median().item()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_experts_are_as_close_to_fp32_as_transformers_half_model(tmp_path, prompt, changes, dtype):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", shards=2, dtype=dtype, **changes)
    exact = logits(reference_model(checkpoint), *prompt)
    theirs = error(logits(reference_model(checkpoint, dtype), *prompt), exact, prompt[1])
    store = make_store(checkpoint, tmp_path / "store", "half")
    ours = error(logits(make_model(store, slots=3), *prompt), exact, prompt[1])
    assert ours <= 1.1 * theirs


class DenseExperts(torch.nn.Module):
    """Dequantises every record and multiplies densely in fp32, expert by expert."""

    def __init__(self, pooled: PooledExperts) -> None:
        super().__init__()
        self.pooled = pooled

    def forward(self, hidden, index, weights):
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        for expert, record in self.pooled.pool.get(self.pooled.layer, index.unique().tolist()):
            gate, up, down = (m.dequantize(0, m.rows) for m in (record.gate, record.up, record.down))
            token, position = torch.where(index == expert)
            x = hidden[token].float()
            inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            out[token] += weights[token, position, None].float() * (inner @ down.T)
        return out.to(hidden.dtype)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "nf4,0.*=int8,1.1=half,1.2=fp4"])
def test_quantised_experts_match_a_dense_reference_of_the_same_records(tmp_path, prompt, changes, precision):
    if "1.2" in precision and changes.get("num_local_experts"):
        precision += ",1.5=int8"
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **changes)
    store = make_store(checkpoint, tmp_path / "store", precision)
    ours, reference = make_model(store, slots=3), make_model(store)
    for layer in reference.model.layers:
        layer.mlp.experts = DenseExperts(layer.mlp.experts)
    got, want = logits(ours, *prompt), logits(reference, *prompt)
    # bf16 keeps 8 bits: its rounding of each expert's inner values stays near that
    assert error(got, want, prompt[1]) < 0.02 * want.std().item()


def test_quantised_embedded_model_stays_close_to_its_half_precision(tiny, tmp_path):
    ids = torch.arange(100, 164)[None]
    mask = torch.ones_like(ids)
    exact = logits(reference_model(tiny), ids, mask)
    spread, errors = exact.std().item(), {}
    for precision in ("half", "int8", "nf4", "fp4"):
        store = make_store(tiny, tmp_path / precision, precision)
        errors[precision] = error(logits(make_model(store), ids, mask), exact, mask)
    assert errors["half"] < 0.02 * spread
    assert errors["half"] < errors["int8"] < errors["nf4"] < errors["fp4"] < 0.2 * spread


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 8])
def test_the_planned_cache_gives_what_transformers_own_gives(tmp_path, attention, window):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", sliding_window=window)
    store = make_store(checkpoint, tmp_path / "store", "half")
    model = make_model(store, attention=attention)
    ids = torch.randint(3, 96, (1, 30), generator=torch.Generator().manual_seed(2))
    cache = KVCache(store.geometry, 30, torch.bfloat16)
    with torch.inference_mode():
        want = model(ids).logits
        chunks = [
            model(ids[:, :13], past_key_values=cache).logits,
            model(ids[:, 13:20], past_key_values=cache).logits,
        ]
        chunks += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 30)]
    assert cache.get_seq_length() == 30
    torch.testing.assert_close(torch.cat(chunks, dim=1), want, rtol=0.02, atol=0.03)


def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    store = make_store(checkpoint, tmp_path / "store", "half")
    model = make_model(store)
    ids = torch.arange(3, 15)[None]
    fresh, cropped = (KVCache(store.geometry, 16, torch.bfloat16) for _ in range(2))
    with torch.inference_mode():
        model(ids[:, :8], past_key_values=fresh)
        want = model(ids[:, 8:], past_key_values=fresh).logits
        model(ids[:, :8], past_key_values=cropped)
        model(torch.tensor([[90, 91, 92]]), past_key_values=cropped)
        cropped.crop(-3)
        got = model(ids[:, 8:], past_key_values=cropped).logits
    assert torch.equal(got, want)


def test_dense_weights_are_not_copied_and_experts_are_not_parameters(tmp_path):
    store = make_store(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    model = make_model(store)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any("experts" in name for name, _ in model.named_parameters())
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert max(places) - min(places) < store.layout.dense.size  # all in the one mapping they were read into
