"""A file of requests, checked line by line before anything is computed. Loads no torch.

A line has OpenAI's form (`custom_id`, `method`, `url`, `body`) or the short one (`id`, `prompt` or `messages`, and
options). An invalid line (JSON, types, ranges, unknown fields, ids) is an error of the file: nothing is run. A valid
request that cannot be answered gets an error line among the answers: OpenAI's fields that qmix does not support are
refused here, and what depends on the model (a prompt that is too long for it) is found later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, BinaryIO, TypeVar

import msgspec

from qmix.batch.openai import CHAT_FIELDS, COMPLETION_FIELDS, MESSAGE_FIELDS, TOOL_ROLES, not_taken
from qmix.batch.schema import (
    ChatBody,
    CompletionBody,
    Envelope,
    Fields,
    Identity,
    Message,
    Options,
    Part,
    ResponseFormat,
)
from qmix.batch.shards import Shard
from qmix.engine.sampling import RANGES, Sampling
from qmix.errors import UsageError
from qmix.files import TEXT_LIMIT, decode_json

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, type[ChatBody | CompletionBody]] = {CHAT: ChatBody, COMPLETION: CompletionBody}
OPENAI_FORM = {"custom_id", "method", "url", "body"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
LONGEST_ID = 512  # bytes
LINE_LIMIT = TEXT_LIMIT  # bytes of a line
TOLD = 20  # problems and model names that are kept; more are only counted
ENTRY_BYTES = 600  # bytes that a line takes in memory besides its id
RENAMED = {"max_tokens": "max_new_tokens", "response_format": "json_schema"}  # OpenAI's names of Sampling's fields
JSON_OBJECT = '{"type": "object"}'
T = TypeVar("T")


class LineError(UsageError):
    """An invalid line; the text follows the line's number."""


@dataclass(frozen=True, slots=True)
class Line:
    """A request: `messages` to answer, or, if empty, a `prompt` (text or ids) to continue.

    `options` are the fields of Sampling that the line sets. `model` is the model that the line asks for. `refused` is
    the reason why qmix cannot answer the request, None where the line has no such reason. `tools` are
    shown to the model.
    """

    id: str
    url: str
    prompt: str | list[int]
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    model: str | None = None
    refused: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of a line in the input: its number, from 1, and its bytes."""

    number: int
    id: str
    offset: int
    size: int


class Requests:
    """The lines of a seekable binary file. Only the place and the id of each line are kept in memory.

    `problems` are messages about the first invalid lines, `bad` is the number of invalid lines. `digest` is the sha256
    of the file, `models` are the models that lines ask for, and `has_system` is true where a line has a system message.
    With a `shard`, all lines are checked and only its own are kept; `count` are the valid lines of the whole file.
    Where the file is a part of another one, `digest` is the sha256 of that.
    """

    def __init__(self, file: BinaryIO, shard: Shard | None = None, digest: str = "") -> None:
        self._file, self.shard = file, shard
        self.count = 0
        self.entries: list[Entry] = []
        self.problems: list[str] = []
        self.bad = 0
        self.models: set[str] = set()
        self.has_system = False
        content, seen = hashlib.sha256(), dict[str, int]()
        for number, offset, raw in _lines(file):
            content.update(raw)
            if raw.strip():
                self._check(Entry(number, "", offset, len(raw)), raw, seen)
        self.digest = digest or content.hexdigest()

    @property
    def held(self) -> int:
        """Return the bytes that the lines take in memory."""
        return sum(ENTRY_BYTES + len(entry.id) for entry in self.entries)

    def line(self, entry: Entry) -> Line:
        """Return the request of a line."""
        self._file.seek(entry.offset)
        try:
            return parse_line(self._file.read(entry.size), unique=False)  # checked before
        except LineError as error:
            raise UsageError(f"line {entry.number}: {error}; the input changed during the run, run it again") from None

    def _check(self, entry: Entry, raw: bytes, seen: dict[str, int]) -> None:
        try:
            if entry.size > LINE_LIMIT:
                raise LineError(f"longer than {LINE_LIMIT} bytes; shorten it (the lines after it were not checked)")
            line = parse_line(raw)
            if (first := seen.setdefault(line.id, entry.number)) != entry.number:
                raise LineError(f"duplicate id {line.id!r} (first on line {first})")
        except LineError as error:
            self.bad += 1
            if len(self.problems) < TOLD:
                self.problems.append(f"line {entry.number}: {error}")
            return
        self.count += 1
        if self.shard is not None and not self.shard.has(self.count - 1):
            return
        self.entries.append(Entry(entry.number, line.id, entry.offset, entry.size))
        if line.model is not None and len(self.models) < TOLD:
            self.models.add(line.model[:100])
        self.has_system |= any(message["role"] == "system" for message in line.messages[:1])


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset and bytes of each line; one longer than the limit is cut there, and is the last."""
    file.seek(0)
    offset = number = 0
    while raw := file.readline(LINE_LIMIT + 1):
        number += 1
        yield number, offset, raw
        if len(raw) > LINE_LIMIT:
            return
        offset += len(raw)


