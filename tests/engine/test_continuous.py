"""Sequences that are continued together: each gives, to the bit, what it gives alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import make_store
from transformers import MixtralForCausalLM

from qmix.engine.batch import BatchRunner
from qmix.engine.completion import Failure
from qmix.engine.pace import Pace
from qmix.engine.running import BatchRequest
from qmix.engine.sampler import Sampler
from qmix.engine.sampling import Sampling
from qmix.engine.stream import Runner
from qmix.errors import UsageError
from qmix.kernels.cpu.threads import choose_threads
from qmix.model.kv import Chunk
from qmix.plan import Plan, make_plan
from qmix.precision import formats, matmul

TEXTS = ["Click the button to", "To install a package,", "The file", "Ouvrez le menu et choisissez", "Das"]
OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 4},
    {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 5},
]


GREEDY = Sampling(max_new_tokens=12, temperature=0, ignore_eos=True)


def plan_of(store, batch: int, context: int, slots: int) -> Plan:
    return make_plan(store.layout, 2**40, context, 2**28, batch=batch).with_slots(slots)


def runner_of(store, batch: int = 4, context: int = 128, slots: int | None = None) -> BatchRunner:
    return BatchRunner(store, plan_of(store, batch, context, slots or store.geometry.num_records))


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("continuous") / "store")


def requests_for(runner: BatchRunner, count: int = 10, tokens: int = 12) -> list[BatchRequest]:
    requests = []
    for index in range(count):
        prompt = runner.tokenizer(f"{TEXTS[index % 5]} {index}" * (1 + 4 * (index % 3)))["input_ids"]
        sampling = Sampling(max_new_tokens=3 + (tokens * index) % 17, logprobs=3, **{"seed": 1} | OPTIONS[index % 4])
        requests.append(BatchRequest(str(index), prompt, sampling))
    return requests


def answers(runner: BatchRunner, requests: list[BatchRequest]) -> dict:
    return {answer.name: answer for finished in runner.answer(requests) for answer in finished}


def test_an_answer_is_the_same_alone_and_in_any_company(store):
    """Ids and log-probabilities, which show every bit of the logits: greedy and sampled, in another order, in another
    number at once, from a small pool, on two threads."""
    with runner_of(store, batch=1) as runner:
        requests = requests_for(runner)
        alone = {request.name: answers(runner, [request])[request.name] for request in requests}
    assert len({tuple(answer.token_ids) for answer in alone.values()}) == len(requests)
    for batch, slots, seed in ((10, 48, 0), (3, 48, 1), (4, 7, 2)):
        mixed = random.Random(seed).sample(requests, len(requests))
        with runner_of(store, batch=batch, slots=slots) as runner:
            if batch == 3:
                runner.thread.run(torch.set_num_threads, 2)
                runner.thread.run(choose_threads, 2)
            assert answers(runner, mixed) == alone


SHAPES = {
    "nf4": {},
    "int8": {"precision": "int8"},
    "half, odd sizes": {"precision": "half", "hidden_size": 40, "intermediate_size": 72, "head_dim": 10},
    "nf4, no kernel": {"hidden_size": 48, "intermediate_size": 80, "head_dim": 8},
    "three experts a token": {"num_experts_per_tok": 3},
    "sliding window": {"sliding_window": 5},
    "fp16": {"dtype": "fp16", "precision": "fp4"},
    # as large models: a few tokens are one piece of work of all layers, or two of each, and many go by modules
    "kernels, nf4": {"kernels": True},
    "kernels, mixed, wide heads": {"kernels": True, "precision": "nf4,*.1=half,1.2=int8", "head_dim": 48},
    "kernels, three experts a token, sliding window": {
        **{"kernels": True, "precision": "int8", "num_experts_per_tok": 3, "sliding_window": 5}
    },
    "kernels, from disk": {"kernels": True, "slots": 7},
    "kernels, odd sizes": {"kernels": True, "hidden_size": 40, "intermediate_size": 72, "head_dim": 10},
    "kernels, fp16": {"kernels": True, "dtype": "fp16"},
}


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def shaped(request, tiny, tmp_path_factory) -> BatchRunner:
    directory = tmp_path_factory.mktemp("shaped")
    changes = dict(SHAPES[request.param])
    precision, dtype, slots = changes.pop("precision", "nf4"), changes.pop("dtype", None), changes.pop("slots", None)
    kernels = changes.pop("kernels", False)
    config = TINY_CONFIG | changes
    checkpoint = write_checkpoint(directory / "checkpoint", random_weights(config), config, tokenizer=tiny)
    store = make_store(checkpoint, directory / "store", precision, dtype)
    with pytest.MonkeyPatch.context() as patched:
        for module in (formats, matmul) if kernels else ():
            patched.setattr(module, "KERNEL_WEIGHTS", 0)
        with runner_of(store, batch=8, slots=slots) as runner:
            yield runner


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_logits_do_not_depend_on_chunks_nor_on_neighbours(shaped, data):
    """To the bit: a prompt in one piece by itself, and in pieces between those of others."""
    vocabulary = shaped.store.geometry.vocab_size
    ids = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=40)
    prompts = data.draw(st.lists(ids, min_size=2, max_size=4))
    forward = shaped.forward
    alone = [forward([Chunk(prompt, 0, 0, True)])[0] for prompt in prompts]
    starts = [sum(map(len, prompts[:index])) for index in range(len(prompts))]
    done, found = [0] * len(prompts), {}
    while len(found) < len(prompts):
        left = [index for index in range(len(prompts)) if index not in found]
        chosen = data.draw(st.lists(st.sampled_from(left), unique=True, min_size=1))
        chunks = []
        for index in chosen:
            end = done[index] + data.draw(st.integers(1, len(prompts[index]) - done[index]))
            piece = prompts[index][done[index] : end]
            chunks.append(Chunk(piece, done[index], starts[index], end == len(prompts[index])))
            done[index] = end
        ready = [index for index in chosen if done[index] == len(prompts[index])]
        found |= dict(zip(ready, forward(chunks), strict=True))
    assert all(torch.equal(found[index], alone[index]) for index in range(len(prompts)))


def test_logits_of_several_chunks_layer_by_layer_are_those_of_chunk_after_chunk(shaped):
    """To the bit: prompts of 130 to 200 tokens in one pass of 660, and by themselves in two pieces."""
    rng, forward = random.Random(0), shaped.forward
    lengths, vocabulary = (200, 150, 180, 130), shaped.store.geometry.vocab_size
    prompts = [rng.choices(range(vocabulary), k=length) for length in lengths]
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    alone = []
    for prompt in prompts:
        forward([Chunk(prompt[:70], 0, 0, False)])
        alone.append(forward([Chunk(prompt[70:], 70, 0, True)])[0])
    found = forward([Chunk(prompt, 0, start, True) for prompt, start in zip(prompts, starts, strict=True)])
    assert all(map(torch.equal, found, alone))
    first = forward([Chunk(prompt[:-3], 0, start, False) for prompt, start in zip(prompts, starts, strict=True)])
    assert first.numel() == 0
    ends = [Chunk(p[-3:], len(p) - 3, start, True) for p, start in zip(prompts, starts, strict=True)]
    assert all(map(torch.equal, forward(ends), alone))


def test_prompts_that_wait_together_read_each_expert_once(store, monkeypatch):
    """Six prompts of 200 to 450 tokens beside a sequence that is being continued, with three slots for 48 experts: the
    same answers."""
    greedy = Sampling(max_new_tokens=9, temperature=0, ignore_eos=True)
    prompts = [random.Random(i).choices(range(3, store.geometry.vocab_size), k=200 + 50 * i) for i in range(6)]
    requests = [BatchRequest("first", [5, 6, 7], greedy)]
    requests += [BatchRequest(str(i), prompt, greedy) for i, prompt in enumerate(prompts)]
    found, passes, misses = [], [], []
    for together in (512, 4096):
        monkeypatch.setattr(Pace, "tokens", lambda pace, left: pace.most)
        plan = replace(plan_of(store, 7, 480, 3), prefill=together)
        with BatchRunner(store, plan) as runner:
            running = runner.answer(requests)
            answered = [next(running)]
            misses.append(runner.pool.counters.misses)
            answered += running
            found.append({answer.name: answer for finished in answered for answer in finished})
            passes.append(runner.work.passes)
    assert found[0] == found[1]
    assert passes == [4 + 8, 1 + 8]  # 1,953 prompt tokens take four passes, or one
    assert misses[1] <= store.geometry.num_records


def test_greedy_texts_are_transformers_own_when_experts_are_half(tiny, tmp_path):
    theirs = MixtralForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).eval()
    with runner_of(make_store(tiny, tmp_path / "half", "half")) as runner:
        prompts = {text: runner.tokenizer(text)["input_ids"] for text in TEXTS}
        sampling = Sampling(max_new_tokens=25, temperature=0, repetition_penalty=1.1)
        found = answers(runner, [BatchRequest(text, prompt, sampling) for text, prompt in prompts.items()])
    for text, prompt in prompts.items():
        want = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=25, do_sample=False, repetition_penalty=1.1, pad_token_id=0
        )
        assert found[text].token_ids == want[0, len(prompt) :].tolist()


def test_draws_come_from_what_generate_draws_from(store):
    """The same processors in the same order, from the model's defaults and the options."""
    from qmix.engine.sampler import Sampler

    with Runner(store, plan_of(store, 1, 64, 48)) as runner:
        seen = []
        original = runner.model._get_logits_processor
        runner.model._get_logits_processor = lambda *args, **kwargs: seen.append(original(*args, **kwargs)) or seen[-1]
        for options in OPTIONS:
            sampling = Sampling(max_new_tokens=1, **{"seed": 1} | options)
            prompt = runner.tokenizer("Click")["input_ids"]
            runner.complete(prompt, sampling)
            mine = Sampler(runner.model, sampling, prompt)._processors
            theirs = seen[-2]
            described = [[(type(one).__name__, vars(one)) for one in each] for each in (mine, theirs)]
            assert str(described[0]) == str(described[1])
            assert (len(mine) > 0) == (options != OPTIONS[0])


