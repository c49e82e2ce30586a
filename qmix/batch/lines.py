"""What a file of requests says, checked line by line before anything is computed. Loads no torch.

A line is OpenAI's (`custom_id`, `method`, `url`, `body`) or short (`id`, `prompt` or `messages`, options beside them).
What can be seen from the file alone is an error of the file: nothing is run with it. What only the model can tell (a
prompt that is too long for it) becomes an error line among the answers, and is not looked at here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, BinaryIO

from qmix.errors import UsageError
from qmix.sampling import Sampling

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MOST_LOGPROBS = 20
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
COUNTS = ("max_tokens", "top_k", "seed")
OPTIONS = (*NUMBERS, *COUNTS, "stop", "ignore_eos", "logprobs")
CHAT_OPTIONS = (*OPTIONS, "top_logprobs", "max_completion_tokens")
FIXED = {"n": 1, "stream": False}  # what OpenAI's bodies may say of themselves, and qmix does in any case
BODY = ("model", "user", *FIXED)


class LineError(Exception):
    """What is wrong with a line, in words that go behind its number."""


@dataclass(frozen=True, slots=True)
class Line:
    """A request: `messages` to answer, or without any a `prompt` to continue, text or ids.

    `options` are Sampling's fields as far as the line has its own; `logprobs` is how many of the likeliest tokens are
    told at each place, None for none at all. `model` is what the line calls the model.
    """

    id: str
    url: str
    prompt: str | list[int]
    messages: list[dict[str, str]]
    options: dict[str, Any]
    logprobs: int | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a line is in the input: its number, counted from 1, and its bytes."""

    number: int
    id: str
    offset: int
    size: int