def copy_lines(source: BinaryIO, target: BinaryIO) -> None:
    """Copy the lines of a stream, up to the first one longer than the limit."""
    while raw := source.readline(LINE_LIMIT + 1):
        target.write(raw)
        if len(raw) > LINE_LIMIT:
            return


def parse_line(raw: bytes, unique: bool = True) -> Line:
    """Return the request of a line. Raises LineError, with `unique` also for a duplicate key."""
    given = _decoded(raw, Fields, unique=unique)
    return _openai(raw, given) if OPENAI_FORM & given.keys() else _short(raw, given)


def _openai(raw: bytes, given: Fields) -> Line:
    _known(given, Envelope.__struct_fields__)
    line = _decoded(raw, Envelope)
    if line.method not in (None, "POST"):
        raise LineError(f"method {line.method[:100]!r}: must be 'POST'")
    if line.url not in (CHAT, COMPLETION):
        raise LineError(f"url {line.url[:100]!r}: must be {CHAT!r} or {COMPLETION!r}")
    return _body(_checked_id(line.custom_id), line.url, bytes(given["body"]), line.body)


def parse_body(url: str, body: bytes, own: Collection[str] = ()) -> Line:
    """Return the request in a body of OpenAI's form, without an id. Raises LineError.

    Fields of `own` are the caller's, and are not checked.
    """
    given = _decoded(body, Fields)
    return _body("", url, body, {name: value for name, value in given.items() if name not in own})


def _body(name: str, url: str, raw: bytes, given: Fields) -> Line:
    fields = CHAT_FIELDS if url == CHAT else COMPLETION_FIELDS
    _known(given, (*BODIES[url].__struct_fields__, *(field.name for field in fields)))
    return _request(name, url, raw, not_taken(fields, given))


def _short(raw: bytes, given: Fields) -> Line:
    if "id" not in given:
        raise LineError("'id' is missing (or 'custom_id', in OpenAI's form)")
    if ("prompt" in given) == ("messages" in given):
        raise LineError("give either 'prompt' or 'messages'")
    url = CHAT if "messages" in given else COMPLETION
    _known(given, ("id", *BODIES[url].__struct_fields__))
    return _request(_checked_id(str(_decoded(raw, Identity).id)), url, raw, None)


def _request(name: str, url: str, body: bytes, refused: str | None) -> Line:
    """Return the request of a body; it is refused for the reason `refused`, or for its messages or prompt."""
    asked = _decoded(body, BODIES[url])
    options = _options(asked)
    try:
        prompt = _prompt(asked) if isinstance(asked, CompletionBody) else []
        messages = _messages(asked) if isinstance(asked, ChatBody) else []
    except _Refused as reason:
        refused, prompt, messages = refused or str(reason), [], []
    return Line(name, url, prompt, messages, options, asked.model, refused)


class _Refused(Exception):
    """A prompt or message that OpenAI supports and qmix does not."""


def _checked_id(name: str) -> str:
    if not name:
        raise LineError("the id is empty")
    if (size := len(name.encode())) > LONGEST_ID:
        raise LineError(f"the id is {size} bytes; give one of at most {LONGEST_ID}")
    return name


def _prompt(asked: CompletionBody) -> str | list[int]:
    if isinstance(asked.prompt, str):
        return asked.prompt
    ids = [part for part in asked.prompt if isinstance(part, int)]
    if len(ids) == len(asked.prompt):
        return ids
    if len(asked.prompt) > 1:
        raise _Refused("prompt: one prompt per request; put each on its own line")
    return asked.prompt[0]  # type: ignore[return-value]  # a list of one text or of one list of ids


