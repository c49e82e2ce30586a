"""Answers as lines of OpenAI's output files. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from qmix.batch.request import CHAT, Line
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
            choice["logprobs"] = (chat_logprobs if chat else text_logprobs)(self.told, answer.tokens)
        return choice

    def refused(self, name: str, message: str) -> bytes:
        """Return the line of a request that cannot be answered."""
        return self._line(name, None, {"code": "invalid_request", "message": message})

    def _line(self, name: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
        whole = {"id": f"batch_req_{self._mark(name)}", "custom_id": name, "response": response, "error": error}
        return json.dumps(whole, ensure_ascii=False).encode() + b"\n"

    def _mark(self, name: str) -> str:
        return hashlib.sha256(f"{self.run}:{name}".encode()).hexdigest()[:24]


def chat_logprobs(told: Callable[[int], Told], tokens: Sequence[Chosen]) -> dict[str, Any]:
    """Return the log-probabilities of tokens as in OpenAI's chat completions."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        each = told(token)
        return {"token": each.text, "logprob": logprob, "bytes": None if each.data is None else list(each.data)}

    content = []
    for chosen in tokens:
        assert chosen.logprob is not None
        likeliest = [one(token, logprob) for token, logprob in chosen.likeliest]
        content.append(one(chosen.token, chosen.logprob) | {"top_logprobs": likeliest})
    return {"content": content}


def text_logprobs(
    told: Callable[[int], Told], tokens: Sequence[Chosen], before: Offsets | None = None
) -> dict[str, Any]:
    """Return the log-probabilities of tokens as in OpenAI's completions; `before` counts the text before them."""
    each = [told(chosen.token) for chosen in tokens]
    return {
        "tokens": [one.name for one in each],
        "token_logprobs": [chosen.logprob for chosen in tokens],
        "top_logprobs": [_likeliest(told, chosen) for chosen in tokens],
        "text_offset": list(map(before or Offsets(), each)),
    }


def _likeliest(told: Callable[[int], Told], chosen: Chosen) -> dict[str, float] | None:
    """Return logprobs by name; of two tokens with the same text, that of the likelier. None at a text's beginning."""
    if chosen.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in chosen.likeliest:
        found.setdefault(told(token).name, logprob)
    return found


class Offsets:
    """Counts the complete characters of the text before each token.

    SentencePiece puts a space before a text, which is no part of it: -1 as `count` leaves it out.
    """

    def __init__(self, count: int = 0) -> None:
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")
        self._count = count

    def __call__(self, token: Told) -> int:
        """Return the count before a token, and add the token's characters."""
        before = self._count
        self._count += len(self._decoder.decode(token.data or b""))
        return max(0, before)
