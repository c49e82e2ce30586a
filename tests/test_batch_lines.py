"""What is said of a file of requests before anything is computed."""

from __future__ import annotations

import io
import json

import pytest

from qmix.batch.lines import LineError, Requests, parse_line

BODY = {"messages": [{"role": "user", "content": "Hello"}]}
OPENAI = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}


def requests_of(*lines: dict | str | bytes) -> Requests:
    raw = [line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
           for line in lines]  # fmt: skip
    return Requests(io.BytesIO(b"\n".join(raw)))


def test_both_forms_are_the_same_request():
    own = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1,
           "seed": 4, "stop": ["x", "y"], "ignore_eos": True}  # fmt: skip
    body = BODY | own | {"logprobs": True, "top_logprobs": 2, "model": "m", "n": 1, "stream": False, "user": "u"}
    long = parse_line(json.dumps(OPENAI | {"body": body}).encode())
    short = parse_line(json.dumps({"id": "a", **BODY, **own, "logprobs": True, "top_logprobs": 2}).encode())
    assert (long.model, short.model) == ("m", None)
    for line in (long, short):
        assert (line.id, line.url, line.messages, line.logprobs) == ("a", OPENAI["url"], BODY["messages"], 2)
        assert line.options == {
            "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1,
            "seed": 4, "stop": ("x", "y"), "ignore_eos": True,
        }  # fmt: skip


def test_a_completion_is_text_or_ids_to_continue():
    url = {"url": "/v1/completions"}
    assert parse_line(json.dumps(OPENAI | url | {"body": {"prompt": "Hi", "logprobs": 0}}).encode()).logprobs == 0
    assert parse_line(b'{"id": 3, "prompt": [1, 2], "max_tokens": null}').prompt == [1, 2]
    assert parse_line(b'{"id": 3, "prompt": "a"}').id == "3"


def test_texts_in_parts_are_put_together():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    line = parse_line(json.dumps({"id": "a", "messages": [{"role": "user", "content": parts}]}).encode())
    assert line.messages == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "prompt": "b"', "no JSON: Expecting ',' delimiter (column 26)"),
        ("[1]", "not a JSON object"),
        (b'{"id": "\xff"}', "not UTF-8 text (byte 9)"),
        ('{"id": "a", "id": "b", "prompt": "c"}', "the field 'id' is there twice"),
        ('{"id": "a", "prompt": "b", "temperature": NaN}', "no JSON: NaN is not a number"),
        ('{"id": "a", "prompt": "\\ud800"}', "half of a surrogate pair, which is no text"),
        ("[" * 100000, "no JSON: nested too deeply"),
        ({"prompt": "b"}, "'id' is missing (or 'custom_id', in OpenAI's form)"),
        ({"id": "", "prompt": "b"}, "the id is empty"),
        ({"id": 1.5, "prompt": "b"}, "id: must be a text"),
        ({"id": "a"}, "give either 'prompt' or 'messages'"),
        ({"id": "a", "prompt": "b", **BODY}, "give either 'prompt' or 'messages'"),
        ({"id": "a", "prompt": "b", "temprature": 1}, "unknown field 'temprature' (did you mean 'temperature'?)"),
        ({"id": "a", "prompt": "b", "max_new_tokens": 1, "zzz": 1},
         "unknown field 'max_new_tokens' (did you mean 'max_tokens'?), unknown field 'zzz'"),
        ({"id": "a", "prompt": 5}, "prompt: must be a text, or a list of token ids"),
        ({"id": "a", "prompt": "b", "max_tokens": 0}, "max_tokens 0: must be at least 1"),
        ({"id": "a", "prompt": "b", "max_tokens": 1.5}, "max_tokens: must be a whole number"),
        ({"id": "a", "prompt": "b", "max_tokens": True}, "max_tokens: must be a whole number"),
        ({"id": "a", "prompt": "b", "top_p": 2}, "top_p 2.0: must be above 0 and at most 1"),
        ({"id": "a", "prompt": "b", "stop": [""]}, "stop '': must be a text that is not empty"),
        ({"id": "a", "prompt": "b", "stop": 5}, "stop: must be a text, or a list of texts"),
        ({"id": "a", "prompt": "b", "logprobs": 21}, "logprobs 21: must be a whole number from 0 to 20"),
        ({"id": "a", **BODY, "logprobs": 3}, "logprobs: must be true or false"),
        ({"id": "a", **BODY, "top_logprobs": 3}, "top_logprobs: needs logprobs to be true"),
        ({"id": "a", "messages": []}, "messages: must be a list of at least one message"),
        ({"id": "a", "messages": [{"role": "robot", "content": "a"}]},
         "messages[0]: role 'robot': must be 'system', 'user' or 'assistant'"),
        ({"id": "a", "messages": [{"role": "user", "contents": "a"}]},
         "messages[0]: unknown field 'contents' (did you mean 'content'?)"),
        ({"id": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0]: content must be a text, or a list of parts of type 'text'"),
        (OPENAI | {"url": "/v1/embeddings"},
         "url '/v1/embeddings': must be '/v1/chat/completions' or '/v1/completions'"),
        (OPENAI | {"method": "GET"}, "method 'GET': must be 'POST'"),
        (OPENAI | {"body": BODY | {"n": 2}}, "n 2: qmix knows only 1"),
        (OPENAI | {"body": BODY | {"stream": True}}, "stream True: qmix knows only false"),
        (OPENAI | {"body": BODY | {"tools": []}}, "unknown field 'tools'"),
        (OPENAI | {"body": BODY | {"max_tokens": 1, "max_completion_tokens": 1}},
         "give either max_tokens or max_completion_tokens"),
        (OPENAI | {"body": "x"}, "body: must be an object"),
        ({"custom_id": "a", "url": "/v1/completions"}, "'body' is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_said(line, message):
    raw = line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
    with pytest.raises(LineError) as caught:
        parse_line(raw)
    assert str(caught.value) == message


def test_every_bad_line_is_named_by_its_number_and_blank_ones_are_none():
    good = {"id": "a", "prompt": "b"}
    found = requests_of(good, "", "x", good, "  ", good | {"id": "c"}, b"\xef\xbb\xbf" + json.dumps(good).encode())
    assert found.problems == [
        "line 3: no JSON: Expecting value (column 1)",
        "line 4: the id 'a' is that of line 1 already",
        "line 7: the id 'a' is that of line 1 already",
    ]
    assert [(entry.number, entry.id) for entry in found.entries] == [(1, "a"), (6, "c")]


def test_a_line_is_read_again_from_its_place():
    found = requests_of({"id": "a", "prompt": "ä"}, "", {"id": "c", **BODY})
    assert [found.line(entry).id for entry in found.entries[::-1]] == ["c", "a"]
    assert found.line(found.entries[0]).prompt == "ä"
    assert found.digest != requests_of({"id": "a", "prompt": "ä"}).digest
