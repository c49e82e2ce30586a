"""Penalties, biases, several completions, log-probabilities: by hand, and the same for one prompt and for many."""

from __future__ import annotations

import re

import pytest
import torch
from stores import make_store, many_prompts, one_prompt
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
)

from qmix.engine.running import BatchRequest
from qmix.engine.sampler import Sampler, chosen_token
from qmix.engine.sampling import Sampling, stream_seed
from qmix.errors import UsageError

PROMPT = [5, 6, 7, 300, 5]


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("options") / "half", "half")


@pytest.fixture(scope="module")
def one(store):
    with one_prompt(store, 64) as runner:
        yield runner


@pytest.fixture(scope="module")
def many(store):
    with many_prompts(store, 64, 4) as runner:
        yield runner


@pytest.fixture
def bare(one, monkeypatch):
    """A model whose own generation config sets nothing."""
    monkeypatch.setattr(one.model, "generation_config", GenerationConfig(eos_token_id=2))
    return one.model


def processed(model, tokens: list[int], logits: list[float], prompt: int, **options) -> list[float]:
    """The scores that a token is chosen from."""
    sampler = Sampler(model, Sampling(**options), tokens[:prompt])
    whole = torch.full((1, model.config.vocab_size), -1.0)
    whole[0, : len(logits)] = torch.tensor(logits)
    return sampler._processors(torch.tensor([tokens]), whole)[0, : len(logits)].tolist()


def test_penalties_by_hand(bare):
    """Token 0 in the prompt only, 1 twice and 2 once in the answer, 3 nowhere."""
    tokens, logits = [0, 0, 1, 2, 1], [4.0, 3.0, -1.0, 0.5]
    check = [
        ({"presence_penalty": 0.5}, [4.0, 2.5, -1.5, 0.5]),
        ({"frequency_penalty": 0.25}, [4.0, 2.5, -1.25, 0.5]),
        ({"presence_penalty": 0.5, "frequency_penalty": -0.25}, [4.0, 3.0, -1.25, 0.5]),
        ({"repetition_penalty": 2.0}, [2.0, 1.5, -2.0, 0.5]),
        ({"logit_bias": {0: -100, 3: 1.5}}, [-96.0, 3.0, -1.0, 2.0]),
        ({"logit_bias": {1: 1.0}, "repetition_penalty": 2.0, "presence_penalty": 1.0}, [2.0, 1.0, -3.0, 0.5]),
    ]
    for options, want in check:
        assert processed(bare, tokens, logits, 2, temperature=0, **options) == want, options


def test_the_order_is_bias_repetition_penalties_temperature_cut_as_transformers_processors_give(bare):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, bare.config.vocab_size, generator=generator)
    tokens = torch.tensor([[*PROMPT, 8, 9, 8]])
    sampling = Sampling(
        temperature=0.5, min_p=0.01, top_p=1.0, top_k=0, repetition_penalty=1.3, presence_penalty=0.7,
        frequency_penalty=0.2, logit_bias={8: 3, 300: -2.5},
    )  # fmt: skip
    before = LogitsProcessorList(
        [SequenceBiasLogitsProcessor([[[8], 3.0], [[300], -2.5]]), RepetitionPenaltyLogitsProcessor(1.3)]
    )
    want = before(tokens, logits.clone())
    want[0, 8] -= 0.7 + 2 * 0.2
    want[0, 9] -= 0.7 + 0.2
    want = LogitsProcessorList([TemperatureLogitsWarper(0.5), MinPLogitsWarper(0.01)])(tokens, want)
    found = Sampler(bare, sampling, PROMPT)._processors(tokens, logits.clone())
    assert torch.equal(found, want)


def test_biases_of_the_model_and_of_the_options_add_up(one, monkeypatch):
    own = GenerationConfig(eos_token_id=2, sequence_bias=[[[1], 1.0], [[0, 2], 5.0]])
    monkeypatch.setattr(one.model, "generation_config", own)
    assert processed(one.model, [7, 0], [0.0, 0.0, 0.0], 1, temperature=0, logit_bias={1: 2.5}) == [0.0, 3.5, 5.0]
    assert own.sequence_bias == [[[1], 1.0], [[0, 2], 5.0]]


