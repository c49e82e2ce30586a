"""Every parser takes or refuses whatever it is given; `tests/fuzz.py` is the long version of this."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from fuzz import Trial, inputs, shares, tried
from fuzz_mutations import CHANGES, mutated, thought_of
from fuzz_parsers import Parser, all_parsers

from qmix.errors import UsageError

EACH = 100
NAMES = (
    "config.json of a checkpoint", "params.json of a release", "model.safetensors.index.json of a checkpoint",
    "header.safetensors", "generation_config.json", "qmix.json of a made", "config.json of a made",
    "journal.jsonl", "plan.json", "profile.json", "machine.json", "interpreter cache", "batch lines, short",
    "batch lines, OpenAI", "answers.jsonl", "manifest.jsonl.qmix.json", "eval/requests.jsonl", "chat.json",
    "slash commands", "chat template", "sizes", "rates", "FLOP rates", "precisions", "hub ids",
)  # fmt: skip
SLOW = (
    "tokenizer.json of a checkpoint",
    "tokenizer_config.json of a checkpoint",
    "help_choice.yaml",
    "help_words.yaml",
)


@pytest.fixture(scope="module")
def parsers(tmp_path_factory) -> dict[str, Parser]:
    return {parser.name: parser for parser in all_parsers(tmp_path_factory.mktemp("fuzz"))}


def test_every_parser_is_tried_here_or_is_slow(parsers):
    assert set(parsers) == {*NAMES, *SLOW}


@pytest.mark.parametrize("name", NAMES)
def test_a_parser_takes_or_refuses_what_it_is_given(parsers, name, tmp_path):
    parser = parsers[name]
    count = max(len(parser.documents), int(EACH * min(1, parser.weight)))
    tally = tried(parser, count, 1, tmp_path)
    assert [failure[:2] for failure in tally.failures] == []
    assert tally.accepted + tally.refused == count


@pytest.mark.parametrize("name", [name for name in (*NAMES, *SLOW) if name != "slash commands"])
def test_the_documents_that_are_changed_are_taken_as_they_are(parsers, name):
    for document in parsers[name].documents:
        parsers[name].parse(document)


def parser_of(call, *documents: bytes) -> Parser:
    return Parser("own", "json", documents or (b"[]",), call)


def recursing(data: bytes) -> object:
    return recursing(data)


def failing(data: bytes) -> object:
    raise KeyError("x")


class Talk(UsageError):
    def __str__(self) -> str:
        return "two\nlines"


def talking(data: bytes) -> object:
    raise Talk


def dying(data: bytes) -> object:
    os.kill(os.getpid(), signal.SIGKILL)
    return None


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (recursing, "RecursionError"),
        (failing, "KeyError"),
        (talking, "a refusal of 2 lines"),
        (dying, "ended with -9"),
    ],
)
def test_what_goes_wrong_is_noted_with_its_input(call, why, tmp_path):
    tally = tried(parser_of(call), 1, 0, tmp_path)
    ((_, told, data),) = tally.failures
    assert why in told
    assert bytes.fromhex(data) == b"[]"


def test_an_input_that_never_ends_is_given_up(tmp_path):
    def endless(data: bytes) -> object:
        while True:
            pass

    ((_, told, _),) = tried(replace(parser_of(endless), seconds=0.05), 1, 0, tmp_path).failures
    assert told == "more than 0.05 s"


def test_memory_is_watched(monkeypatch, tmp_path):
    monkeypatch.setattr("fuzz.BYTES", 5 * 10**7)
    ((_, told, _),) = tried(parser_of(lambda data: bytearray(10**8)), 1, 0, tmp_path).failures
    assert told == "0.1 GB of memory"


def test_the_same_seed_gives_the_same_inputs_and_another_gives_others():
    parser = parser_of(failing, b'{"a": [1, "x", null]}')
    first, again, other = (list(inputs(parser, 60, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 60
    assert len(set(first)) > 30


@pytest.mark.parametrize("form", sorted(CHANGES))
def test_any_document_can_be_changed_in_every_form(form):
    rng, documents = random.Random(0), (b"", b"{", b"\xff", b'{"a": {"b": [1.5, -3, true, null, "x"]}}\n{"a": 1}')
    for _ in range(500):
        assert isinstance(mutated(rng, documents, form), bytes)


def test_hypothesis_gives_as_many_as_are_asked_for():
    assert len(thought_of(40, 1)) == 40
    assert thought_of(0, 1) == []


def test_runs_are_shared_out_and_none_goes_without():
    found = shares([parser_of(failing), Parser("slow", "text", (b"a",), failing, 0.001)], 1000)
    assert sum(found.values()) == 1000
    assert found["slow"] == 1


def test_a_trial_counts_what_is_taken_and_what_is_refused():
    trial = Trial(parser_of(Path))
    trial.one(0, b"x")
    assert (trial.tally.accepted, trial.tally.refused, len(trial.tally.failures)) == (0, 0, 1)  # Path takes no bytes
