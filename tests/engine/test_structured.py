"""Answers with a JSON schema or a grammar: always valid, or the beginning of a valid text where tokens end it."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from sentencepiece_models import write_tokenizer_model
from stores import make_store, many_prompts, one_prompt

from qmix.engine.processors import GrammarMask
from qmix.engine.running import BatchRequest
from qmix.engine.sampling import Sampling
from qmix.errors import UsageError
from qmix.plan import make_plan
from qmix.plan.here import check_structured
from qmix.text.constraint import GrammarCompiler
from qmix.text.grammar import grammar_source, schema_source
from qmix.text.tokenizer import load_tokenizer

PROMPT = [5, 6, 7, 300, 5]


def whole(properties: dict, **more) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    } | more


NODE = whole({"v": {"enum": [1, 2]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}})
ITEM = whole({"id": {"type": "integer", "minimum": 0, "maximum": 99}})
DATE = {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"}
SCHEMAS = {
    "flat": whole({"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "ok": {"type": "boolean"}}),
    "enum": {"enum": ["red", "green", {"mix": [1, None]}, "ünï — 🦉"]},
    "nested": whole({"items": {"type": "array", "maxItems": 3, "items": ITEM}}),
    "recursive": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "pattern": whole({"date": DATE, "code": {"type": "string", "format": "uuid"}}),
    "scalar": {"type": "number"},
    "anything": {"type": "object"},
}


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("structured") / "store")


@pytest.fixture(scope="module")
def one(store):
    with one_prompt(store, 256) as runner:
        yield runner


@pytest.fixture(scope="module")
def many(store):
    with many_prompts(store, 256, 8) as runner:
        yield runner


def check(answer, schema: dict) -> None:
    """Valid, or ended by the number of tokens as the beginning of a text that can go on."""
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema, format_checker=jsonschema.FormatChecker())
    else:
        assert answer.finish_reason == "length"


@given(
    name=st.sampled_from(sorted(SCHEMAS)),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 5.0]),
    tokens=st.integers(1, 120),
    seed=st.integers(0, 2**31),
    more=st.sampled_from([{}, {"repetition_penalty": 1.5}, {"top_k": 1}, {"logit_bias": {352: -100}}, {"min_p": 0.5}]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_valid_or_beginnings(many, name, temperature, tokens, seed, more):
    schema = SCHEMAS[name]
    sampling = Sampling(
        max_new_tokens=tokens, temperature=temperature, seed=seed, n=2, json_schema=json.dumps(schema), **more
    )
    plain = Sampling(max_new_tokens=8, temperature=temperature, seed=seed)
    requests = [BatchRequest("a", PROMPT, sampling), BatchRequest("plain", PROMPT, plain)]
    answers = [answer for done in many.answer(requests) for answer in done]
    compiler = GrammarCompiler(many.tokenizer, many.store.geometry.vocab_size, [2])
    for answer in answers:
        if answer.name == "a":
            check(answer, schema)
            event(f"{name} {answer.finish_reason}")
            body = [token for token in answer.token_ids if token != 2]
            assert compiler.constraint(schema_source(json.dumps(schema))).allowed(body) is not None
            assert answer.finish_reason == "stop" or len(answer.token_ids) == tokens


@pytest.mark.parametrize("name", ["flat", "enum", "nested", "pattern"])
def test_one_prompt_and_many_give_valid_json_and_end_with_it(one, many, name):
    """Greedy and with drafts; nothing is computed after the last token of a text that cannot go on."""
    schema = json.dumps(SCHEMAS[name])
    sampling = Sampling(max_new_tokens=200, temperature=0, json_schema=schema)
    alone = one.complete(PROMPT, sampling)
    drafted = one.complete(PROMPT, Sampling(max_new_tokens=200, temperature=0, json_schema=schema, draft_ngram=4))
    (together,) = [answer for done in many.answer([BatchRequest("a", PROMPT, sampling)]) for answer in done]
    for answer in (alone, drafted, together):
        assert answer.finish_reason == "stop"
        check(answer, SCHEMAS[name])
        assert answer.token_ids[-1] != 2
    assert alone.token_ids == drafted.token_ids


def test_a_mask_by_hand(one):
    """After `{"a":` only the beginnings of true, false and white space; after the end only the end token."""
    compiler = GrammarCompiler(one.tokenizer, 4096, [2])
    constraint = compiler.constraint(schema_source(json.dumps(whole({"a": {"type": "boolean"}}))))
    ids = inner_ids(one.tokenizer, '{"a": true}')
    texts = [text_of(one.tokenizer, token) for token in np.flatnonzero(constraint.allowed(ids[:5]))]
    assert {text.strip()[:1] for text in texts} <= {"t", "f", "", "<"}  # "<": one byte, such as <0x20>
    assert "".join(text_of(one.tokenizer, token) for token in ids[:5]) == '{"a":'
    assert constraint.complete(ids)
    assert np.flatnonzero(constraint.allowed(ids)).tolist() == [2]
    assert constraint.allowed([*ids, 352]) is None, "a draft behind the end"
    assert len(np.flatnonzero(constraint.allowed(ids[:1]))) > 1, "back to the beginning"


def inner_ids(tokenizer, text: str) -> list[int]:
    """The ids of a text inside another, without the space that is put before a text."""
    ids = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    return next(ids[at:] for at in range(len(ids)) if "".join(text_of(tokenizer, token) for token in ids[at:]) == text)


def text_of(tokenizer, token: int) -> str:
    return tokenizer.convert_ids_to_tokens(int(token)).replace("▁", " ")


def test_tokens_that_other_options_exclude_are_chosen_if_nothing_else_is_allowed(one):
    constraint = GrammarCompiler(one.tokenizer, 4096, [2]).constraint(schema_source('{"const": 7}'))
    (allowed,) = [np.flatnonzero(constraint.allowed([]))]
    scores = torch.zeros(1, 4096)
    scores[0, allowed] = -torch.inf
    found = GrammarMask(2, constraint)(torch.tensor([[5, 6]]), scores)
    assert found[0].isfinite().nonzero().flatten().tolist() == allowed.tolist()


def test_mixtrals_kind_of_tokenizer_follows_a_grammar(tiny, tmp_path):
    """A sentencepiece model, read as a checkpoint that has only tokenizer.model: bytes, spaces and specials."""
    write_tokenizer_model(tiny, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    compiler = GrammarCompiler(tokenizer, len(tokenizer), [2])
    text = json.dumps({"a b": "été 🦉"}, ensure_ascii=False)
    constraint = compiler.constraint(schema_source(json.dumps({"const": json.loads(text)})))
    ids = inner_pieces(tokenizer, text)
    for at, token in enumerate(ids):
        allowed = constraint.allowed(ids[:at])
        assert allowed[token]
        assert not allowed[[0, 1, 2]].any()
    assert constraint.complete(ids)
    assert tokenizer.decode(ids) == text


def inner_pieces(tokenizer, text: str) -> list[int]:
    ids = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    return next(ids[at:] for at in range(len(ids)) if tokenizer.convert_ids_to_tokens(ids[at])[0] == "{")


def test_a_grammar_of_ones_own(many):
    sampling = Sampling(max_new_tokens=30, temperature=1.0, seed=1, grammar='start: ("yes" | "no") /, [a-c]{3}/')
    (answer,) = [answer for done in many.answer([BatchRequest("a", PROMPT, sampling)]) for answer in done]
    head, _, tail = answer.text.partition(", ")
    assert (head in ("yes", "no"), len(tail), set(tail) <= set("abc")) == (True, 3, True)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "json_schema: invalid JSON ("),
        ("[]", "json_schema: a JSON schema must be an object"),
        ('{"type": "nonsense"}', "json_schema: Invalid type: nonsense"),
        ('{"allOf": [{"type": "string"}, {"type": "number"}]}', "json_schema: Unsatisfiable schema: "),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "json_schema: Unsatisfiable schema: minimum (5)"),
        ('{"type": "object", "properties": {"a": false}, "required": ["a"]}', "json_schema: Unsatisfiable schema: "),
        ('{"$ref": "#"}', "json_schema: Unsatisfiable schema: it requires itself without end"),
        (json.dumps(whole({"a": {"$ref": "#"}})), "json_schema: Unsatisfiable schema: it requires"),
        ('{"type": "array", "minItems": 1, "items": {"$ref": "#"}}', "json_schema: Unsatisfiable schema: it requires"),
        ('{"$ref": "#/$defs/none"}', "json_schema: "),
        ('{"type": "array", "uniqueItems": true}', 'json_schema: Unimplemented keys: ["uniqueItems"]'),
        ('{"type": "string", "pattern": "("}', "json_schema: regex parse error"),
        (json.dumps({"enum": ["x" * 2**18]}), "json_schema of 262158 characters: must be at most 262144"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_used_is_named_before_the_run(schema, message):
    with pytest.raises(UsageError) as caught:
        Sampling(json_schema=schema)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "object", "properties": {"a": {"$ref": "#"}}}',
        '{"anyOf": [{"type": "null"}, {"type": "array", "minItems": 2, "items": {"$ref": "#"}}]}',
        '{"type": "array", "items": {"$ref": "#"}}',
        json.dumps(SCHEMAS["recursive"]),
    ],
)
def test_a_recursion_that_can_end_is_taken(schema):
    assert schema_source(schema)


def test_what_excludes_a_grammar_is_named():
    with pytest.raises(UsageError, match=r"^ignore_eos: "):
        Sampling(json_schema="{}", ignore_eos=True)
    with pytest.raises(UsageError, match=r"^json_schema and grammar: "):
        Sampling(json_schema="{}", grammar='start: "a"')
    with pytest.raises(UsageError, match=r"^grammar: "):
        Sampling(grammar="start: nowhere")
    assert Sampling().source is None
    assert grammar_source('start: "a"') == Sampling(grammar='start: "a"').source


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"^json_schema: needs the package llguidance; pip install 'qmix-moe\[struct"):
        Sampling(json_schema='{"type": "string", "minLength": 3}')


def test_a_plan_without_room_is_refused(store, monkeypatch):
    monkeypatch.setattr("qmix.plan.here.python_bytes", lambda geometry: 2**28)
    roomy = make_plan(store.layout, 2**40, 64, 2**28)
    check_structured(store.geometry, roomy)
    exact = make_plan(store.layout, roomy.total + 2**25, 64, 2**28)
    with pytest.raises(UsageError, match=r"^json_schema: takes 67\.1 MB that the plan does not have; "):
        check_structured(store.geometry, exact)
    check_structured(store.geometry, make_plan(store.layout, 2**30, 64, 2**28 + 2**26))
