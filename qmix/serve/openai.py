"""Answers in the form of OpenAI's chat completions and completions, whole and as streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qmix.batch.forms import Offsets, Told, chat_logprobs, text_logprobs
from qmix.batch.request import CHAT
from qmix.engine.completion import BatchResult
from qmix.engine.sampler import Chosen
from qmix.serve.asked import Asked
from qmix.serve.errors import ApiError
from qmix.serve.events import TextEvents, event
from qmix.serve.following import Update
from qmix.serve.tools import Call

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def usage_of(asked: Asked, results: Sequence[BatchResult]) -> dict[str, Any]:
    """Return the tokens of prompts, each counted once, and of answers."""
    new = 0 if asked.silent else sum(result.completion_tokens for result in results)
    return {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": asked.prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": sum(result.reused_tokens for result in results[:: asked.n])},
    }


@dataclass(slots=True)
class OpenAIForm:
    """The form of one answer; it is also the encoder of its stream. `told` describes a token."""

    asked: Asked
    model: str
    told: Callable[[int], Told]
    created: int = field(default_factory=lambda: int(time.time()))
    _id: str = field(default_factory=lambda: secrets.token_hex(12))
    _offsets: dict[int, Offsets] = field(default_factory=dict)
    _texts: dict[int, TextEvents] = field(default_factory=dict)

    @property
    def chat(self) -> bool:
        return self.asked.url == CHAT

    def whole(self, results: Sequence[BatchResult]) -> dict[str, Any]:
        """Return the body of an answer."""
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._envelope(kind, choices) | {"usage": usage_of(self.asked, results)}

    def _choice(self, index: int, result: BatchResult) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": result.finish_reason}
        if self.asked.tooling is not None:
            text, calls = self.asked.tooling.read(result)
            choice["message"] = {"role": "assistant", "content": text or None, "refusal": None}
            if calls:
                choice["message"]["tool_calls"] = _calls(calls)
                choice["finish_reason"] = "tool_calls"
        elif self.chat:
            choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
        else:
            choice["text"] = self._echoed(index) + ("" if self.asked.silent else result.text)
        own = [] if self.asked.silent else result.tokens
        if self._begins_with_a_space(index, result.prompt):
            self._offsets[index] = Offsets(-1)
        return choice | {"logprobs": self._logprobs(index, [*result.prompt, *own])}

    def _echoed(self, index: int) -> str:
        return self.asked.echo[index // self.asked.n] if self.asked.echo else ""

    def _begins_with_a_space(self, index: int, prompt: Sequence[Chosen]) -> bool:
        """Return whether the tokens of an echoed prompt have one space more than its text."""
        tokens = b"".join(self.told(chosen.token).data or b"" for chosen in prompt)
        return tokens == b" " + self._echoed(index).encode()

    def _logprobs(self, index: int, tokens: list[Chosen]) -> dict[str, Any] | None:
        if self.asked.requests[index].sampling.logprobs is None:
            return None
        if self.chat:
            return chat_logprobs(self.told, tokens) | {"refusal": None}
        return text_logprobs(self.told, tokens, self._offsets.setdefault(index, Offsets()))

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self._id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def begin(self) -> bytes:
        """Return a chat's first events, which name the role."""
        if not self.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._chunk({"index": index, "delta": delta}) for index in range(len(self.asked.requests)))

    def update(self, update: Update) -> bytes:
        """Return the events of more text, and of the end of an answer."""
        result, index = update.result, update.index
        events = b""
        if update.text or update.tokens:
            events = self._text(update)
        if result is None:
            return events
        last: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        reason = result.finish_reason
        if update.calls:
            numbered = [{"index": number, **call} for number, call in enumerate(_calls(update.calls))]
            events += self._chunk({"index": index, "delta": {"tool_calls": numbered}})
            reason = "tool_calls"
        return events + self._chunk({"index": index, **last, "finish_reason": reason})

    def _text(self, update: Update) -> bytes:
        """Return the event of more text."""

        def make(text: str) -> bytes:
            content: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
            return self._chunk({"index": update.index, **content, "logprobs": logprobs})

        if (logprobs := self._logprobs(update.index, update.tokens)) is not None:
            return make(update.text)
        if update.index not in self._texts:
            self._texts[update.index] = TextEvents(make)
        return self._texts[update.index](update.text)

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        chunk = self._envelope(kind, [{"logprobs": None, "finish_reason": None} | choice])
        return event(chunk | {"usage": None} if self.asked.usage else chunk)

    def end(self, results: list[BatchResult]) -> bytes:
        """Return the last events, with the usage where it is requested."""
        if not self.asked.usage:
            return DONE
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(self._envelope(kind, []) | {"usage": usage_of(self.asked, results)}) + DONE

    def ping(self) -> bytes:
        """Return a comment, which clients skip."""
        return PING

    def error(self, error: ApiError) -> bytes:
        """Return the event of a failure."""
        return event(error.openai())


def _calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
