"""Keys and values that sequences take over from each other: by hand, by properties, and equal to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from stores import make_store

from qmix.engine import prefixes
from qmix.engine.batch import BatchRunner
from qmix.engine.prefixes import Copy, common_prefix
from qmix.engine.running import BatchRequest
from qmix.engine.sampling import Sampling
from qmix.engine.scheduler import Scheduler, Sequence
from qmix.errors import Cancelled
from qmix.plan import make_plan

SYSTEM = list(range(100, 140))


@pytest.fixture
def short(monkeypatch):
    """Two tokens in common are enough."""
    monkeypatch.setattr(prefixes, "LEAST_SHARED", 2)


class Rows:
    """A KV cache whose rows are the tokens that they depend on, behind a scheduler that is checked in every pass."""

    def __init__(self, capacity: int, batch: int, pass_tokens: int = 8) -> None:
        self.scheduler = Scheduler(capacity, batch, pass_tokens)
        self.rows: list[tuple[int, ...] | None] = [None] * capacity
        self.computed = 0

    def run_pass(self) -> list[Sequence]:
        """Run a pass; return the sequences whose tokens are all done."""
        chosen = self.scheduler.next_pass()
        assert chosen, "a pass that does nothing never ends"
        for source, target, size in self.scheduler.take_copies():
            self.rows[target : target + size] = self.rows[source : source + size]
        for sequence, count in chosen:
            self.computed += count
            for at in range(sequence.done, sequence.done + count):
                self.rows[sequence.start + at] = tuple(sequence.tokens[: at + 1])
            sequence.done += count
            held = self.rows[sequence.start : sequence.start + sequence.done]
            assert held == [tuple(sequence.tokens[: at + 1]) for at in range(sequence.done)]
        return [sequence for sequence, _ in chosen if sequence.done == len(sequence.tokens)]

    def answer(self, *prompts: list[int], new: int = 2) -> list[Sequence]:
        """Run prompts together to the end; each token that follows is a 7."""
        sequences = [Sequence(list(prompt), len(prompt) + new) for prompt in prompts]
        for sequence in sequences:
            self.scheduler.add(sequence)
        while len(self.scheduler):
            for sequence in self.run_pass():
                sequence.tokens.append(7)
                if len(sequence.tokens) == sequence.limit:
                    self.scheduler.finish(sequence)
        return sequences

    def all_free(self) -> bool:
        for kept in list(self.scheduler.places._kept):
            self.scheduler.places._evict(kept)
        return self.scheduler.places._free.spans == [(0, len(self.rows))] and not self.scheduler.places._known


def test_a_next_turn_goes_on_where_the_last_one_lies(short):
    """Turn one: 4 tokens and 2 new ones, 5 of them computed. Turn two has these and 3 more."""
    cache = Rows(20, 2)
    (first,) = cache.answer([1, 2, 3, 4])
    assert (first.tokens, first.shared, cache.computed) == ([1, 2, 3, 4, 7, 7], 0, 5)
    (second,) = cache.answer([1, 2, 3, 4, 7, 7, 8, 9])
    assert (second.shared, second.start, cache.computed) == (5, 0, 5 + 4)
    assert len(cache.scheduler.places) == 1, "the second has all of the first"
    assert cache.all_free()


def test_a_prefix_is_copied_where_another_goes_on_differently(short):
    cache = Rows(20, 2)
    cache.answer([1, 2, 3, 4])
    (second,) = cache.answer([1, 2, 3, 9, 9])
    assert (second.shared, second.start, cache.computed) == (3, 5, 5 + 3)
    assert len(cache.scheduler.places) == 2
    assert cache.all_free()


def test_prompts_that_come_together_compute_their_common_beginning_once(short):
    """Passes of 8 tokens: the first prompt goes first, those that begin with the same 12 tokens wait for it."""
    cache = Rows(100, 4)
    common = list(range(50, 62))
    sequences = cache.answer([*common, 1], [*common, 2, 2], [*common, 2, 3], [9, 9, 9], new=1)
    assert [sequence.shared for sequence in sequences] == [0, 12, 13, 0]
    assert cache.computed == 13 + 2 + 1 + 3
    assert cache.all_free()


def test_whoever_waits_for_one_that_is_dropped_computes_it_and_the_others_wait_for_that_one(short):
    cache = Rows(100, 4, pass_tokens=4)
    sequences = [Sequence([*range(50, 62), index], 14) for index in range(3)]
    for sequence in sequences:
        cache.scheduler.add(sequence)
    cache.run_pass()
    assert [sequence.done for sequence in sequences] == [4, 0, 0]
    cache.scheduler.finish(sequences[0])  # a client that goes away
    cache.run_pass()
    assert [(sequence.shared, sequence.done) for sequence in sequences[1:]] == [(4, 8), (0, 0)]
    while len(cache.scheduler):
        for sequence in cache.run_pass():
            cache.scheduler.finish(sequence)
    assert cache.computed == 4 + 9 + 1
    assert cache.all_free()


def test_the_least_recently_used_prefix_makes_room_and_only_as_many_as_are_needed(short):
    cache = Rows(16, 2)
    for first in (10, 20, 30):
        cache.answer([first, 1, 2], new=1)  # 3 positions each, 9 of 16
    cache.answer([10, 1, 2, 5], new=1)  # copies the first, which it makes superfluous, to where 4 are free
    assert [(each.tokens[0], each.start) for each in cache.scheduler.places._kept] == [(20, 3), (30, 6), (10, 9)]
    cache.answer([40, 1, 2, 3], new=1)  # 3 are free on either side
    assert [(each.tokens[0], each.start) for each in cache.scheduler.places._kept] == [(30, 6), (10, 9), (40, 0)]
    assert cache.all_free()


def test_the_prefix_itself_is_moved_where_there_is_no_other_room(short):
    """A capacity of 9: 6 are kept, the next sequence wants 8 and shares 4."""
    cache = Rows(9, 2)
    cache.answer([8, 8], new=2)
    cache.answer([1, 2, 3, 4, 5, 6], new=1)
    (second,) = cache.answer([1, 2, 3, 4, 9, 9, 9], new=2)
    assert (second.shared, second.start) == (4, 0)
    assert cache.all_free()


def test_a_sequence_that_cannot_begin_yet_evicts_nothing(short):
    cache = Rows(20, 2)
    cache.answer([1, 2, 3, 4], new=1)
    running = Sequence([5, 6, 7], 13)
    cache.scheduler.add(running)
    cache.run_pass()
    cache.scheduler.add(Sequence([8, 9, 9], 12))
    cache.run_pass()
    assert [each.tokens for each in cache.scheduler.places._kept] == [[1, 2, 3, 4]]
    cache.scheduler.clear()
    assert cache.all_free()


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_always_those_of_the_sequences_tokens_and_none_is_lost(short, data):
    """Few tokens, so that beginnings are shared; sequences end early, are dropped, and come at any time."""
    capacity, batch = data.draw(st.integers(12, 60)), data.draw(st.integers(1, 5))
    cache = Rows(capacity, batch, pass_tokens=data.draw(st.integers(5, 9)))
    prompt = st.lists(st.integers(1, 2), min_size=1, max_size=capacity - 3)
    prompts = data.draw(st.lists(prompt, min_size=1, max_size=12))
    alive: list[Sequence] = []
    wanted = shared = 0
    while prompts or alive:
        if prompts and (not alive or data.draw(st.booleans())):
            tokens = prompts.pop()
            sequence = Sequence(tokens, min(len(tokens) + data.draw(st.integers(1, 5)), capacity + 1))
            alive.append(sequence)
            cache.scheduler.add(sequence)
            continue
        for sequence in cache.run_pass():
            sequence.tokens.append(data.draw(st.integers(1, 2)))
            if len(sequence.tokens) == sequence.limit or data.draw(st.integers(0, 4)) == 0:
                wanted, shared = wanted + sequence.done, shared + sequence.shared
                cache.scheduler.finish(sequence)
                alive.remove(sequence)
        running = [sequence for sequence in alive if sequence.start >= 0]
        if running and data.draw(st.integers(0, 5)) == 0:
            gone = data.draw(st.sampled_from(running))
            wanted, shared = wanted + gone.done, shared + gone.shared
            cache.scheduler.finish(gone)
            alive.remove(gone)
    assert cache.computed == wanted - shared
    event(f"shared {min(shared, 20) // 5 * 5}")
    assert cache.all_free()


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), max_size=20))
def test_a_common_beginning_by_halving(one, other):
    want = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert common_prefix(one, other) == want


# With a model


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("prefixes") / "store")


def runner_of(store, batch: int, context: int) -> BatchRunner:
    plan = make_plan(store.layout, 2**40, context, 2**28, batch=batch)
    return BatchRunner(store, plan.with_slots(store.geometry.num_records))


def answered(runner: BatchRunner, requests) -> dict:
    return {(answer.name, answer.index): answer for done in runner.answer(requests) for answer in done}


def asked(name: str, prompt: list[int], **options) -> BatchRequest:
    options = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3, "logprobs": 2, "ignore_eos": True} | options
    return BatchRequest(name, prompt, Sampling(**options))


def test_answers_are_equal_to_the_bit_with_and_without_prefixes(store):
    """A shared system prompt, turns of a conversation, several completions; log-probabilities show every bit."""
    requests = [asked(str(index), [*SYSTEM, 200 + index, *range(index)]) for index in range(6)]
    requests += [asked("turn", [*SYSTEM, 200, 9, 9, 9]), asked("n", [*SYSTEM, 5, 6, 7, 8], n=3)]
    fresh = {}
    for request in requests:
        for one in request.completions():
            with runner_of(store, 1, 128) as runner:
                (answer,) = answered(runner, [one]).values()
                assert runner.work.reused_tokens == 0
                fresh[one.name, one.index] = answer
    for batch, context in ((4, 128), (1, 60), (8, 60)):
        with runner_of(store, batch, context) as runner:
            assert answered(runner, requests) == fresh
            found = answered(runner, requests)
            assert found == fresh
            assert runner.work.reused_tokens >= 17 * len(SYSTEM)
            assert all(answer.reused_tokens >= len(SYSTEM) for answer in found.values())


def test_a_shared_beginning_goes_through_the_model_once(store):
    requests = [asked(str(index), [*SYSTEM, 200 + index]) for index in range(8)]
    with runner_of(store, 8, 64) as runner:
        answered(runner, requests)
        assert runner.work.tokens == len(SYSTEM) + 8 * (1 + 5)
        assert runner.work.reused_tokens == 7 * len(SYSTEM)
        assert runner.work.prompt_tokens == 8 * (len(SYSTEM) + 1)


def test_a_pass_that_is_stopped_leaves_prefixes_that_can_be_used(store):
    """Stopped by the caller, and by an error between two layers: what is kept gives the same answers."""
    request, other = asked("a", [*SYSTEM, 1, 2, 3], max_new_tokens=12), asked("b", [*SYSTEM, 9])
    with runner_of(store, 2, 64) as runner:
        want = answered(runner, [request, other])
    with runner_of(store, 2, 64) as runner:
        part = runner.answer([request, other])
        for _ in range(4):
            next(part)
        part.close()
        layer = runner.model.model.layers[3]
        hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Cancelled))
        with pytest.raises(Cancelled):
            list(runner.answer([other]))
        hook.remove()
        assert answered(runner, [request, other]) == want
        assert runner.work.reused_tokens >= 2 * len(SYSTEM)


def test_rows_are_copied_in_every_layer_also_where_they_overlap(store):
    with runner_of(store, 1, 2048) as runner:
        cache = runner._cache
        for layer in cache.layers:
            for rows in (layer.keys, layer.values):
                rows[0, 0, :, 0] = torch.arange(rows.shape[2]) % 251
        cache.copy_rows(*Copy(700, 3, 1100))
        for layer in cache.layers:
            for rows in (layer.keys, layer.values):
                assert torch.equal(rows[0, 0, 3:1103, 0], (torch.arange(700, 1800) % 251).to(rows.dtype))
                assert torch.equal(rows[0, 0, :3, 0], torch.arange(3).to(rows.dtype))
