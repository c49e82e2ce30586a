"""Anthropic's /v1/messages."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
from qmix.serve.texts import Message, check_fields, joined, text_of
from qmix.serve.tools import Call

EFFORTS = ("low", "medium", "high", "xhigh", "max")  # of reasoning, which the model has none of
NO_THINKING = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
FIELDS = (
    Field("metadata", None, "identifies the user"),
    Field("service_tier", None, "only for Anthropic's service"),
    Field("speed", None, "only for Anthropic's service"),
    Field("inference_geo", None, "only for Anthropic's service"),
    Field("user_profile_id", None, "identifies the user"),
    Field("workspace_id", None, "identifies the user"),
    Field("diagnostics", None, "only for Anthropic's service"),
    Field("cache_control", None, "only for Anthropic's cache"),
    Field("thinking", ({"type": "disabled"}, {"type": "adaptive"}), "the model has no reasoning step"),
    Field("mcp_servers", ([],), "tools are called by the client"),
    Field("container", (), "no code is run"),
    Field("context_management", ({}, {"edits": []}, NO_THINKING), "no turn is removed"),
    Field("output_config", ({}, *({"effort": effort} for effort in EFFORTS)), "answers are plain text"),
    Field("output_format", ({"type": "text"},), "answers are plain text"),
)
ROLES = {"user": "user", "assistant": "assistant", "system": "user"}  # templates take no system prompt between turns


class Choice(msgspec.Struct):
    """Which tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def to_openai(self) -> str | dict[str, Any]:
        """Return the choice of OpenAI's chat completions."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return {"auto": "auto", "any": "required", "none": "none"}[self.type]


class Body(msgspec.Struct):
    """The fields of a request; the interface asks for `max_tokens`."""

    messages: list[Fields]
    model: str | None = None
    max_tokens: int | None = None
    system: str | list[Any] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Choice | None = None


async def ask(asker: Asker, body: bytes, counting: bool = False) -> tuple[Asked, int]:
    """Return what a body asks for, and the tokens of the longest answer that it wants. Raises ApiError."""
    try:
        given = decode_json(body, Fields, "", LineError)
        check_fields(given, Body.__struct_fields__, FIELDS)
        wanted = decode_json(body, Body, "", LineError)
        if wanted.max_tokens is None and not counting:
            raise LineError("max_tokens: is missing; give the length of the longest answer")
        messages, tools = _messages(wanted), [_tool(*each) for each in enumerate(wanted.tools or ())] or None
    except (LineError, LineRefused) as error:
        raise invalid(str(error).removeprefix(": ")) from None
    options = {name: getattr(wanted, name) for name in ("model", "stream", "temperature", "top_p", "top_k")}
    most, choice = 1 if counting else wanted.max_tokens, wanted.tool_choice
    options |= {"tools": tools, "tool_choice": None if choice is None else choice.to_openai()}
    options |= {"parallel_tool_calls": False} if choice is not None and choice.disable_parallel_tool_use else {}
    chat = body_of({"messages": messages, "max_tokens": most, "stop": wanted.stop_sequences or None, **options})
    return await asker.ask(CHAT, chat, cap=True), most or 0


def _tool(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool of the client in the form of OpenAI's chat completions."""
    if tool.get("type", "custom") != "custom":
        kind = str(tool["type"])[:100]
        raise LineRefused(f"tools[{index}]: type {kind!r}: must be 'custom'; the server itself calls no tools")
    function = {name: tool[name] for name in ("name", "description") if name in tool}
    return {"type": "function", "function": function | {"parameters": tool.get("input_schema") or {"type": "object"}}}


def _messages(wanted: Body) -> list[Message]:
    """Return the system prompt and the turns, those of one role in a row as one turn."""
    turns: list[Message] = []
    for index, given in enumerate(wanted.messages):
        where = f"messages[{index}]"
        check_fields(given, ("role", "content"), (), f"{where}: ")
        role, content = (msgspec.json.decode(given.get(name, b"null")) for name in ("role", "content"))
        if role not in ROLES:
            raise LineError(f"{where}.role: must be 'user', 'assistant' or 'system'")
        turns += _turns(ROLES[role], content, f"{where}.content")
    if not turns or turns[-1]["role"] == "assistant":
        raise LineRefused("messages: the last one must be the user's; the beginning of an answer is not supported")
    system = "" if wanted.system is None else text_of(wanted.system, ("text",), "system")
    return [*([{"role": "system", "content": system}] if system else []), *joined(turns)]