def _messages(asked: ChatBody) -> list[dict[str, str]]:
    if not asked.messages:
        raise LineError("messages: must be a list of at least one message")
    return [_message(given, f"messages[{index}]") for index, given in enumerate(asked.messages)]


def _message(given: Fields, where: str) -> dict[str, str]:
    _known(given, (*Message.__struct_fields__, *(field.name for field in MESSAGE_FIELDS)), f"{where}: ")
    message = _decoded(msgspec.json.encode(given), Message, where=where)
    if refused := not_taken(MESSAGE_FIELDS, given, f"{where}."):
        raise _Refused(refused)
    if message.role in TOOL_ROLES:
        raise _Refused(f"{where}: role {message.role!r}: qmix does not call tools; leave the message out")
    if message.role not in ROLES:
        raise LineError(f"{where}: role {message.role[:100]!r}: must be 'system', 'user' or 'assistant'")
    content = message.content if isinstance(message.content, str) else _joined(message.content, where)
    return {"role": ROLES[message.role], "content": content}


def _joined(parts: list[Part] | None, where: str) -> str:
    for index, part in enumerate(parts or ()):
        if part.type != "text":
            raise _Refused(f"{where}.content[{index}]: type {part.type[:100]!r}: the model reads text only")
    texts = [part.text for part in parts or () if part.text is not None]
    if parts is None or len(texts) < len(parts):
        raise LineError(f"{where}: content must be text, or a list of parts of type 'text'")
    return "".join(texts)


def _options(asked: ChatBody | CompletionBody) -> dict[str, Any]:
    """Return the fields of Sampling that a request sets. Raises LineError where one is out of range."""
    names = [name for name in Options.__struct_fields__ if name not in (*RENAMED, "model", "stop")]
    options = {name: value for name in names if (value := getattr(asked, name)) is not None}
    most = asked.max_tokens
    if isinstance(asked, ChatBody) and asked.max_completion_tokens is not None:
        if most is not None:
            raise LineError("give either max_tokens or max_completion_tokens")
        most = asked.max_completion_tokens
    if most is not None:
        options["max_new_tokens"] = most
    if asked.stop is not None:
        options["stop"] = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    if (logprobs := _logprobs(asked)) is not None:
        options["logprobs"] = logprobs
    if asked.response_format is not None:
        options["json_schema"] = _json_schema(asked.response_format)
    try:
        Sampling(**options)
    except UsageError as error:
        told = str(error)
        for name, ours in RENAMED.items():
            told = told.replace(ours, name, 1)
        raise LineError(told) from None
    return options


def _json_schema(form: ResponseFormat) -> str | None:
    """Return the schema of a `response_format`, None for any text."""
    if (form.type == "json_schema") != (form.json_schema is not None):
        raise LineError("response_format: 'json_schema' has the schema of the type 'json_schema', and of no other")
    if form.json_schema is not None:
        return bytes(form.json_schema.schema).decode()
    return JSON_OBJECT if form.type == "json_object" else None


def _logprobs(asked: ChatBody | CompletionBody) -> int | None:
    if isinstance(asked, CompletionBody):
        return _count("logprobs", asked.logprobs)
    if asked.top_logprobs and not asked.logprobs:
        raise LineError("top_logprobs: needs logprobs to be true")
    most = _count("top_logprobs", asked.top_logprobs) or 0
    return most if asked.logprobs else None


def _count(name: str, count: int | None) -> int | None:
    if count is not None and not RANGES["logprobs"].holds(count):
        raise LineError(f"{name} {count}: must be {RANGES['logprobs'].wanted}")
    return count


def _decoded(data: bytes, kind: type[T], where: str = "", unique: bool = False) -> T:
    """Return JSON as `kind`. Raises LineError with the place of the failure, which starts with `where`."""
    try:
        return decode_json(data, kind, where, LineError, unique=unique)
    except LineError as error:
        raise LineError(str(error).removeprefix(": ")) from None


def _known(given: Fields, names: Collection[str], where: str = "") -> None:
    """Raise LineError where fields are unknown, with the nearest known names."""
    problems = []
    for name in given:
        if name not in names:
            near = get_close_matches(name[:100], names, 1)
            problems.append(f"unknown field {name[:100]!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if problems:
        raise LineError(where + ", ".join(problems[:TOLD]))
