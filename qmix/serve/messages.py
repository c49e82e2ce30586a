"""Anthropic's /v1/messages."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from qmix.batch.lines import CHAT, LineError
from qmix.batch.openai import Field
from qmix.batch.prompts import LineRefused
from qmix.batch.schema import Fields
from qmix.engine.completion import BatchResult
from qmix.files import decode_json
from qmix.serve.asked import Asked, Asker, body_of
from qmix.serve.errors import ApiError, invalid
from qmix.serve.events import event
from qmix.serve.following import Update
from qmix.serve.texts import Message, check_fields, joined, text_of

FIELDS = (
    Field("metadata", None, "identifies the user"),
    Field("service_tier", None, "only for Anthropic's service"),
    Field("speed", None, "only for Anthropic's service"),
    Field("inference_geo", None, "only for Anthropic's service"),
    Field("user_profile_id", None, "identifies the user"),
    Field("workspace_id", None, "identifies the user"),
    Field("diagnostics", None, "only for Anthropic's service"),
    Field("cache_control", None, "only for Anthropic's cache"),
    Field("thinking", ({"type": "disabled"},), "the model has no reasoning step"),
    Field("tools", ([],), "no tools are called"),
    Field("tool_choice", ({"type": "none"}, {"type": "auto"}), "no tools are called"),
    Field("mcp_servers", ([],), "no tools are called"),
    Field("container", (), "no code is run"),
    Field("context_management", ({}, {"edits": []}), "not supported"),
    Field("output_config", ({},), "not supported"),
    Field("output_format", ({"type": "text"},), "answers are plain text"),
)
ROLES = ("user", "assistant")


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


async def ask(asker: Asker, body: bytes, counting: bool = False) -> tuple[Asked, int]:
    """Return what a body asks for, and the tokens of the longest answer that it wants. Raises ApiError."""
    try:
        given = decode_json(body, Fields, "", LineError)
        check_fields(given, Body.__struct_fields__, FIELDS)
        wanted = decode_json(body, Body, "", LineError)
        if wanted.max_tokens is None and not counting:
            raise LineError("max_tokens: is missing; give the length of the longest answer")
        messages = _messages(wanted)
    except (LineError, LineRefused) as error:
        raise invalid(str(error).removeprefix(": ")) from None
    options = {name: getattr(wanted, name) for name in ("model", "stream", "temperature", "top_p", "top_k")}
    most = 1 if counting else wanted.max_tokens
    chat = body_of({"messages": messages, "max_tokens": most, "stop": wanted.stop_sequences or None, **options})
    return await asker.ask(CHAT, chat, cap=True), most or 0


def _messages(wanted: Body) -> list[Message]:
    """Return the system prompt and the turns, those of one role in a row as one turn."""
    turns = []
    for index, given in enumerate(wanted.messages):
        where = f"messages[{index}]"
        check_fields(given, ("role", "content"), (), f"{where}: ")
        role, content = (msgspec.json.decode(given.get(name, b"null")) for name in ("role", "content"))
        if role not in ROLES:
            raise LineError(f"{where}.role: must be 'user' or 'assistant'")
        turns.append({"role": role, "content": text_of(content, ("text",), f"{where}.content")})
    if not turns or turns[-1]["role"] != "user":
        raise LineRefused("messages: the last one must be the user's; the beginning of an answer is not supported")
    system = "" if wanted.system is None else text_of(wanted.system, ("text",), "system")
    return [*([{"role": "system", "content": system}] if system else []), *joined(turns)]


@dataclass(slots=True)
class MessageForm:
    """The form of one answer; it is also the encoder of its stream. `wanted` is the longest answer in tokens."""

    asked: Asked
    model: str
    wanted: int
    _id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")

    def whole(self, results: Sequence[BatchResult]) -> dict[str, Any]:
        """Return the body of an answer."""
        (result,) = results
        content = [{"type": "text", "text": result.text}] if result.text else []
        return self._message(content, result.completion_tokens) | self._end(result)

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

    def _end(self, result: BatchResult) -> dict[str, Any]:
        """Return why an answer ended."""
        if result.finish_reason == "length":
            full = result.completion_tokens < self.wanted
            return {"stop_reason": "model_context_window_exceeded" if full else "max_tokens"}
        if result.stop in self.asked.requests[0].sampling.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": result.stop}
        return {"stop_reason": "end_turn"}

    def begin(self) -> bytes:
        """Return the events before any text."""
        start = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _event({"type": "message_start", "message": self._message([], 0)}) + _event(start) + self.ping()

    def update(self, update: Update) -> bytes:
        """Return the event of more text."""
        if not update.text:
            return b""
        delta = {"type": "text_delta", "text": update.text}
        return _event({"type": "content_block_delta", "index": 0, "delta": delta})

    def end(self, results: list[BatchResult]) -> bytes:
        """Return the events after all text."""
        (result,) = results
        usage = {"input_tokens": self.asked.prompt_tokens, "output_tokens": result.completion_tokens}
        delta = {"stop_sequence": None} | self._end(result)
        return (
            _event({"type": "content_block_stop", "index": 0})
            + _event({"type": "message_delta", "delta": delta, "usage": usage})
            + _event({"type": "message_stop"})
        )

    def ping(self) -> bytes:
        """Return the interface's own ping."""
        return _event({"type": "ping"})

    def error(self, error: ApiError) -> bytes:
        """Return the event of a failure."""
        return _event(error.anthropic())


def _event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])
