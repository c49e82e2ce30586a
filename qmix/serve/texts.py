"""Messages of other interfaces as OpenAI's chat completions have them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any

import msgspec

from qmix.batch.openai import Field, not_taken
from qmix.batch.prompts import LineRefused
from qmix.batch.request import LineError
from qmix.batch.schema import Fields

Message = dict[str, Any]
PLAIN = {"role", "content"}


def check_fields(given: Fields, known: Collection[str], neutral: Collection[Field], where: str = "") -> None:
    """Raise LineError for a field that is unknown, LineRefused for one whose value is not supported."""
    names = [*known, *(field.name for field in neutral)]
    for name in given:
        if name not in names:
            near = get_close_matches(name[:100], names, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise LineError(f"{where}unknown field {name[:100]!r}{hint}")
    if refused := not_taken(neutral, given, where):
        raise LineRefused(refused)


def text_of(content: Any, kinds: Collection[str], where: str) -> str:
    """Return the text of a content: a text, or a list of blocks of these kinds, each with a `text`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise LineError(f"{where}: must be text, or a list of blocks of type {' or '.join(kinds)}")
    texts = []
    for index, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in kinds:
            raise LineRefused(f"{where}[{index}]: type {str(kind)[:100]!r}: the model reads text only")
        if not isinstance(block.get("text"), str):
            raise LineError(f"{where}[{index}].text: must be text")
        texts.append(block["text"])
    return "\n".join(texts)


def joined(messages: Iterable[Message]) -> list[Message]:
    """Return messages with those of one role in a row made one, as templates want them."""
    found: list[Message] = []
    for message in messages:
        if found and found[-1]["role"] == message["role"] and found[-1].keys() == message.keys() == PLAIN:
            found[-1] = {**message, "content": found[-1]["content"] + "\n\n" + message["content"]}
        else:
            found.append(message)
    return found


def decoded(raw: msgspec.Raw | bytes) -> Any:
    """Return a value's JSON decoded. Raises LineError where a number is out of range."""
    try:
        return msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise LineError(f"invalid JSON: {error}") from None
