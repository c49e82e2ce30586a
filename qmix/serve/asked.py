"""Turn the body of a request into requests to the engine. Whatever is not supported is refused by its name.

Options are those of a line of `qmix batch`. What only a server has (streams, several answers, several prompts, echoed
prompts) is taken out of the body first.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from qmix.batch.prompts import Asking, LineRefused, LineTooLong
from qmix.batch.request import CHAT, COMPLETION, Line, LineError, parse_body
from qmix.batch.schema import Fields
from qmix.engine.running import BatchRequest
from qmix.errors import QmixError
from qmix.files import decode_json
from qmix.serve.errors import ApiError, invalid, too_long
from qmix.serve.tools import Tooling, tooling, without_calls

OWN = ("stream", "stream_options", "echo")
MOST_ANSWERS = 128  # of one request
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
NAME_BYTES = 9
ANSWER_BYTES, ID_BYTES = 2**13, 50  # of an answer with its request, and of each token of an answer not yet read
# A token with its log-probability, and each likely one beside it: as they are kept, told and written (530 measured).
TOKEN_BYTES, LOGPROB_BYTES = 650, 550


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers: none is sent


class Own(msgspec.Struct):
    """The fields of a body that are the server's own."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    echo: bool | None = None
    prompt: str | list[int | str | list[int]] = ""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests to the engine, one for each answer in the order of their index; each prompt has `n` answers.

    `usage` wants the tokens counted at the end of a stream. `echo` has the prompts' texts where answers repeat them.
    `silent` leaves the answers out, where only the prompt was to be scored. `tooling` are the tools to call.
    """

    url: str
    requests: list[BatchRequest]
    n: int = 1
    stream: bool = False
    usage: bool = False
    echo: list[str] | None = None
    silent: bool = False
    tooling: Tooling | None = None

    @property
    def prompt_tokens(self) -> int:
        """The tokens of the prompts, each counted once."""
        return sum(len(request.prompt) for request in self.requests[:: self.n])

    @property
    def answer_bytes(self) -> int:
        """The most bytes that the answers take until they are sent, with log-probabilities and echoed prompts."""
        held = len(self.requests) * ANSWER_BYTES
        for request in self.requests:
            held += request.sampling.max_new_tokens * ID_BYTES
            if (most := request.sampling.logprobs) is not None:
                tokens = request.sampling.max_new_tokens + len(request.prompt) * request.echo
                held += tokens * (TOKEN_BYTES + LOGPROB_BYTES * most)
        return held


class Asker:
    """Reads bodies and tokenises prompts, one at a time in a thread of its own, which bounds the memory for it."""

    def __init__(self, asking: Asking, names: frozenset[str], decode: Callable[[Sequence[int]], str]) -> None:
        self.asking, self.names, self._decode = asking, names, decode
        self._executor = ThreadPoolExecutor(1, "qmix-text")

    async def ask(self, url: str, body: bytes, cap: bool = False) -> Asked:
        """Return what a body asks for; with `cap` an answer too long for the context is cut. Raises ApiError."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._ask, url, body, cap)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError where a request names another model."""
        if name is not None and name not in self.names:
            served = ", ".join(sorted(self.names))
            raise ApiError(
                404, f"model {name[:100]!r}: not served here; use {served}", code="model_not_found", param="model"
            )

    def _ask(self, url: str, body: bytes, cap: bool) -> Asked:
        try:
            own = decode_json(body, Own, "", LineError)
            self.check_model(own.model)
            given = decode_json(body, Fields, "", LineError)
            return self._asked(url, own, given, cap)
        except LineTooLong as error:
            raise too_long(str(error), "messages" if url == CHAT else "prompt") from None
        except (LineError, LineRefused) as error:
            raise invalid(str(error).removeprefix(": ")) from None
        except QmixError as error:  # of the tokenizer
            raise invalid(str(error)) from None

    def _asked(self, url: str, own: Own, given: Fields, cap: bool) -> Asked:
        chat = url == CHAT
        prompts: list[str | list[int]] = [""] if chat else _prompts(given, own.prompt)
        if not 1 <= (own.n or 1) * len(prompts) <= MOST_ANSWERS:
            raise LineError(f"n {own.n or 1}: n times the number of prompts must be 1 to {MOST_ANSWERS}")
        if own.stream_options is not None and not own.stream:
            raise LineError("stream_options: needs stream to be true")
        echo = bool(own.echo) and not chat
        if echo and own.stream:
            raise LineError("echo: not together with stream; leave one of them out")
        silent = echo and own.max_tokens == 0
        if silent or (not chat and own.max_tokens is None):
            given["max_tokens"] = msgspec.Raw(b"1" if silent else str(COMPLETION_TOKENS).encode())
        if not chat:
            given["prompt"] = msgspec.Raw(b'""')
        tools = tooling(given, self.asking, self._decode) if chat else None
        lost = without_calls(given) if chat else {}
        line = parse_body(url, msgspec.json.encode(given), OWN[:2] if chat else OWN)
        if lost or tools is not None:
            line = _with_tools(line, lost, tools)
        requests, texts = [], []
        for prompt in prompts:
            one = self._request(replace(line, prompt=prompt), own, cap)
            texts.append(prompt if isinstance(prompt, str) else self._decode(prompt) if echo else "")
            requests += [
                replace(each, name=f"{each.name}:{each.index}", echo=echo and each.sampling.logprobs is not None)
                for each in one.completions()
            ]
        usage = own.stream_options is not None and bool(own.stream_options.include_usage)
        n = len(requests) // len(prompts)
        return Asked(url, requests, n, bool(own.stream), usage, texts if echo else None, silent, tools)

    def _request(self, line: Line, own: Own, cap: bool) -> BatchRequest:
        """Return the request of one prompt. Raises LineTooLong where a stated length does not fit, without `cap`."""
        request = self.asking.request(replace(line, id=secrets.token_hex(NAME_BYTES)))
        stated = own.max_completion_tokens or own.max_tokens
        context = self.asking.encoder.context
        if stated is not None and not cap and len(request.prompt) + stated > context:
            raise LineTooLong(
                f"this server's context has {context} tokens, and {len(request.prompt) + stated} were requested: "
                f"{len(request.prompt)} of the prompt, {stated} of the answer; shorten either"
            )
        return request

    def close(self) -> None:
        """Let go of the thread."""
        self._executor.shutdown(cancel_futures=True)


