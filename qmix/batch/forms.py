"""Answers as lines of OpenAI's output files. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qmix.batch.lines import CHAT, Line

if TYPE_CHECKING:
    from qmix.batch.runner import Answer
    from qmix.choice import Chosen

TokenText = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Forms:
    """What the lines of one run have in common.

    `run` is its identity, from which the ids in its lines follow: a line does not depend on when it was computed.
    `created` is when the run was first begun, in seconds since 1970; `token_text` gives the text of one token.
    """

    run: str
    model: str
    created: int
    token_text: TokenText

    def answered(self, line: Line, answer: Answer) -> bytes:
        """The line of an answer."""
        mark = self._mark(line.id)
        chat = line.url == CHAT
        choice: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason, "logprobs": None}
        if chat:
            choice["message"] = {"role": "assistant", "content": answer.text}
        else:
            choice["text"] = answer.text
        if line.logprobs is not None:
            told = self._chat_logprobs if chat else self._logprobs
            choice["logprobs"] = told(answer.tokens)
        count = len(answer.tokens)
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{mark}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": count,
                "total_tokens": answer.prompt_tokens + count,
            },
        }
        response = {"status_code": 200, "request_id": f"req_{mark}", "body": body}
        return self._line(line.id, response, None)

    def refused(self, name: str, message: str) -> bytes:
        """The line of a request that the model cannot answer."""
        return self._line(name, None, {"code": "invalid_request", "message": message})

    def _line(self, name: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
        whole = {"id": f"batch_req_{self._mark(name)}", "custom_id": name, "response": response, "error": error}
        return json.dumps(whole, ensure_ascii=False).encode() + b"\n"

    def _mark(self, name: str) -> str:
        return hashlib.sha256(f"{self.run}:{name}".encode()).hexdigest()[:24]

    def _chat_logprobs(self, tokens: list[Chosen]) -> dict[str, Any]:
        content = []
        for chosen in tokens:
            likeliest = [self._told(token, logprob) for token, logprob in chosen.likeliest]
            assert chosen.logprob is not None
            content.append(self._told(chosen.token, chosen.logprob) | {"top_logprobs": likeliest})
        return {"content": content}

    def _told(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _logprobs(self, tokens: list[Chosen]) -> dict[str, Any]:
        texts = [self.token_text(chosen.token) for chosen in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [chosen.logprob for chosen in tokens],
            "top_logprobs": [
                {self.token_text(token): logprob for token, logprob in chosen.likeliest} for chosen in tokens
            ],
            "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
        }
