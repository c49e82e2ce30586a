"""Anthropic's interface through its own client."""

from __future__ import annotations

import anthropic
import pytest

TURNS = [{"role": "user", "content": [{"type": "text", "text": "How do I install a package?"}]}]
GREEDY = {"model": "tiny", "system": "Be brief.", "messages": TURNS, "extra_body": {"temperature": 0}}
OPENAI = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How do I install a package?"}]


def test_a_message_is_the_chats_answer(client, claude):
    chat = client.chat.completions.create(model="tiny", messages=OPENAI, max_tokens=12, temperature=0)
    message = claude.messages.create(**GREEDY, max_tokens=12)
    assert (message.content[0].text, message.stop_reason) == (chat.choices[0].message.content, "max_tokens")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    counted = claude.messages.count_tokens(model="tiny", system="Be brief.", messages=TURNS)
    assert counted.input_tokens == chat.usage.prompt_tokens


def test_a_stream_is_the_same_message(claude):
    whole = claude.messages.create(**GREEDY, max_tokens=12)
    with claude.messages.stream(**GREEDY, max_tokens=12) as stream:
        kinds = [event.type for event in stream if event.type not in ("text", "ping", "content_block_delta")]
        final = stream.get_final_message()
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert (final.content[0].text, final.stop_reason) == (whole.content[0].text, "max_tokens")
    assert final.usage.output_tokens == 12


def test_an_answer_ends_at_a_stop_sequence_or_at_the_end_of_the_context(claude):
    stopped = claude.messages.create(**GREEDY, max_tokens=40, stop_sequences=[" the"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " the")
    long = [{"role": "user", "content": "a " * 1990}]
    full = {"model": "tiny", "messages": long, "max_tokens": 5000, "extra_body": {"temperature": 0}}
    with claude.messages.stream(**full) as stream:  # the client forbids long answers that are not streamed
        message = stream.get_final_message()
    total = message.usage.input_tokens + message.usage.output_tokens
    assert (message.stop_reason, total) in [("model_context_window_exceeded", 2048), ("end_turn", total)]


def test_an_agent_is_answered(claude):
    """Fields, blocks and turns of agents that expect more of a model than this one has."""
    cached = {"cache_control": {"type": "ephemeral"}}
    body = {
        "system": [{"type": "text", "text": "Be brief.", **cached}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "How do I install", **cached}]},
            {"role": "system", "content": "a package?"},
        ],
        "metadata": {"user_id": "me"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "temperature": 0,
    }
    asked = {"model": "tiny", "max_tokens": 9}
    answer = claude.post("/v1/messages?beta=true", body=asked | body, cast_to=object)
    plain = claude.messages.create(
        **asked,
        system="Be brief.",
        messages=[{"role": "user", "content": "How do I install\n\na package?"}],
        extra_body={"temperature": 0},
    )
    assert answer["content"] == [{"type": "text", "text": plain.content[0].text}]
    assert answer["usage"]["input_tokens"] == plain.usage.input_tokens


WRONG = [
    ({"messages": []}, 400, "messages: "),
    ({"messages": [*TURNS, {"role": "assistant", "content": "The"}]}, 400, "messages: the last one must be the user's"),
    ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, 400, "tools[0]: type 'web_search_20250305'"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "thinking: qmix takes only"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, 400, "context_management: qmix takes"),
    ({"output_config": {"format": {"type": "json_schema"}}}, 400, "output_config: qmix takes only"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "messages[0].content[0]: type 'image'"),
    ({"max_token": 3}, 400, "unknown field 'max_token' (did you mean 'max_tokens'?)"),
    ({"model": "other"}, 404, "model 'other': not served here; use tiny"),
    ({"messages": [{"role": "user", "content": "a " * 3000}]}, 400, "the prompt is "),
]


@pytest.mark.parametrize(("body", "status", "told"), WRONG, ids=[told for _, _, told in WRONG])
def test_a_wrong_message_has_anthropics_error(claude, body, status, told):
    with pytest.raises(anthropic.APIStatusError) as caught:
        claude.post("/v1/messages", body={"model": "tiny", "max_tokens": 3, "messages": TURNS, **body}, cast_to=object)
    assert (caught.value.status_code, caught.value.body["type"]) == (status, "error")
    kind = {400: "invalid_request_error", 404: "not_found_error"}[status]
    assert caught.value.body["error"]["type"] == kind
    assert caught.value.body["error"]["message"].startswith(told)