def _with_tools(line: Line, lost: dict[int, dict[str, Any]], tools: Tooling | None) -> Line:
    """Return a line whose messages have their calls again, and whose answer may call tools."""
    messages = [message | lost.get(index, {}) for index, message in enumerate(line.messages)]
    if tools is None:
        return replace(line, messages=messages)
    return replace(line, messages=messages, tools=tools.tools, options=line.options | {"grammar": tools.grammar})


def _prompts(given: Fields, prompt: str | list[int | str | list[int]]) -> list[str | list[int]]:
    """Return the prompts of a completion: one text, one list of token ids, or a list of either."""
    if "prompt" not in given:
        raise LineError("prompt: is missing; give a text, token ids, or a list of either")
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(part) for part in prompt}
    if kinds == {int}:
        return [[part for part in prompt if isinstance(part, int)]]
    if len(kinds) != 1:
        raise LineError("prompt: must be a text, a list of token ids, or a list of one of these")
    return [part for part in prompt if not isinstance(part, int)]


def body_of(fields: dict[str, Any]) -> bytes:
    """Return a body in OpenAI's form, without fields that are None."""
    return msgspec.json.encode({name: value for name, value in fields.items() if value is not None})


__all__ = ["CHAT", "COMPLETION", "COMPLETION_TOKENS", "Asked", "Asker", "body_of"]
