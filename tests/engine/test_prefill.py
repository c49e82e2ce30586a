"""Prompts of several chunks layer by layer: the same numbers as chunk after chunk, each expert read once."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from stores import make_store

from qmix.engine.stream import Runner
from qmix.errors import Cancelled, DoesNotFitError
from qmix.geometry import Geometry
from qmix.models.published import PUBLISHED
from qmix.plan import make_plan
from qmix.plan.memory import MOST_PREFILL, PREFILL_CHUNK, prefill_bytes, prefill_tokens
from qmix.store.layout import StoreLayout, parse_precisions

CONTEXT = 2048
PRECISIONS = "nf4,0.*=int8,*.1=half"


def runner_of(store, together: int, slots: int = 3, attention: str = "sdpa") -> Runner:
    plan = make_plan(store.layout, 2**40, min(CONTEXT, store.geometry.max_position), 2**28).with_slots(slots)
    return Runner(store, replace(plan, prefill=together), attention)


def prompt_of(tokens: int, vocabulary: int) -> list[int]:
    return random.Random(tokens).choices(range(3, vocabulary), k=tokens)


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("prefill") / "store", PRECISIONS)


@pytest.fixture(scope="module")
def windowed(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("windowed")
    vocabulary = json.loads((tiny / "config.json").read_text())["vocab_size"]
    config = {"max_position_embeddings": CONTEXT, "sliding_window": 300, "num_local_experts": 6}
    make_checkpoint(directory / "checkpoint", vocab_size=vocabulary, **config)
    for path in tiny.glob("tokenizer*"):
        shutil.copy(path, directory / "checkpoint")
    return make_store(directory / "checkpoint", directory / "store", "nf4")


def state_of(runner: Runner, prompt: list[int]) -> tuple[list[int], list[torch.Tensor]]:
    """Return the tokens after a prompt, and all keys and values."""
    result = runner.complete(prompt, max_new_tokens=6, temperature=0, ignore_eos=True)
    length = runner.cache.get_seq_length()
    layers = runner.cache.layers
    return result.token_ids, [part[:, :, :length].clone() for layer in layers for part in (layer.keys, layer.values)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [513, 1024, 1300, 2000])
def test_tokens_keys_and_values_are_those_of_chunk_after_chunk(store, tokens, attention):
    prompt = prompt_of(tokens, store.geometry.vocab_size)
    with runner_of(store, PREFILL_CHUNK, attention=attention) as runner:
        want, caches = state_of(runner, prompt)
    for together in (1024, 2048):
        with runner_of(store, together, attention=attention) as runner:
            got, found = state_of(runner, prompt)
        assert got == want
        assert all(map(torch.equal, found, caches))


def test_a_sliding_window_sees_the_same(windowed):
    prompt = prompt_of(1700, windowed.geometry.vocab_size)
    with runner_of(windowed, PREFILL_CHUNK) as plain, runner_of(windowed, 2048) as runner:
        want, caches = state_of(plain, prompt)
        got, found = state_of(runner, prompt)
    assert got == want
    assert all(map(torch.equal, found, caches))


def test_each_expert_is_read_once_a_prompt(store):
    """Four chunks with three slots for 48 experts."""
    prompt = prompt_of(2000, store.geometry.vocab_size)
    reads = {}
    for together in (PREFILL_CHUNK, 1024, 2048):
        with runner_of(store, together) as runner:
            reads[together] = runner.complete(prompt, max_new_tokens=1, temperature=0).misses
    assert reads[2048] <= store.geometry.num_records
    assert reads[PREFILL_CHUNK] > 3 * reads[2048]
    assert reads[1024] > 1.5 * reads[2048]


@pytest.mark.parametrize("options", [{"draft_ngram": 4, "temperature": 0}, {"temperature": 0.8, "seed": 3}])
def test_drafts_and_draws_are_the_same(store, options):
    prompt = prompt_of(700, store.geometry.vocab_size) * 2
    texts = []
    for together in (PREFILL_CHUNK, 2048):
        with runner_of(store, together) as runner:
            texts.append(runner.complete(prompt, max_new_tokens=12, ignore_eos=True, **options).token_ids)
    assert texts[0] == texts[1]


def test_a_conversation_goes_on_behind_what_is_held(store):
    prompt = prompt_of(700, store.geometry.vocab_size)
    longer = prompt + prompt_of(900, store.geometry.vocab_size)
    texts = []
    for together in (PREFILL_CHUNK, 2048):
        with runner_of(store, together) as runner:
            runner.complete(prompt, max_new_tokens=3, temperature=0)
            pieces = list(runner.generate(longer, max_new_tokens=6, temperature=0, ignore_eos=True, reuse=True))
            assert pieces[-1].result.reused_tokens == 700
            texts.append(pieces[-1].result.token_ids)
    assert texts[0] == texts[1]


def test_stopped_in_the_middle_it_holds_nothing_and_can_be_used_again(store, monkeypatch):
    prompt = prompt_of(1500, store.geometry.vocab_size)
    with runner_of(store, 2048) as runner:
        want = runner.complete(prompt, max_new_tokens=4, temperature=0).token_ids
        get, calls = runner.pool.groups, []

        def failing(layer, *arguments):
            calls.append(layer)
            if layer == 2 and len(calls) < 5:
                raise Cancelled
            return get(layer, *arguments)

        monkeypatch.setattr(runner.pool, "groups", failing)
        with pytest.raises(Cancelled):
            runner.complete(prompt, max_new_tokens=4, temperature=0)
        assert runner.held == []
        assert "forward" not in vars(runner.model.model)
        calls += [9] * 9
        assert runner.complete(prompt, max_new_tokens=4, temperature=0).token_ids == want


GEOMETRY: Geometry = PUBLISHED["mixtral-8x22b"].geometry


def test_bytes_by_hand():
    """8x22B, 4,096 tokens in a context of 4,096: six halves a hidden number, 128 bytes of routing, two a position."""
    assert prefill_bytes(GEOMETRY, 4096, 4096) == 4096 * (6 * 6144 * 2 + 128 + 4096 * 2)
    assert prefill_bytes(GEOMETRY, 4096, PREFILL_CHUNK) == 0


@given(context=st.integers(1, 65536), room=st.integers(0, 2**33))
def test_as_many_tokens_as_there_is_room_for_in_whole_chunks(context, room):
    tokens = prefill_tokens(GEOMETRY, context, room)
    assert tokens % PREFILL_CHUNK == 0
    assert PREFILL_CHUNK <= tokens <= MOST_PREFILL
    assert tokens - PREFILL_CHUNK < max(context, PREFILL_CHUNK)
    assert prefill_bytes(GEOMETRY, context, tokens) <= room
    if tokens < min(context, MOST_PREFILL):
        assert prefill_bytes(GEOMETRY, context, tokens + PREFILL_CHUNK) > room


def test_a_plan_takes_prompts_layer_by_layer_where_experts_come_from_disk():
    layout = StoreLayout(GEOMETRY, parse_precisions("nf4", GEOMETRY), "bf16")
    whole = make_plan(layout, 2**40, 4096, 2**28)
    assert (whole.prefill, whole.prefill_work) == (PREFILL_CHUNK, 0)
    part = make_plan(layout, 24 * 2**30, 4096, 2**28)
    assert part.prefill == 4096
    assert part.prefill_work == prefill_bytes(GEOMETRY, 4096, 4096)
    assert part.total <= part.ram
    assert (part.smallest, part.roomy) == (whole.smallest, whole.roomy)
    least = make_plan(layout, whole.smallest, 4096, 2**28)
    assert least.slots == 2
    assert least.total <= least.ram
    together = make_plan(layout, part.ram, 1024, 2**28, batch=4)
    assert (together.prefill, together.prefill_work) == (4096, 4096 * (6 * 6144 * 2 + 128))  # rows need no masks
    assert make_plan(layout, part.ram, PREFILL_CHUNK, 2**28).prefill == PREFILL_CHUNK


@given(ram=st.integers(12 * 2**30, 90 * 2**30), more=st.integers(0, 2**30), context=st.sampled_from([512, 600, 4096]))
def test_more_memory_never_holds_fewer_experts(ram, more, context):
    layout = StoreLayout(GEOMETRY, parse_precisions("nf4,*.3=int8", GEOMETRY), "bf16")
    try:
        less = make_plan(layout, ram, context, 2**28)
    except DoesNotFitError:
        return
    plan = make_plan(layout, ram + more, context, 2**28)
    assert plan.total <= plan.ram
    assert all(plan.slots_by_size[nbytes] >= slots for nbytes, slots in less.slots_by_size.items())
