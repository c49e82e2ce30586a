"""One request, checked field by field. Loads no torch.

It has OpenAI's form (`custom_id`, `method`, `url`, `body`) or the short one (`id`, `prompt` or `messages`, and
options). Invalid JSON, types, ranges, ids and unknown fields are errors. OpenAI's fields that qmix does not support
are known: the request is valid, and refused for a reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar

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
from qmix.engine.sampling import RANGES, Sampling
from qmix.errors import UsageError
from qmix.files import decode_json

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, type[ChatBody | CompletionBody]] = {CHAT: ChatBody, COMPLETION: CompletionBody}
OPENAI_FORM = {"custom_id", "method", "url", "body"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
LONGEST_ID = 512  # bytes
MOST_PROBLEMS = 20  # unknown fields that a message names
RENAMED = {"max_tokens": "max_new_tokens", "response_format": "json_schema"}  # OpenAI's names of Sampling's fields
JSON_OBJECT = '{"type": "object"}'
T = TypeVar("T")


class LineError(UsageError):
    """An invalid line; the text follows the line's number."""


@dataclass(frozen=True, slots=True)
class Line:
    """A request: `messages` to answer, or, if empty, a `prompt` (text or ids) to continue.

    `options` are the fields of Sampling that the line sets. `model` is the model that the line asks for. `refused` is
    the reason why qmix cannot answer the request, None where the line has no such reason. `tools` are shown to the
    model.
    """

    id: str
    url: str
    prompt: str | list[int]
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    model: str | None = None
    refused: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)


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
        raise LineError(where + ", ".join(problems[:MOST_PROBLEMS]))
