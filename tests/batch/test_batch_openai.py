"""OpenAI's request fields, one by one: what is taken, what is an error line, and what the documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from qmix.batch.openai import CHAT_FIELDS, COMPLETION_FIELDS, MESSAGE_FIELDS, TOOL_ROLES, Field, taken
from qmix.batch.request import CHAT, COMPLETION, ROLES, LineError, parse_line

DOCS = Path(__file__).parents[2] / "docs" / "batch.md"
MESSAGE = {"role": "user", "content": "x"}
PLACES = {"chat completions": CHAT_FIELDS, "completions": COMPLETION_FIELDS, "messages": MESSAGE_FIELDS}
EVERY = [(place, field) for place, fields in PLACES.items() for field in fields]
NAMES = [f"{field.name} of {place}" for place, field in EVERY]
OTHERS = [5, -0.5, True, "low", ["text", "audio"], {"type": "json_object"}, [{}], {"50256": -100}]

# as OpenAI's API reference lists them
PARAMETERS = {
    "chat completions": """messages model audio frequency_penalty function_call functions logit_bias logprobs
        max_completion_tokens max_tokens metadata modalities n parallel_tool_calls prediction presence_penalty
        prompt_cache_key prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier
        stop store stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity
        web_search_options""",
    "completions": """model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty
        seed stop stream stream_options suffix temperature top_p user""",
    "messages": "role content name refusal annotations audio tool_calls function_call tool_call_id",
}


def line_with(place: str, name: str, value: object) -> bytes:
    """A request with one field more, as JSON."""
    body = {"prompt": "x"} if place == "completions" else {"messages": [MESSAGE]}
    changed = {"messages": [MESSAGE | {name: value}]} if place == "messages" else body | {name: value}
    url = COMPLETION if place == "completions" else CHAT
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": changed}).encode()


@pytest.mark.parametrize(("place", "field"), EVERY, ids=NAMES)
def test_a_value_without_effect_is_taken_and_changes_nothing(place: str, field: Field) -> None:
    plain = parse_line(line_with(place, "role" if place == "messages" else "model", "user"))
    for value in (None, *(OTHERS if field.neutral is None else field.neutral)):
        line = parse_line(line_with(place, field.name, value))
        assert line.refused is None
        assert (line.prompt, line.messages, line.options) == (plain.prompt, plain.messages, plain.options)


@pytest.mark.parametrize(("place", "field"), EVERY, ids=NAMES)
def test_any_other_value_refuses_the_request_and_not_the_file(place: str, field: Field) -> None:
    if field.neutral is None:
        return
    for value in [other for other in OTHERS if json.dumps(other) not in map(json.dumps, field.neutral)]:
        refused = parse_line(line_with(place, field.name, value)).refused
        assert refused is not None
        assert f"{field.name}: qmix takes only {taken(field)} ({field.why}); leave it out" in refused


def test_numbers_are_taken_by_their_value_and_no_other_type_stands_for_them() -> None:
    assert parse_line(line_with("completions", "best_of", 1.0)).refused is None
    assert parse_line(line_with("completions", "best_of", True)).refused is not None
    assert parse_line(line_with("completions", "echo", 0)).refused is not None


@pytest.mark.parametrize("place", PARAMETERS)
def test_every_field_of_the_api_is_known(place: str) -> None:
    for name in PARAMETERS[place].split():
        assert "unknown field" not in told(line_with(place, name, None))
    assert "unknown field 'tool'" in told(line_with(place, "tool", None))


def told(raw: bytes) -> str:
    """Return the error of a line, or nothing if it is a request."""
    try:
        parse_line(raw)
    except LineError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("role", TOOL_ROLES)
def test_messages_of_tools_refuse_the_request(role: str) -> None:
    refused = parse_line(line_with("messages", "role", role)).refused
    assert refused == f"messages[0]: role {role!r}: qmix does not call tools; leave the message out"


def test_developer_is_system() -> None:
    assert parse_line(line_with("messages", "role", "developer")).messages == [MESSAGE | {"role": "system"}]
    assert set(ROLES.values()) == {"system", "user", "assistant"}


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_parts_that_are_not_text_refuse_the_request(kind: str) -> None:
    refused = parse_line(line_with("messages", "content", [{"type": "text", "text": "a"}, {"type": kind}])).refused
    assert refused == f"messages[0].content[1]: type {kind!r}: the model reads text only"


@pytest.mark.parametrize(
    ("prompt", "expected"), [(["a"], "a"), ([[1, 2]], [1, 2]), ([1, 2], [1, 2]), ([], []), ("a", "a")]
)
def test_a_list_of_one_prompt_is_that_prompt(prompt: object, expected: object) -> None:
    assert parse_line(line_with("completions", "prompt", prompt)).prompt == expected


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], ["a", 1]])
def test_several_prompts_refuse_the_request(prompt: object) -> None:
    refused = parse_line(line_with("completions", "prompt", prompt)).refused
    assert refused == "prompt: one prompt per request; put each on its own line"


def test_the_documentation_has_the_table() -> None:
    assert f"\n\n{table()}\n" in DOCS.read_text("utf-8")


def table() -> str:
    """Return a row for each field: where it may be, what is taken of it, and why."""
    places: dict[str, list[str]] = {}
    for place, field in EVERY:
        values = "any value" if field.neutral is None else f"`{taken(field)}`".replace(" or ", "` or `")
        places.setdefault(f"`{field.name}` | {values} | {field.why}", []).append(place)
    rows = (f"| {row} | {', '.join(found)} |" for row, found in places.items())
    return "\n".join(["| field | taken | because | in |", "|---|---|---|---|", *rows]) + "\n"


def test_a_number_beyond_all_others_is_no_neutral_value():
    assert [field.takes(msgspec.Raw(b"1e999")) for field in CHAT_FIELDS if field.name in ("stream", "user")] == [
        True,
        False,
    ]
