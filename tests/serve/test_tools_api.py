"""Tools and schemas through the clients: calls follow their parameters, and come back in a conversation."""

from __future__ import annotations

import json

import openai
import pytest

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": PARAMETERS}}
ASK = [{"role": "user", "content": "Will it rain?"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 120}


def check(name: str, arguments: str | dict) -> None:
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "weather"
    assert found.keys() == {"city", "days"}
    assert found["city"] in ("Rome", "Oslo")
    assert found["days"] in (1, 2, 3)


def test_a_chat_calls_a_tool_and_goes_on_with_its_result(client):
    body = {**GREEDY, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    choice = client.chat.completions.create(messages=ASK, **body).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    check(call.function.name, call.function.arguments)

    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(messages=ASK, stream=True, **body)]
    assert chunks[-1].finish_reason == "tool_calls"
    assert not any(chunk.delta.content for chunk in chunks)
    (streamed,) = [chunk.delta.tool_calls[0] for chunk in chunks if chunk.delta.tool_calls]
    assert streamed.function == call.function or streamed.function.to_dict() == call.function.to_dict()

    turns = [*ASK, choice.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "No."}]
    turns[1].pop("refusal", None)
    after = client.chat.completions.create(messages=turns, model="tiny", max_tokens=4, tools=[TOOL], tool_choice="none")
    shown = client.completions.create(
        model="tiny",
        prompt=f"[INST]Will it rain?[/INST]<tool_call>{as_template(call)}</tool_call></s>[{call.id}]No.",
        max_tokens=1,
    )
    assert after.usage.prompt_tokens == shown.usage.prompt_tokens


def as_template(call) -> str:
    return json.dumps({"name": call.function.name, "arguments": json.loads(call.function.arguments)})


def test_an_answer_without_a_call_is_text(client):
    body = {**GREEDY, "max_tokens": 5, "tools": [TOOL]}
    whole = client.chat.completions.create(messages=ASK, **body).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(messages=ASK, stream=True, **body)]
    assert whole.message.content == "".join(chunk.delta.content or "" for chunk in chunks)
    assert whole.finish_reason == chunks[-1].finish_reason == "length"


def test_anthropics_tools(claude):
    tools = [{"name": "weather", "description": "Tell it.", "input_schema": PARAMETERS}]
    body = {
        "model": "tiny",
        "max_tokens": 120,
        "tools": tools,
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        "extra_body": {"temperature": 0},
    }
    message = claude.messages.create(messages=ASK, **body)
    assert message.stop_reason == "tool_use"
    (block,) = message.content
    check(block.name, block.input)
    with claude.messages.stream(messages=ASK, **body) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.content[0].input) == ("tool_use", block.input)
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "No."}]}
    turns = [*ASK, {"role": "assistant", "content": [block.to_dict()]}, {"role": "user", "content": [result]}]
    counted = claude.messages.count_tokens(model="tiny", messages=turns).input_tokens
    assert counted > claude.messages.count_tokens(model="tiny", messages=ASK).input_tokens + 20
    assert claude.messages.create(model="tiny", max_tokens=3, messages=turns).usage.input_tokens == counted


def test_an_agents_response(client):
    """Fields that agents send with functions: they identify, cache, or concern a reasoning step."""
    function = {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object"}}
    texts = [{"type": "input_text", "text": "Be brief."}]
    fields = {
        "input": [
            {"type": "message", "id": "msg_1", "role": "developer", "content": texts},
            {"type": "message", "id": "msg_2", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        ],
        "tools": [function],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "a",
        "client_metadata": {"turn_id": "b"},
        "max_output_tokens": 9,
        "temperature": 0,
    }
    answer = client.post("/responses", body={"model": "tiny", **fields}, cast_to=object)
    assert answer["usage"]["output_tokens"] == 9
    with pytest.raises(openai.BadRequestError, match="reasoning: qmix takes only"):
        client.post("/responses", body={"model": "tiny", **fields, "reasoning": {"effort": "high"}}, cast_to=object)


def test_functions_of_responses(client):
    tools = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}]
    body = {
        "model": "tiny",
        "input": "Will it rain?",
        "temperature": 0,
        "max_output_tokens": 120,
        "tools": tools,
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    whole = client.responses.create(**body)
    (item,) = whole.output
    assert (whole.status, item.type) == ("completed", "function_call")
    check(item.name, item.arguments)
    events = list(client.responses.create(**body, stream=True))
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert done.arguments == item.arguments
    assert events[-1].response.output[0].arguments == item.arguments
    turns = [
        {"role": "user", "content": "Will it rain?"},
        {"type": "function_call", "call_id": item.call_id, "name": item.name, "arguments": item.arguments},
        {"type": "function_call_output", "call_id": item.call_id, "output": "No."},
    ]
    after = client.responses.create(model="tiny", input=turns, max_output_tokens=3)
    assert after.usage.input_tokens > whole.usage.input_tokens / 4


@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
def test_an_answer_follows_its_schema(client, kind):
    form = {"type": kind}
    if kind == "json_schema":
        form["json_schema"] = {"name": "weather", "schema": PARAMETERS}
    got = client.chat.completions.create(messages=ASK, **GREEDY, response_format=form, seed=1)
    if got.choices[0].finish_reason == "stop" or kind == "json_schema":
        found = json.loads(got.choices[0].message.content)
        if kind == "json_schema":
            check("weather", found)
    else:
        assert got.choices[0].message.content.lstrip().startswith("{")
