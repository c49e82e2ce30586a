"""OpenAI's /v1/responses, as far as text needs it: nothing is stored, no tool is called."""

from __future__ import annotations

import secrets
import time
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
from qmix.serve.texts import Message, check_fields, decoded, joined, text_of

FORMAT = {"format": {"type": "text"}}
VERBOSITY = {"verbosity": "medium"}
PLAIN: tuple[Any, ...] = ({}, FORMAT, VERBOSITY, FORMAT | VERBOSITY)
FIELDS = (
    Field("metadata", None, "labels for storage at OpenAI"),
    Field("user", None, "identifies the user"),
    Field("safety_identifier", None, "identifies the user"),
    Field("service_tier", None, "only for OpenAI's service"),
    Field("prompt_cache_key", None, "only for OpenAI's cache"),
    Field("prompt_cache_retention", None, "only for OpenAI's cache"),
    Field("store", None, "nothing is stored"),
    Field("stream_options", None, "only pads a stream"),
    Field("include", None, "only adds what is not here"),
    Field("parallel_tool_calls", None, "no tools are called"),
    Field("max_tool_calls", None, "no tools are called"),
    Field("tools", ([],), "no tools are called"),
    Field("tool_choice", ("none", "auto"), "no tools are called"),
    Field("text", PLAIN, "answers are plain text"),
    Field("reasoning", ({}, {"effort": "none"}), "the model has no reasoning step"),
    Field("truncation", ("disabled",), "not supported"),
    Field("background", (False,), "not supported"),
    Field("previous_response_id", (), "nothing is stored; send the whole conversation"),
    Field("conversation", (), "nothing is stored; send the whole conversation"),
    Field("prompt", (), "no prompts are stored"),
    Field("context_management", ([],), "not supported"),
    Field("top_logprobs", (0,), "not supported; use /v1/chat/completions"),
)
TEXTS = ("input_text", "output_text", "text")


class Body(msgspec.Struct):
    """The fields of a request."""

    input: str | list[Fields]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None


async def ask(asker: Asker, body: bytes) -> tuple[Asked, Body]:
    """Return what a body asks for, and its fields. Raises ApiError."""
    try:
        given = decode_json(body, Fields, "", LineError)
        check_fields(given, Body.__struct_fields__, FIELDS)
        wanted = decode_json(body, Body, "", LineError)
        messages = _messages(wanted)
    except (LineError, LineRefused) as error:
        raise invalid(str(error).removeprefix(": ")) from None
    options = {name: getattr(wanted, name) for name in ("model", "stream", "temperature", "top_p")}
    chat = body_of({"messages": messages, "max_completion_tokens": wanted.max_output_tokens, **options})
    return await asker.ask(CHAT, chat), wanted


def _messages(wanted: Body) -> list[Message]:
    """Return the instructions as a system prompt, and the turns."""
    turns = [{"role": "system", "content": wanted.instructions}] if wanted.instructions else []
    if isinstance(wanted.input, str):
        return [*turns, {"role": "user", "content": wanted.input}]
    for index, given in enumerate(wanted.input):
        where = f"input[{index}]"
        item = {name: decoded(value) for name, value in given.items()}
        if item.get("type", "message") != "message":
            raise LineRefused(f"{where}: type {str(item['type'])[:100]!r}: must be 'message'; no tools are called")
        role = {"developer": "system"}.get(str(item.get("role")), item.get("role"))
        if role not in ("system", "user", "assistant"):
            raise LineError(f"{where}.role: must be 'system', 'developer', 'user' or 'assistant'")
        turns.append({"role": role, "content": text_of(item.get("content"), TEXTS, f"{where}.content")})
    return joined(turns)


@dataclass(slots=True)
class ResponseForm:
    """The form of one response; it is also the encoder of its stream."""

    asked: Asked
    model: str
    wanted: Body
    created: float = field(default_factory=lambda: int(time.time()))
    _mark: str = field(default_factory=lambda: secrets.token_hex(12))
    _count: int = 0

    def whole(self, results: Sequence[BatchResult]) -> dict[str, Any]:
        """Return the body of a response."""
        (result,) = results
        cut = result.finish_reason == "length"
        tokens, new = self.asked.prompt_tokens, result.completion_tokens
        status = "incomplete" if cut else "completed"
        return self._response(status, [self._item(status, result.text)]) | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": new,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tokens + new,
            },
        }

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
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": wanted.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
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
        return (
            self._event("response.created", response=started)
            + self._event("response.in_progress", response=started)
            + self._event("response.output_item.added", output_index=0, item=self._item("in_progress", None))
            + self._event("response.content_part.added", **self._place(), part=_part(""))
        )

    def update(self, update: Update) -> bytes:
        """Return the event of more text."""
        if not update.text:
            return b""
        return self._event("response.output_text.delta", **self._place(), delta=update.text, logprobs=[])

    def end(self, results: list[BatchResult]) -> bytes:
        """Return the events after all text."""
        (result,) = results
        response = self.whole(results)
        status = response["status"]
        return (
            self._event("response.output_text.done", **self._place(), text=result.text, logprobs=[])
            + self._event("response.content_part.done", **self._place(), part=_part(result.text))
            + self._event("response.output_item.done", output_index=0, item=self._item(status, result.text))
            + self._event(f"response.{status}", response=response)
        )

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