def test_a_stop_sequence_ends_one_answer_and_another_takes_its_place(store):
    with runner_of(store, batch=1) as runner:
        sampling = Sampling(max_new_tokens=30, temperature=0, ignore_eos=True)
        whole = answers(runner, [BatchRequest("a", [5, 6], sampling)])["a"]
        stop = whole.text[10:13]
        cut = Sampling(max_new_tokens=30, temperature=0, ignore_eos=True, stop=(stop,))
        found = answers(runner, [BatchRequest(name, [5, 6], cut) for name in "abc"])
    assert {(answer.text, answer.finish_reason) for answer in found.values()} == {
        (whole.text[: whole.text.index(stop)], "stop")
    }
    assert (whole.finish_reason, len(whole.tokens), len(found)) == ("length", 30, 3)


def test_log_probabilities_are_the_models_own_whatever_the_temperature(store):
    with runner_of(store) as runner:
        sampling = Sampling(max_new_tokens=1, temperature=2.0, seed=2, logprobs=4)
        chosen = answers(runner, [BatchRequest("a", [5, 6, 7], sampling)])["a"].tokens[0]
        want = runner.forward([Chunk([5, 6, 7], 0, 0, True)])[0].float().log_softmax(-1)
    assert chosen.logprob == want[chosen.token].item()
    assert [logprob for _, logprob in chosen.likeliest] == want.topk(4).values.tolist()


