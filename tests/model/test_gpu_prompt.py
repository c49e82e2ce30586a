"""Long prompts layer by layer, the CPU as every GPU: numbers as chunk after chunk, and each expert copied once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from spreads import spread_plan
from stores import make_store

from qmix.engine.stream import Runner
from qmix.machine.rates import Rates
from qmix.model.gpu.devices import Staging
from qmix.plan.memory import PREFILL_CHUNK

COPIES = Rates(pcie=1e18, gpu_memory=1e18, gpu_matmul=1e21)
TOKENS = PREFILL_CHUNK + 100
PROMPT = torch.randint(300, 4000, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("prompt") / "store", "int8")


@pytest.fixture
def copied(monkeypatch):
    """Count the records that are copied to a staging buffer."""
    count = Counter()
    copy = Staging.copy

    def counted(self, record, beside=None):
        count["copies"] += 1
        return copy(self, record, beside)

    monkeypatch.setattr(Staging, "copy", counted)
    return count


def plan(store, prefill, slots=40):
    homes = ["gpu:0"] * 3 + ["gpu:1"] * 3
    made = spread_plan(store.layout, homes, {0, 3}, slots)
    return replace(made, context=TOKENS + 32, prefill=prefill)


def answer(store, plan, tokens=6, **options):
    with Runner(store, plan, kind="cpu", rates=COPIES) as runner:
        loaders = {layer.mlp.experts.loader for layer in runner.model.model.layers}
        result = runner.complete(PROMPT, temperature=0, ignore_eos=True, max_new_tokens=tokens, **options)
        assert not any(loader.ahead for loader in loaders)  # nothing is left for another prompt to take
        return result.token_ids, [layer.keys[..., :TOKENS, :].clone() for layer in runner.cache.layers]


def test_keys_and_text_are_those_of_one_chunk_after_the_other(store):
    want, keys = answer(store, plan(store, PREFILL_CHUNK))
    found, ours = answer(store, plan(store, 4 * PREFILL_CHUNK))
    assert found == want
    for mine, theirs in zip(ours, keys, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.03 * theirs.float().std().item())


@pytest.mark.parametrize("away", [(0, 2, 3), (1, 2, 3)], ids=["the first is used", "the second is used"])
def test_a_record_copied_ahead_for_nobody_spoils_no_other(store, away):
    """The first two records are copied ahead; one of them gets no token, and the next copy must take its buffer."""
    with Runner(store, plan(store, 4 * PREFILL_CHUNK), kind="cpu", rates=COPIES) as runner, torch.inference_mode():
        experts = runner.model.model.layers[1].mlp.experts
        experts.residents, loader = {}, experts.loader
        chosen = [[away[token % 3], away[(token + 1) % 3]] for token in range(9)]
        x = torch.randn(9, store.geometry.hidden_size, generator=torch.Generator().manual_seed(4)).bfloat16()
        weights = torch.full((9, 2), 0.5)
        want = experts.mix(x, chosen, weights)
        loader.begin([(1, 0), (1, 1)])
        assert torch.equal(experts.mix(x, chosen, weights), want)


@pytest.mark.slow
def test_with_drafts_the_text_is_the_same(store):
    in_parts, _ = answer(store, plan(store, PREFILL_CHUNK), draft_ngram=3)
    assert answer(store, plan(store, 2 * PREFILL_CHUNK), draft_ngram=3)[0] == in_parts


def test_each_expert_elsewhere_is_copied_once_a_prompt(store, copied):
    answer(store, plan(store, 4 * PREFILL_CHUNK), tokens=1)
    assert copied["copies"] == 6 * 6  # six of eight experts in six layers
    copied.clear()
    answer(store, plan(store, PREFILL_CHUNK), tokens=1)
    assert copied["copies"] == 2 * 6 * 6  # a chunk after the other: twice


@pytest.mark.slow
def test_copies_for_the_next_layer_begin_early_only_where_records_stay_in_their_slots(store, copied):
    """With few slots nothing is copied ahead, and the text is the same."""
    assert answer(store, plan(store, 4 * PREFILL_CHUNK, slots=2))[0] == answer(store, plan(store, 4 * PREFILL_CHUNK))[0]


def test_an_interrupted_prompt_leaves_the_models_forward_as_it_was(store):
    with Runner(store, plan(store, 4 * PREFILL_CHUNK), kind="cpu") as runner:
        before = runner.model.model.forward
        pieces = runner.generate(PROMPT, temperature=0, ignore_eos=True, max_new_tokens=6)
        next(pieces)
        pieces.close()
        assert runner.model.model.forward == before
