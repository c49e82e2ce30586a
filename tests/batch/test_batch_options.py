"""Options of lines and of the command line: several answers, penalties, biases, JSON; one family in every command."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from qmix.batch.request import LineError, parse_line

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
OPTIONS = ("-m", "tiny", "--ram", "1GiB", "--seed", "3")


def read(path: Path) -> dict[str, list[dict]]:
    lines = map(json.loads, path.read_text().splitlines())
    return {line["custom_id"]: (line["response"] or {"body": line["error"]})["body"] for line in lines}


def test_lines_set_options_and_the_command_line_those_of_the_others(qmix, tmp_path):
    text = {"prompt": "To install", "response_format": {"type": "text"}}
    lines = [
        {"id": "three", **text, "max_tokens": 6, "n": 3, "temperature": 1.5, "logprobs": 1},
        {"id": "one", **text, "max_tokens": 6, "temperature": 1.5},
        {"id": "json", "prompt": "To install", "max_tokens": 100},
        {"id": "own", "prompt": "To install", "max_tokens": 100, "temperature": 2, "response_format": FORMAT, "n": 2},
        {"id": "bias", **text, "max_tokens": 4, "logit_bias": {"300": 100}, "temperature": 0},
        {"id": "bad", "prompt": "To install", "logit_bias": {"5000": 1}},
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"]}')
    options = (*OPTIONS, "--json-schema", tmp_path / "schema.json", "--presence-penalty", "0.5")
    done = qmix("batch", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *options)
    assert done.status == 4, done.err
    found = read(tmp_path / "out.jsonl")
    three = found["three"]
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in three["choices"]}) == 3
    assert three["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in three["choices"])
    assert len(found["one"]["choices"]) == 1
    assert json.loads(found["json"]["choices"][0]["text"])["a"] == 7
    for choice in found["own"]["choices"]:
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)
    (choice,) = found["bias"]["choices"]
    assert choice["finish_reason"] == "length"
    assert found["bad"]["message"] == "line 6: logit_bias: 5000 is not a token id of this model (0 to 4095)"
    again = qmix("batch", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *options)
    assert again.status == 4, "the same command goes on"
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    changed = qmix("batch", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *options)
    assert (changed.status, "--json-schema" in changed.err) == (2, True)


def test_generate_takes_the_same_options(qmix, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    schema = ("--json-schema", tmp_path / "schema.json")
    done = qmix(
        "generate", "Click", *OPTIONS, *schema, "-n", "2", "--json", "--logprobs", "2", "--frequency-penalty", "1"
    )
    assert done.status == 0, done.err
    results = list(map(json.loads, done.out.splitlines()))
    assert len(results) == 2
    for result in results:
        jsonschema.validate(json.loads(result["text"]), SCHEMA)
        assert result["finish_reason"] == "stop"
        assert [each["token"] for each in result["logprobs"]] == result["token_ids"]
    plain = qmix("generate", "Click", *OPTIONS, "--logit-bias", "300=100", "--max-new-tokens", "3")
    biased = qmix("generate", "Click", *OPTIONS, "--max-new-tokens", "3", "--logit-bias", "300=100", "-n", "2")
    assert biased.out.startswith(plain.out)
    assert len(biased.out.splitlines()) >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "FILE"], "--json-schema: Unsatisfiable schema: minimum (5) is greater than maximum (3)"),
        (["--json-schema", "none.json"], "--json-schema none.json: "),
        (["--logprobs", "3"], "--logprobs: only with --json or --jsonl; give one of them, or leave --logprobs out"),
        (["--presence-penalty", "3"], "--presence-penalty 3.0: must be -2 to 2"),
        (["--logit-bias", "x"], "Invalid value for '--logit-bias': 'x': give a token id and a number"),
        (["--logit-bias", "5=200"], "--logit-bias 200.0 of token 5: must be -100 to 100"),
        (["--logit-bias", "4096=1"], "--logit-bias: 4096 is not a token id of this model (0 to 4095)"),
        (["-n", "0"], "-n 0: must be 1 to 128"),
    ],
)
def test_what_cannot_be_used_is_one_line(qmix, tmp_path, options, message):
    (tmp_path / "schema.json").write_text('{"type": "integer", "minimum": 5, "maximum": 3}')
    done = qmix(
        "generate", "x", "-m", "tiny", *(tmp_path / "schema.json" if each == "FILE" else each for each in options)
    )
    assert (done.status, done.out) == (2, "")
    assert message in done.err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format: 'json_schema' has the schema of the type"),
        ({"response_format": {"type": "xml"}}, "response_format.type: "),
        ({"response_format": FORMAT | {"json_schema": {"schema": {"type": "x"}}}}, "response_format: Invalid type: x"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos: an answer with a grammar ends"),
        ({"logit_bias": {"x": 1}}, "expected int, got str - at key in $.logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias 101.0 of token 5: must be -100 to 100"),
        ({"n": 0}, "n 0: must be 1 to 128"),
        ({"frequency_penalty": 3}, "frequency_penalty 3.0: must be -2 to 2"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_used_is_an_error_of_the_file(fields, message):
    with pytest.raises(LineError) as caught:
        parse_line(json.dumps({"id": "a", "prompt": "b"} | fields).encode())
    assert str(caught.value).startswith(message)


def test_a_response_format_becomes_a_schema():
    def schema_of(form) -> object:
        return parse_line(json.dumps({"id": "a", "prompt": "b", "response_format": form}).encode()).options[
            "json_schema"
        ]

    assert json.loads(schema_of(FORMAT)) == SCHEMA
    assert schema_of({"type": "json_object"}) == '{"type": "object"}'
    assert schema_of({"type": "text"}) is None
