"""Bounded reading of texts and typed JSON.

All JSON that qmix reads goes through `decode_json`: the size is bounded before anything is parsed, and msgspec checks
syntax, UTF-8, numbers, nesting and the types that the caller states. Failures are the caller's QmixError, with the
file, the place in it and one thing to do.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qmix.errors import QmixError, UsageError

JSON_LIMIT = 64 * 2**20  # bytes of one JSON file: ten times the manifest of the largest Mixtral
TEXT_LIMIT = 4 * 2**20  # bytes of one text from a user: ten times what fits the longest context of a Mixtral
T = TypeVar("T")


def read_bounded(path: Path, limit: int, error: type[QmixError], remedy: str, where: str = "") -> bytes:
    """Return a file's bytes. Raises `error` where it cannot be read or is larger than `limit` bytes.

    Endless files such as /dev/zero are refused after `limit` bytes. `where` replaces the path in messages.
    """
    where = where or str(path)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the name
        raise error(f"{where}: {getattr(failure, 'strerror', None) or failure}; {remedy}") from None
    if len(data) > limit:
        raise error(f"{where}: larger than {limit} bytes; {remedy}")
    return data


def read_text(path: Path, where: str = "") -> str:
    """Return a user's text with newlines as line ends. Raises UsageError where it is too large, or not UTF-8.

    `where` replaces the path in messages.
    """
    remedy = f"give a text file of at most {TEXT_LIMIT >> 20} MiB"
    data = read_bounded(path, TEXT_LIMIT, UsageError, remedy, where).removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as failure:
        raise UsageError(f"{where or path}: not UTF-8 text (byte {failure.start}); save it as UTF-8") from None


def read_json(path: Path, kind: type[T], error: type[QmixError], remedy: str, limit: int = JSON_LIMIT) -> T:
    """Return the content of a JSON file as `kind`: a msgspec.Struct, dict[str, Any], or any type msgspec knows.

    Raises `error` naming the file, the place and `remedy`.
    """
    return decode_json(read_bounded(path, limit, error, remedy), kind, str(path), error, remedy)


def decode_json(
    data: bytes, kind: type[T], where: str, error: type[QmixError], remedy: str = "", unique: bool = False
) -> T:
    """Return one JSON value as `kind`. Raises `error` with a message that starts with `where` (a file, a line).

    Refuses values that Python's json accepts: NaN, numbers beyond a float, lone surrogates, wrong types, nesting beyond
    the interpreter's limit; with `unique` also duplicate keys in an object. A byte order mark is skipped.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        data.decode()  # msgspec leaves the text of fields that `kind` does not name unchecked
        value = msgspec.json.decode(data, type=kind)
        if unique:
            json.loads(data, object_pairs_hook=_unique, parse_int=str, parse_float=str)  # only keys are looked at
        return value
    except msgspec.ValidationError as failure:
        what = _misfit(str(failure).replace("$[...]", _key_at_fault(data), 1))
    except UnicodeDecodeError as failure:
        what = f"invalid JSON: not UTF-8 (byte {failure.start + 1})"
    except RecursionError:
        what = "invalid JSON: nested too deeply"
    except _DuplicateKey as failure:
        what = f"invalid JSON: the key {failure.args[0]!r} is given twice"
    except ValueError as failure:
        what = f"invalid JSON: {_syntax(data, str(failure))}"
    raise error(f"{where}: {what}" + (f"; {remedy}" if remedy else "")) from None


def convert_json(value: Any, kind: type[T], where: str, error: type[QmixError], remedy: str = "") -> T:
    """Return an already decoded value as `kind`. Raises what `decode_json` raises."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as failure:
        raise error(f"{where}: {_misfit(str(failure))}" + (f"; {remedy}" if remedy else "")) from None


class _DuplicateKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(key[:100])
        found[key] = value
    return found


def _key_at_fault(data: bytes) -> str:
    """Return `$.KEY` for the key whose value no type can hold; msgspec itself names it `$[...]`."""
    with suppress(ValueError, RecursionError):
        for key, raw in msgspec.json.decode(data, type=dict[str, msgspec.Raw]).items():
            try:
                msgspec.json.decode(raw)
            except msgspec.ValidationError:
                return f"$.{key[:100]}"
    return "$[...]"


def _misfit(message: str) -> str:
    """Return msgspec's 'Expected `int`, got `str` - at `$.moe.num_experts`' with the place first."""
    what, _, place = message.partition(" - at `$")
    what = what.replace("`", "")
    what = what[:1].lower() + what[1:]
    path = place.rstrip("`").removeprefix(".")
    return f"{path}: {what}" if path else what


def _syntax(data: bytes, message: str) -> str:
    """Return the reason in msgspec's 'JSON is malformed: invalid character (byte 5)'.

    Its message for half of a surrogate pair is misleading, and is replaced.
    """
    with suppress(ValueError, RecursionError):
        try:
            json.dumps(json.loads(data), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "an unpaired surrogate"
    return re.sub(r"^JSON is malformed: ", "", message)


def read_state(path: Path, kind: type[T]) -> T | None:
    """Return the content of a cache or state file of qmix, None where there is none.

    An unreadable file is renamed to `NAME.unreadable`, so that it is made anew and never stops a command.
    """
    try:
        return read_json(path, kind, _UnreadableState, "")
    except _UnreadableState:
        with suppress(OSError):
            path.replace(path.with_name(f"{path.name}.unreadable"))
        return None


class _UnreadableState(QmixError):
    pass


class _Versioned(msgspec.Struct):
    schema: Any = None


def read_versioned(path: Path, kind: type[T], schema: str, what: str, again: str) -> T:
    """Return the content of a JSON file that names its schema, as `kind`.

    Raises UsageError naming the file where it is not `what`; `again` is the advice where its schema is another or it is
    damaged.
    """
    data = read_bounded(path, JSON_LIMIT, UsageError, f"is it {what}?")
    found = decode_json(data, _Versioned, str(path), UsageError, f"is it {what}?").schema
    if found != schema:
        raise UsageError(f"{path}: schema {str(found)[:100]!r}, this qmix reads {schema!r}; {again}")
    return decode_json(data, kind, str(path), UsageError, again)