OPTIONS = [
    {"presence_penalty": 2.0},
    {"frequency_penalty": 2.0, "presence_penalty": -1.0},
    {"repetition_penalty": 1.5, "logit_bias": {261: -100, 300: 10}},
    {"logit_bias": {5: 100}, "min_p": 0.1, "temperature": 0.5, "frequency_penalty": 0.5},
    {"json_schema": '{"type": "integer"}', "presence_penalty": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_prompt_and_many_go_through_the_same_processors(one, options, monkeypatch):
    """Compare the processors of `generate`, caught in the act, with those of a batch: order and content."""
    seen = []

    def caught(*arguments, **given):
        found = type(one.model)._get_logits_processor(one.model, *arguments, **given)
        seen.append(described(found))
        return found

    sampling = Sampling(max_new_tokens=1, seed=1, **options)
    monkeypatch.setattr(one.model, "_get_logits_processor", caught)
    one.complete(PROMPT, sampling)
    constraint = one.constraint(sampling, one.plan)
    assert described(Sampler(one.model, sampling, PROMPT, constraint)._processors) == seen[0]


def described(processors) -> str:
    values = [(type(each).__name__, vars(each)) for each in processors]
    return re.sub(r"<[\w.]+ object at 0x\w+>", "", str(values))


def test_one_prompt_and_many_choose_by_the_same_scores(one, many):
    """Two tokens that nothing else comes near."""
    bias = {300: 100, 301: 80}
    sampling = Sampling(max_new_tokens=6, temperature=0, logit_bias=bias, ignore_eos=True, logprobs=2)
    alone = one.complete(PROMPT, sampling)
    (together,) = [answer for done in many.answer([BatchRequest("a", PROMPT, sampling)]) for answer in done]
    assert alone.token_ids == together.token_ids
    assert set(alone.token_ids) <= {300, 301}
    assert [chosen.token for chosen in alone.logprobs] == alone.token_ids
    for mine, theirs in zip(alone.logprobs, together.tokens, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=0.5, rel=0.1)
        assert mine.logprob < -1, "the model's own, before the bias"
    plain = one.complete(PROMPT, max_new_tokens=1, temperature=0)
    assert plain.logprobs is None
    assert "logprobs" not in plain.to_json()


def test_completions_are_those_of_their_own_seeds_whatever_is_beside_them(one, many):
    sampling = Sampling(max_new_tokens=10, temperature=1.5, seed=7, n=3, ignore_eos=True)
    seeds = [7, stream_seed(7, "1"), stream_seed(7, "2")]
    beside = BatchRequest("b", [9, 8], Sampling(max_new_tokens=5, temperature=1.0, seed=7))
    found = [answer for done in many.answer([BatchRequest("a", PROMPT, sampling), beside]) for answer in done]
    texts = {answer.index: answer.token_ids for answer in found if answer.name == "a"}
    singles = [BatchRequest(str(seed), PROMPT, Sampling(max_new_tokens=10, temperature=1.5, seed=seed, ignore_eos=True))
               for seed in seeds]  # fmt: skip
    alone = {answer.name: answer.token_ids for done in many.answer(singles) for answer in done}
    assert [texts[index] for index in range(3)] == [alone[str(seed)] for seed in seeds]
    assert len({tuple(ids) for ids in texts.values()}) == 3
    results = [piece.result for piece in one.generate(PROMPT, sampling) if piece.result is not None]
    assert [result.seed for result in results] == seeds
    assert [result.reused_tokens for result in results] == [0, 4, 4]
    assert len({tuple(result.token_ids) for result in results}) == 3
    with pytest.raises(UsageError, match=r"^n 3: "):
        one.complete(PROMPT, sampling)


def test_log_probabilities_of_a_draft_are_those_of_its_places(one):
    """Text that repeats itself: several tokens of a step are accepted."""
    options = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    prompt = [5, 6, 7, 8, 9] * 4
    plain = one.complete(prompt, Sampling(**options))
    drafted = one.complete(prompt, Sampling(draft_ngram=4, **options))
    assert drafted.token_ids == plain.token_ids
    for mine, theirs in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert mine.token == mine.likeliest[0][0]
        assert mine.logprob == pytest.approx(theirs.logprob, abs=0.3)


def test_the_likeliest_by_hand():
    chosen = chosen_token(0, torch.tensor([0.0, 1.0, 1.0, 0.0]).log(), 2)
    assert (chosen.token, chosen.logprob, len(chosen.likeliest)) == (0, -torch.inf, 2)
    assert dict(chosen.likeliest) == pytest.approx({1: -0.693147, 2: -0.693147}, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty 2.5: must be -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan: must be -2 to 2"),
        ({"n": 0}, "n 0: must be 1 to 128"),
        ({"logprobs": 21}, "logprobs 21: must be 0 to 20"),
        ({"logit_bias": {5: 101}}, "logit_bias 101 of token 5: must be -100 to 100"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias nan of token 5: must be -100 to 100"),
        ({"logit_bias": {-1: 1}}, "logit_bias: -1 is not a token id"),
        ({"logit_bias": {"5": 1}}, "logit_bias: '5' is not a token id"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias of 1025 tokens: must be at most 1024"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(options, message):
    with pytest.raises(UsageError) as caught:
        Sampling(**options)
    assert str(caught.value) == message


def test_a_token_that_the_model_does_not_have_is_named(one, many):
    sampling = Sampling(logit_bias={4096: 1})
    message = r"^logit_bias: 4096 is not a token id of this model \(0 to 4095\)$"
    with pytest.raises(UsageError, match=message):
        one.generate(PROMPT, sampling)
    with pytest.raises(UsageError, match=message):
        list(many.answer([BatchRequest("a", PROMPT, sampling)]))