def _turns(role: str, content: Any, where: str) -> list[Message]:
    """Return one message as turns: results of tools are turns of their own, before the rest."""
    blocks = content if isinstance(content, list) else []
    kind = "tool_use" if role == "assistant" else "tool_result"
    own = [block for block in blocks if isinstance(block, dict) and block.get("type") == kind]
    texts = [block for block in blocks if block not in own] if own else content
    text = text_of(texts, ("text",), where)
    if role == "user":
        results = [_result(block, f"{where}: tool_result") for block in own]
        return [*results, *([{"role": role, "content": text}] if text or not own else [])]
    calls = [
        {
            "id": block.get("id"),
            "function": {
                "name": block.get("name"),
                "arguments": msgspec.json.encode(block.get("input") or {}).decode(),
            },
        }
        for block in own
    ]
    return [{"role": role, "content": text} | ({"tool_calls": calls} if calls else {})]


def _result(block: dict[str, Any], where: str) -> Message:
    content = text_of(block.get("content") or "", ("text",), where)
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


@dataclass(slots=True)
class MessageForm:
    """The form of one answer; it is also the encoder of its stream. `wanted` is the longest answer in tokens."""

    asked: Asked
    model: str
    wanted: int
    _id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    _blocks: int = 0
    _calls: int = 0

    def whole(self, results: Sequence[BatchResult]) -> dict[str, Any]:
        """Return the body of an answer."""
        (result,) = results
        text, calls = (result.text, []) if self.asked.tooling is None else self.asked.tooling.read(result)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        content += [_use(call) | {"input": msgspec.json.decode(call.arguments)} for call in calls]
        return self._message(content, result.completion_tokens) | self._end(result, bool(calls))

    def _message(self, content: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": self.asked.prompt_tokens, "output_tokens": tokens},
        }

    def _end(self, result: BatchResult, calls: bool) -> dict[str, Any]:
        """Return why an answer ended."""
        if calls:
            return {"stop_reason": "tool_use"}
        if result.finish_reason == "length":
            full = result.completion_tokens < self.wanted
            return {"stop_reason": "model_context_window_exceeded" if full else "max_tokens"}
        if result.stop in self.asked.requests[0].sampling.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": result.stop}
        return {"stop_reason": "end_turn"}

    def begin(self) -> bytes:
        """Return the events before any text."""
        return _event({"type": "message_start", "message": self._message([], 0)}) + self.ping()

    def update(self, update: Update) -> bytes:
        """Return the events of more text, and of calls."""
        events = b""
        if update.text:
            if not self._blocks:
                events = self._start({"type": "text", "text": ""})
            events += self._delta({"type": "text_delta", "text": update.text})
        if update.result is not None and self._blocks:
            events += self._stop()
        for call in update.calls:
            events += self._start(_use(call) | {"input": {}})
            events += self._delta({"type": "input_json_delta", "partial_json": call.arguments}) + self._stop()
        self._calls += len(update.calls)
        return events

    def _start(self, block: dict[str, Any]) -> bytes:
        self._blocks += 1
        return _event({"type": "content_block_start", "index": self._blocks - 1, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event({"type": "content_block_delta", "index": self._blocks - 1, "delta": delta})

    def _stop(self) -> bytes:
        return _event({"type": "content_block_stop", "index": self._blocks - 1})

    def end(self, results: list[BatchResult]) -> bytes:
        """Return the events after all blocks."""
        (result,) = results
        usage = {"input_tokens": self.asked.prompt_tokens, "output_tokens": result.completion_tokens}
        delta = {"stop_sequence": None} | self._end(result, self._calls > 0)
        return _event({"type": "message_delta", "delta": delta, "usage": usage}) + _event({"type": "message_stop"})

    def ping(self) -> bytes:
        """Return the interface's own ping."""
        return _event({"type": "ping"})

    def error(self, error: ApiError) -> bytes:
        """Return the event of a failure."""
        return _event(error.anthropic())


def _event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])


def _use(call: Call) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}
