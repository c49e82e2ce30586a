"""Messages about a file of requests, before anything is computed."""

from __future__ import annotations

import io
import json
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmix.batch.lines import LINE_LIMIT, Requests, copy_lines
from qmix.batch.request import LineError, parse_line
from qmix.errors import UsageError

BODY = {"messages": [{"role": "user", "content": "Hello"}]}
OPENAI = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}


def requests_of(*lines: dict | str | bytes) -> Requests:
    raw = [line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
           for line in lines]  # fmt: skip
    return Requests(io.BytesIO(b"\n".join(raw)))


def test_both_forms_are_the_same_request():
    own = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1,
           "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": -3}, "n": 2,
           "seed": 4, "stop": ["x", "y"], "ignore_eos": True}  # fmt: skip
    body = BODY | own | {"logprobs": True, "top_logprobs": 2, "model": "m", "stream": False, "user": "u"}
    long = parse_line(json.dumps(OPENAI | {"body": body}).encode())
    short = parse_line(json.dumps({"id": "a", **BODY, **own, "logprobs": True, "top_logprobs": 2}).encode())
    assert (long.model, short.model) == ("m", None)
    for line in (long, short):
        assert (line.id, line.url, line.messages, line.options["logprobs"]) == ("a", OPENAI["url"], BODY["messages"], 2)
        assert line.options == {
            "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1,
            "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {7: -3.0}, "n": 2,
            "seed": 4, "stop": ("x", "y"), "ignore_eos": True, "logprobs": 2,
        }  # fmt: skip


def test_a_completion_is_text_or_ids_to_continue():
    url = {"url": "/v1/completions"}
    assert (
        parse_line(json.dumps(OPENAI | url | {"body": {"prompt": "Hi", "logprobs": 0}}).encode()).options["logprobs"]
        == 0
    )
    assert parse_line(b'{"id": 3, "prompt": [1, 2], "max_tokens": null}').prompt == [1, 2]
    assert parse_line(b'{"id": 3, "prompt": "a"}').id == "3"


def test_texts_in_parts_are_put_together():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    line = parse_line(json.dumps({"id": "a", "messages": [{"role": "user", "content": parts}]}).encode())
    assert line.messages == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "prompt": "b"', "invalid JSON: Input data was truncated"),
        ("[1]", "expected object, got array"),
        (b'{"id": "\xff"}', "invalid JSON: not UTF-8 (byte 9)"),
        ('{"id": "a", "id": "b", "prompt": "c"}', "invalid JSON: the key 'id' is given twice"),
        ('{"id": "a", "prompt": "b", "temperature": NaN}', "invalid JSON: invalid character (byte 42)"),
        ('{"id": "a", "prompt": "\\ud800"}', "invalid JSON: an unpaired surrogate"),
        ("[" * 100000, "expected object, got array"),
        ('{"id": ' + "[" * 100000, "invalid JSON: nested too deeply"),
        ('{"id": "a", "prompt": "b", "temperature": 1' + "0" * 400 + "}", "temperature: number out of range"),
        ('{"id": "a", "prompt": "b", "top_p": 1e400}', "top_p: number out of range"),
        ('{"id": "a", "prompt": "b", "seed": 1' + "0" * 5000 + "}", "seed: integer value out of range"),
        ('{"id": "a", "prompt": "b", "seed": 1' + "0" * 19 + "}", f"seed 1{'0' * 19}: must be 0 to 2^63 - 1"),
        ('{"id": 1' + "0" * 5000 + ', "prompt": "b"}', "id: integer value out of range"),
        ('{"id": "a", "prompt": [1' + "0" * 5000 + "]}", "prompt[0]: integer value out of range"),
        ({"id": "a", "prompt": "b", "stop": ["x" * 5000, "y" * 5000]},
         "stop of 10000 characters: must be at most 8192 in all"),
        ({"id": "ä" * 257, "prompt": "b"}, "the id is 514 bytes; give one of at most 512"),
        ({"id": "a", "prompt": "b", "zzz": {"a": {"b": 1e300}}}, "unknown field 'zzz'"),
        ('{"id": "a", "prompt": "b", "temperature": 1, "stop": ["x", "\\udc00"]}',
         "invalid JSON: an unpaired surrogate"),
        ({"prompt": "b"}, "'id' is missing (or 'custom_id', in OpenAI's form)"),
        ({"id": "", "prompt": "b"}, "the id is empty"),
        ({"id": 1.5, "prompt": "b"}, "id: expected int | str, got float"),
        ({"id": "a"}, "give either 'prompt' or 'messages'"),
        ({"id": "a", "prompt": "b", **BODY}, "give either 'prompt' or 'messages'"),
        ({"id": "a", "prompt": "b", "temprature": 1}, "unknown field 'temprature' (did you mean 'temperature'?)"),
        ({"id": "a", "prompt": "b", "max_new_tokens": 1, "zzz": 1},
         "unknown field 'max_new_tokens' (did you mean 'max_tokens'?), unknown field 'zzz'"),
        ({"id": "a", "prompt": 5}, "prompt: expected str | array, got int"),
        ({"id": "a", "prompt": "b", "max_tokens": 0}, "max_tokens 0: must be at least 1"),
        ({"id": "a", "prompt": "b", "max_tokens": 1.5}, "max_tokens: expected int | null, got float"),
        ({"id": "a", "prompt": "b", "max_tokens": True}, "max_tokens: expected int | null, got bool"),
        ({"id": "a", "prompt": "b", "top_p": 2}, "top_p 2.0: must be above 0 and at most 1"),
        ({"id": "a", "prompt": "b", "stop": [""]}, "stop '': must not be empty"),
        ({"id": "a", "prompt": "b", "stop": 5}, "stop: expected str | array | null, got int"),
        ({"id": "a", "prompt": "b", "logprobs": 21}, "logprobs 21: must be 0 to 20"),
        ({"id": "a", **BODY, "logprobs": 3}, "logprobs: expected bool | null, got int"),
        ({"id": "a", **BODY, "top_logprobs": 3}, "top_logprobs: needs logprobs to be true"),
        ({"id": "a", "messages": []}, "messages: must be a list of at least one message"),
        ({"id": "a", "messages": [{"role": "robot", "content": "a"}]},
         "messages[0]: role 'robot': must be 'system', 'user' or 'assistant'"),
        ({"id": "a", "messages": [{"role": "user", "contents": "a"}]},
         "messages[0]: unknown field 'contents' (did you mean 'content'?)"),
        ({"id": "a", "messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0]: content must be text, or a list of parts of type 'text'"),
        ({"id": "a", "messages": [{"role": "user", "content": None}]},
         "messages[0]: content must be text, or a list of parts of type 'text'"),
        ({"id": "a", "messages": [{"role": "user", "content": 5}]},
         "messages[0]: content: expected str | array | null, got int"),
        ({"id": "a", "messages": [{"content": "x"}]}, "messages[0]: object missing required field role"),
        ({"id": "a", "messages": {"role": "user"}}, "messages: expected array, got object"),
        ({"id": "a", "messages": ["x"]}, "messages[0]: expected object, got str"),
        (OPENAI | {"url": "/v1/embeddings"},
         "url '/v1/embeddings': must be '/v1/chat/completions' or '/v1/completions'"),
        (OPENAI | {"method": "GET"}, "method 'GET': must be 'POST'"),
        (OPENAI | {"body": BODY | {"tool": []}}, "unknown field 'tool' (did you mean 'tools'?)"),
        (OPENAI | {"body": [BODY]}, "body: expected object, got array"),
        (OPENAI | {"url": 5}, "url: expected str, got int"),
        (OPENAI | {"body": BODY | {"max_tokens": 1, "max_completion_tokens": 1}},
         "give either max_tokens or max_completion_tokens"),
        (OPENAI | {"body": "x"}, "body: expected object, got str"),
        ({"custom_id": "a", "url": "/v1/completions"}, "object missing required field body"),
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
        "line 3: invalid JSON: invalid character (byte 0)",
        "line 4: duplicate id 'a' (first on line 1)",
        "line 7: duplicate id 'a' (first on line 1)",
    ]
    assert [(entry.number, entry.id) for entry in found.entries] == [(1, "a"), (6, "c")]