class Requests:
    """The lines of a seekable binary file. They stay there: of each only its place and its id are kept.

    `problems` says for each bad line what is wrong with it; `digest` is the sha256 of the whole file, and `models` the
    names that its lines call the model by. `has_system` says whether any line has a system message.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.entries: list[Entry] = []
        self.problems: list[str] = []
        self.models: set[str] = set()
        self.has_system = False
        digest, seen = hashlib.sha256(), dict[str, int]()
        for number, offset, raw in _lines(file):
            digest.update(raw)
            if raw.strip():
                self._check(Entry(number, "", offset, len(raw)), raw, seen)
        self.digest = digest.hexdigest()

    def _check(self, entry: Entry, raw: bytes, seen: dict[str, int]) -> None:
        try:
            line = parse_line(raw)
            if (first := seen.setdefault(line.id, entry.number)) != entry.number:
                raise LineError(f"the id {line.id!r} is that of line {first} already")
        except LineError as error:
            self.problems.append(f"line {entry.number}: {error}")
            return
        self.entries.append(Entry(entry.number, line.id, entry.offset, entry.size))
        if line.model is not None:
            self.models.add(line.model)
        self.has_system |= bool(line.messages) and line.messages[0]["role"] == "system"

    def line(self, entry: Entry) -> Line:
        """The request at a place."""
        self._file.seek(entry.offset)
        return parse_line(self._file.read(entry.size))


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    file.seek(0)
    offset = 0
    for number, raw in enumerate(file, 1):
        yield number, offset, raw
        offset += len(raw)


def parse_line(raw: bytes) -> Line:
    """The request of a line. Raises LineError."""
    try:
        item = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_number, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8 text (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise LineError(f"no JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise LineError("no JSON: nested too deeply") from None
    if not isinstance(item, dict):
        raise LineError("not a JSON object")
    _no_surrogates(item)
    return _openai(item) if {"custom_id", "body", "url", "method"} & item.keys() else _short(item)


def _no_number(text: str) -> float:
    raise LineError(f"no JSON: {text} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise LineError(f"the field {twice!r} is there twice")
    return found


def _no_surrogates(item: dict[str, Any]) -> None:
    try:
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise LineError("half of a surrogate pair, which is no text") from None


def _openai(item: dict[str, Any]) -> Line:
    _known(item, ("custom_id", "method", "url", "body"))
    for name in ("custom_id", "url", "body"):
        if name not in item:
            raise LineError(f"{name!r} is missing")
    url, body = item["url"], _typed(item, "body", dict, "an object")
    if item.get("method", "POST") != "POST":
        raise LineError(f"method {item['method']!r}: must be 'POST'")
    if url not in (CHAT, COMPLETION):
        raise LineError(f"url {url!r}: must be {CHAT!r} or {COMPLETION!r}")
    prompt = "messages" if url == CHAT else "prompt"
    _known(body, (prompt, *BODY, *(CHAT_OPTIONS if url == CHAT else OPTIONS)))
    for name, value in FIXED.items():
        if body.get(name) not in (None, value):
            raise LineError(f"{name} {body[name]!r}: qmix knows only {json.dumps(value)}")
    return _request(_typed(item, "custom_id", str, "a text"), url, body)


def _short(item: dict[str, Any]) -> Line:
    if "id" not in item:
        raise LineError("'id' is missing (or 'custom_id', in OpenAI's form)")
    if ("prompt" in item) == ("messages" in item):
        raise LineError("give either 'prompt' or 'messages'")
    chat = "messages" in item
    _known(item, ("id", "messages", *CHAT_OPTIONS) if chat else ("id", "prompt", *OPTIONS))
    name = item["id"]
    return _request(
        str(name) if type(name) is int else _typed(item, "id", str, "a text"), CHAT if chat else COMPLETION, item
    )


def _request(name: str, url: str, body: dict[str, Any]) -> Line:
    if not name:
        raise LineError("the id is empty")
    body = {key: value for key, value in body.items() if value is not None}
    model = _typed(body, "model", str, "a text") if "model" in body else None
    options, logprobs = _options(body), _logprobs(body, url)
    if url == CHAT:
        return Line(name, url, [], _messages(body), options, logprobs, model)
    return Line(name, url, _prompt(body), [], options, logprobs, model)


def _prompt(body: dict[str, Any]) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise LineError("prompt: must be a text, or a list of token ids")


def _messages(body: dict[str, Any]) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise LineError("messages: must be a list of at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise LineError(f"{where}: must be an object")
    _known(message, ("role", "content"), f"{where}: ")
    if message.get("role") not in ("system", "user", "assistant"):
        raise LineError(f"{where}: role {message.get('role')!r}: must be 'system', 'user' or 'assistant'")
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise LineError(f"{where}: content must be a text, or a list of parts of type 'text'")
    return {"role": message["role"], "content": content}


def _options(body: dict[str, Any]) -> dict[str, Any]:
    """Sampling's fields, of the right types and in range."""
    if "max_tokens" in body and "max_completion_tokens" in body:
        raise LineError("give either max_tokens or max_completion_tokens")
    options: dict[str, Any] = {}
    for name in NUMBERS:
        if name in body:
            options[name] = float(_typed(body, name, (int, float), "a number"))
    for name in (*COUNTS, "max_completion_tokens"):
        if name in body:
            field = "max_new_tokens" if name.startswith("max_") else name
            options[field] = _typed(body, name, int, "a whole number")
    if "ignore_eos" in body:
        options["ignore_eos"] = _typed(body, "ignore_eos", bool, "true or false")
    if "stop" in body:
        stop = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
        if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
            raise LineError("stop: must be a text, or a list of texts")
        options["stop"] = tuple(stop)
    try:
        Sampling(**options)
    except UsageError as error:
        option, rest = str(error).removeprefix("--").split(" ", 1)
        names = {"max-new-tokens": "max_tokens"}
        raise LineError(f"{names.get(option, option.replace('-', '_'))} {rest}") from None
    return options


def _logprobs(body: dict[str, Any], url: str) -> int | None:
    if url == COMPLETION:
        return _count(body, "logprobs") if "logprobs" in body else None
    asked = _typed(body, "logprobs", bool, "true or false") if "logprobs" in body else False
    if "top_logprobs" in body and not asked:
        raise LineError("top_logprobs: needs logprobs to be true")
    if not asked:
        return None
    return _count(body, "top_logprobs") if "top_logprobs" in body else 0


def _count(body: dict[str, Any], name: str) -> int:
    count: int = _typed(body, name, int, f"a whole number from 0 to {MOST_LOGPROBS}")
    if not 0 <= count <= MOST_LOGPROBS:
        raise LineError(f"{name} {count}: must be a whole number from 0 to {MOST_LOGPROBS}")
    return count


def _typed(item: dict[str, Any], name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    value = item[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise LineError(f"{name}: must be {wanted}")
    return value


def _known(item: dict[str, Any], names: Collection[str], where: str = "") -> None:
    """Every unknown field is named, with what it may have been meant to be."""
    problems = []
    for name in item:
        if name not in names:
            near = get_close_matches(name, names, 1)
            problems.append(f"unknown field {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if problems:
        raise LineError(where + ", ".join(problems))
