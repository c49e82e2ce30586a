"""Answers as lines of OpenAI's output files. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from qmix.batch.lines import CHAT, Line
from qmix.text.detokenizer import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qmix.engine.completion import BatchResult
    from qmix.engine.sampler import Chosen


@dataclass(frozen=True, slots=True)
class Told:
    """A token in an answer. `data` are its bytes, None for a special token, which is in no text.

    Where the bytes are not whole characters, `text` has U+FFFD, and `name` is `bytes:\\xf0\\x9f` as in OpenAI's
    completions, so that two parts of characters are not taken for the same token.
    """

    text: str
    name: str
    data: bytes | None


def told_by(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], Told]:
    """Return a function from a token id to its `Told`."""
    bytes_of = TokenBytes(tokenizer)

    @cache
    def told(token: int) -> Told:
        data = bytes_of(token)
        if data is None:
            special = tokenizer.decode([token], skip_special_tokens=False)
            return Told(special, special, None)
        text = data.decode(errors="replace")
        whole = text.encode() == data
        return Told(text, text if whole else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)

    return told


@dataclass(frozen=True, slots=True)
class Forms:
    """Forms the lines of one run.

    The ids in the lines follow from `run`, its identity: a line does not depend on when it was computed. `created` is
    the start of the first run, in seconds since 1970; `told` describes a token.
    """

    run: str
    model: str
    created: int
    told: Callable[[int], Told]

    def answered(self, line: Line, answers: Sequence[BatchResult]) -> bytes:
        """Return the line of a request's completions."""
        mark = self._mark(line.id)
        chat = line.url == CHAT
        count = sum(len(answer.tokens) for answer in answers)
        prompt = answers[0].prompt_tokens
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{mark}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(line, answer) for answer in sorted(answers, key=lambda answer: answer.index)],
            "usage": {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count},
        }
        response = {"status_code": 200, "request_id": f"req_{mark}", "body": body}
        return self._line(line.id, response, None)

    def _choice(self, line: Line, answer: BatchResult) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": answer.index, "finish_reason": answer.finish_reason, "logprobs": None}
        chat = line.url == CHAT
        if chat:
            choice["message"] = {"role": "assistant", "content": answer.text}
        else:
            choice["text"] = answer.text
        if line.options.get("logprobs") is not None:
            told = self._chat_logprobs if chat else self._logprobs
            choice["logprobs"] = told(answer.tokens)
        return choice

    def refused(self, name: str, message: str) -> bytes:
        """Return the line of a request that cannot be answered."""
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
        told = self.told(token)
        return {"token": told.text, "logprob": logprob, "bytes": None if told.data is None else list(told.data)}

    def _logprobs(self, tokens: list[Chosen]) -> dict[str, Any]:
        told = [self.told(chosen.token) for chosen in tokens]
        return {
            "tokens": [each.name for each in told],
            "token_logprobs": [chosen.logprob for chosen in tokens],
            "top_logprobs": [self._likeliest(chosen) for chosen in tokens],
            "text_offset": offsets(told),
        }

    def _likeliest(self, chosen: Chosen) -> dict[str, float]:
        """Return logprobs by name; of two tokens with the same text, that of the likelier."""
        found: dict[str, float] = {}
        for token, logprob in chosen.likeliest:
            found.setdefault(self.told(token).name, logprob)
        return found


def offsets(tokens: Sequence[Told]) -> list[int]:
    """Return the number of complete characters of the text before each token."""
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    found, count = [], 0
    for each in tokens:
        found.append(count)
        count += len(decoder.decode(each.data or b""))
    return found