def test_a_line_is_read_again_from_its_place():
    found = requests_of({"id": "a", "prompt": "ä"}, "", {"id": "c", **BODY})
    assert [found.line(entry).id for entry in found.entries[::-1]] == ["c", "a"]
    assert found.line(found.entries[0]).prompt == "ä"
    assert found.digest != requests_of({"id": "a", "prompt": "ä"}).digest


def test_a_line_that_is_too_long_ends_what_is_read():
    """A file without a newline is not read to its end, /dev/zero among them."""
    good, long = b'{"id": "a", "prompt": "b"}\n', b'{"id": "c", "prompt": "' + b"x" * LINE_LIMIT
    told = f"longer than {LINE_LIMIT} bytes; shorten it (the lines after it were not checked)"
    found = Requests(io.BytesIO(good + long + b'"}\nx\n'))
    assert (found.problems, found.bad, len(found.entries)) == ([f"line 2: {told}"], 1, 1)
    with Path("/dev/zero").open("rb") as zeros:
        assert Requests(zeros).problems == [f"line 1: {told}"]
        copy = io.BytesIO()
        copy_lines(zeros, copy)
    assert len(copy.getvalue()) == LINE_LIMIT + 1
    copy_lines(io.BytesIO(good * 3 + b"end"), copy := io.BytesIO())
    assert copy.getvalue() == good * 3 + b"end"


def test_what_is_kept_of_bad_lines_and_of_models_is_bounded():
    bad = requests_of(*(["x"] * 100))
    assert (len(bad.problems), bad.bad) == (20, 100)
    named = requests_of(*({"id": index, "prompt": "a", "model": f"{index}" * 300} for index in range(100)))
    assert (len(named.models), max(map(len, named.models)), len(named.entries)) == (20, 100, 100)
    assert named.held == sum(600 + len(str(index)) for index in range(100))


def test_a_line_takes_no_more_memory_than_is_counted():
    lines = b"".join(b'{"id": "request-%d", "prompt": "a", "max_tokens": 5}\n' % index for index in range(3_000))
    tracemalloc.start()
    found = Requests(io.BytesIO(lines))
    taken, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < taken <= peak <= found.held


def test_a_file_that_was_changed_while_it_was_read_is_named_by_its_line():
    file = io.BytesIO(b'{"id": "a", "prompt": "b"}\n')
    found = Requests(file)
    file.seek(2)
    file.write(b"xx")
    with pytest.raises(UsageError, match=r"line 1: 'id' is missing .*; the input changed during the run"):
        found.line(found.entries[0])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "id",
    "prompt",
    "messages",
    "custom_id",
    "url",
    "method",
    "body",
    "temperature",
    "seed",
    "stop",
    "logprobs",
    "n",
]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # which is of the machine
@given(st.binary(max_size=100) | st.dictionaries(st.sampled_from(FIELDS), JSON).map(lambda o: json.dumps(o).encode()))
def test_any_line_is_a_request_or_an_error_of_its_own(raw):
    with suppress(LineError):
        assert parse_line(raw).id
    body = raw if raw.startswith(b"{") else b"{}"
    with suppress(LineError):
        parse_line(b'{"custom_id": "a", "url": "/v1/chat/completions", "body": %s}' % body)