def test_many_prompts_ask_for_an_expert_once_a_pass(store):
    asked = []
    for batch in (1, 8):
        with runner_of(store, batch=batch) as runner:
            sampling = Sampling(max_new_tokens=20, temperature=0, ignore_eos=True)
            answers(runner, [BatchRequest(str(i), [5 + i, 6, 7], sampling) for i in range(8)])
            asked.append(runner.pool.counters.hits)
            assert runner.work.passes == (160 if batch == 1 else 20)
    assert asked[1] < 0.4 * asked[0]


def test_whoever_has_had_enough_leaves_nothing_behind(store):
    with runner_of(store) as runner:
        requests = requests_for(runner)
        want = answers(runner, requests)
        part = runner.answer(requests)
        for _ in range(4):
            next(part)
        part.close()
        assert answers(runner, requests) == want


def test_a_prompt_that_has_no_room_is_refused(store):
    with runner_of(store, batch=1, context=16) as runner, pytest.raises(UsageError, match="17 tokens, planned for"):
        list(runner.answer([BatchRequest("long", [5] * 17, Sampling(max_new_tokens=2))]))


def test_a_request_that_fails_fails_alone(store, monkeypatch):
    """In its sampler, after some tokens; the pass and the others go on, and its room is free."""
    requests = [BatchRequest(str(index), range(10 + index, 30 + index), GREEDY) for index in range(4)]
    with runner_of(store) as runner:
        wanted = {result.name: result for results in runner.answer(requests) for result in results}
        sample = Sampler.sample

        def failing(self, tokens: list[int], logits: torch.Tensor):
            if tokens[0] == 12 and len(tokens) == 25:
                raise ZeroDivisionError("by hand")
            return sample(self, tokens, logits)

        monkeypatch.setattr(Sampler, "sample", failing)
        found = [each for outcomes in runner.outcomes(requests) for each in outcomes]
        (failure,) = [each for each in found if isinstance(each, Failure)]
        assert (failure.name, str(failure.error)) == ("2", "by hand")
        assert {each.name: each for each in found if each is not failure} == {
            name: result for name, result in wanted.items() if name != "2"
        }
        with pytest.raises(ZeroDivisionError, match="by hand"):
            list(runner.answer(requests))
        assert len(runner._scheduler) == 0
        monkeypatch.undo()
        assert {each.name: each for results in runner.answer(requests) for each in results} == wanted


def test_a_request_that_cannot_begin_is_refused_alone(store):
    requests = [BatchRequest("long", range(10, 600), GREEDY), BatchRequest("short", range(10, 30), GREEDY)]
    with runner_of(store) as runner:
        refused, answered = (each for outcomes in runner.outcomes(requests) for each in outcomes)
    assert (refused.name, type(refused.error), answered.name) == ("long", UsageError, "short")


def test_files_are_closed_and_threads_ended(store):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with runner_of(store) as runner:
        answers(runner, requests_for(runner, 2))
    runner.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
