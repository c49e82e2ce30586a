"""OpenAI's /v1/responses, as far as text and the client's own functions need it: nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from qmix.batch.openai import Field
from qmix.batch.prompts import LineRefused
from qmix.batch.request import CHAT, LineError
from qmix.batch.schema import Fields
from qmix.engine.completion import BatchResult
from qmix.files import decode_json
from qmix.serve.asked import Asked, Asker, body_of
from qmix.serve.errors import ApiError, invalid
from qmix.serve.events import event
from qmix.serve.following import Update
from qmix.serve.texts import Message, check_fields, decoded, joined, text_of
from qmix.serve.tools import Call

FORMAT = {"format": {"type": "text"}}
VERBOSITY = {"verbosity": "medium"}
PLAIN: tuple[Any, ...] = ({}, FORMAT, VERBOSITY, FORMAT | VERBOSITY)
NO_REASONING: tuple[Any, ...] = ({}, {"effort": "none"}, {"summary": "auto"}, {"effort": "none", "summary": "auto"})
FIELDS = (
    Field("metadata", None, "labels for storage at OpenAI"),
    Field("client_metadata", None, "identifies the client"),
    Field("user", None, "identifies the user"),
    Field("safety_identifier", None, "identifies the user"),
    Field("service_tier", None, "only for OpenAI's service"),
    Field("prompt_cache_key", None, "only for OpenAI's cache"),
    Field("prompt_cache_retention", None, "only for OpenAI's cache"),
    Field("store", None, "nothing is stored"),
    Field("stream_options", None, "only pads a stream"),
    Field("include", None, "only adds what is not here"),
    Field("max_tool_calls", None, "the server itself calls no tools"),
    Field("text", PLAIN, "answers are plain text"),
    Field("reasoning", NO_REASONING, "the model has no reasoning step"),
    Field("truncation", ("disabled",), "not supported"),
    Field("background", (False,), "not supported"),
    Field("previous_response_id", (), "nothing is stored; send the whole conversation"),
    Field("conversation", (), "nothing is stored; send the whole conversation"),
    Field("prompt", (), "no prompts are stored"),
    Field("context_management", ([],), "not supported"),
    Field("top_logprobs", (0,), "not supported; use /v1/chat/completions"),
)
TEXTS = ("input_text", "output_text", "text")
FUNCTION = ("name", "description", "parameters")


class Body(msgspec.Struct):
    """The fields of a request."""

    input: str | list[Fields]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


async def ask(asker: Asker, body: bytes) -> tuple[Asked, Body]:
    """Return what a body asks for, and its fields. Raises ApiError."""
    try:
        given = decode_json(body, Fields, "", LineError)
        check_fields(given, Body.__struct_fields__, FIELDS)
        wanted = decode_json(body, Body, "", LineError)
        messages, tools = _messages(wanted), [_tool(*each) for each in enumerate(wanted.tools or ())] or None
    except (LineError, LineRefused) as error:
        raise invalid(str(error).removeprefix(": ")) from None
    options = {name: getattr(wanted, name) for name in ("model", "stream", "temperature", "top_p")}
    choice = wanted.tool_choice
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    options |= {"tools": tools, "tool_choice": choice, "parallel_tool_calls": wanted.parallel_tool_calls}
    chat = body_of({"messages": messages, "max_completion_tokens": wanted.max_output_tokens, **options})
    return await asker.ask(CHAT, chat), wanted


def _messages(wanted: Body) -> list[Message]:
    """Return the instructions as a system prompt, and the turns."""
    turns: list[Message] = [{"role": "system", "content": wanted.instructions}] if wanted.instructions else []
    if isinstance(wanted.input, str):
        return [*turns, {"role": "user", "content": wanted.input}]
    for index, given in enumerate(wanted.input):
        where = f"input[{index}]"
        item = {name: decoded(value) for name, value in given.items()}
        kind = item.get("type", "message")
        if kind in ("function_call", "function_call_output"):
            turns.append(_call(item) if kind == "function_call" else _output(item, where))
            continue
        if kind != "message":
            raise LineRefused(f"{where}: type {str(kind)[:100]!r}: must be a message, or a function's call or output")
        role = {"developer": "system"}.get(str(item.get("role")), item.get("role"))
        if role not in ("system", "user", "assistant"):
            raise LineError(f"{where}.role: must be 'system', 'developer', 'user' or 'assistant'")
        turns.append({"role": role, "content": text_of(item.get("content"), TEXTS, f"{where}.content")})
    return joined(turns)


def _tool(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    """Return a function of the client in the form of chat completions."""
    if tool.get("type") != "function":
        kind = str(tool.get("type"))[:100]
        raise LineRefused(f"tools[{index}]: type {kind!r}: must be 'function'; the server itself calls no tools")
    return {"type": "function", "function": {name: tool[name] for name in FUNCTION if name in tool}}


def _call(item: dict[str, Any]) -> Message:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": item.get("call_id"), "function": function}]}


def _output(item: dict[str, Any], where: str) -> Message:
    content = text_of(item.get("output"), TEXTS, f"{where}.output")
    return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}


@dataclass(slots=True)
class ResponseForm:
    """The form of one response; it is also the encoder of its stream."""

    asked: Asked
    model: str
    wanted: Body
    created: float = field(default_factory=lambda: int(time.time()))
    _mark: str = field(default_factory=lambda: secrets.token_hex(12))
    _count: int = 0
    _text: list[str] = field(default_factory=list)
    _items: list[dict[str, Any]] = field(default_factory=list)

    def whole(self, results: Sequence[BatchResult]) -> dict[str, Any]:
        """Return the body of a response."""
        (result,) = results
        cut = result.finish_reason == "length"
        tokens, new = self.asked.prompt_tokens, result.completion_tokens
        status = "incomplete" if cut else "completed"
        return self._response(status, self._output(result, status)) | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": tokens,
                "input_tokens_details": {"cached_tokens": result.reused_tokens},
                "output_tokens": new,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tokens + new,
            },
        }

    def _output(self, result: BatchResult, status: str) -> list[dict[str, Any]]:
        """Return the items of an answer: its text if it has any, and its calls."""
        if self._items:  # of a stream
            return self._items
        text, calls = (result.text, []) if self.asked.tooling is None else self.asked.tooling.read(result)
        return [*([self._item(status, text)] if text or not calls else []), *map(_function_call, calls)]

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        wanted = self.wanted
        return {
            "id": f"resp_{self._mark}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": wanted.instructions,
            "max_output_tokens": wanted.max_output_tokens,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": wanted.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": wanted.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": wanted.tool_choice or "auto",
            "tools": wanted.tools or [],
            "top_p": wanted.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": {},
        }

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {
            "id": f"msg_{self._mark}",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def begin(self) -> bytes:
        """Return the events before any text."""
        started = self._response("in_progress", [])
        return self._event("response.created", response=started) + self._event("response.in_progress", response=started)

    def update(self, update: Update) -> bytes:
        """Return the events of more text, and of calls."""
        events = b""
        if update.text:
            events = b"" if self._text else self._begin_text()
            self._text.append(update.text)
            events += self._event("response.output_text.delta", **self._place(), delta=update.text, logprobs=[])
        if update.result is not None:
            if self._text or not update.calls:
                events += self._end_text("incomplete" if update.result.finish_reason == "length" else "completed")
            events += b"".join(map(self._call, update.calls))
        return events

    def _begin_text(self) -> bytes:
        return self._event(
            "response.output_item.added", output_index=0, item=self._item("in_progress", None)
        ) + self._event("response.content_part.added", **self._place(), part=_part(""))

    def _end_text(self, status: str) -> bytes:
        text = "".join(self._text)
        self._items.append(self._item(status, text))
        return (
            (b"" if self._text else self._begin_text())
            + self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place(), part=_part(text))
            + self._event("response.output_item.done", output_index=0, item=self._items[0])
        )

    def _call(self, call: Call) -> bytes:
        item = _function_call(call)
        place = {"output_index": len(self._items), "item_id": item["id"]}
        self._items.append(item)
        started = item | {"status": "in_progress", "arguments": ""}
        return (
            self._event("response.output_item.added", output_index=place["output_index"], item=started)
            + self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
            + self._event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
            + self._event("response.output_item.done", output_index=place["output_index"], item=item)
        )

    def end(self, results: list[BatchResult]) -> bytes:
        """Return the last event, with the whole response."""
        response = self.whole(results)
        return self._event(f"response.{response['status']}", response=response)

    def ping(self) -> bytes:
        """Return a comment, which clients skip."""
        return b": ping\n\n"

    def error(self, error: ApiError) -> bytes:
        """Return the event of a failure."""
        failure = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=self._response("failed", []) | {"error": failure})

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._mark}", "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **data: Any) -> bytes:
        self._count += 1
        return event({"type": kind, "sequence_number": self._count - 1, **data}, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _function_call(call: Call) -> dict[str, Any]:
    own = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"id": f"fc_{call.id}", "type": "function_call", "status": "completed", **own}
