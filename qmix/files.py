"""Read and write small files: bounded and typed JSON, files of whole lines, replacement in one step. Loads no torch.

All JSON that qmix reads goes through `decode_json`: the size is bounded before anything is parsed, and msgspec checks
syntax, UTF-8, numbers, nesting and the types that the caller states. Failures are the caller's QmixError, with the
file, the place in it and one thing to do.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qmix.disk import disk_advice
from qmix.errors import QmixError, UsageError

JSON_LIMIT = 64 * 2**20  # bytes of one JSON file: ten times the manifest of the largest Mixtral
T = TypeVar("T")


def read_bounded(path: Path, limit: int, error: type[QmixError], remedy: str) -> bytes:
    """Return a file's bytes. Raises `error` where it cannot be read or is larger than `limit` bytes.

    Endless files such as /dev/zero are refused after `limit` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the name
        raise error(f"{path}: {getattr(failure, 'strerror', None) or failure}; {remedy}") from None
    if len(data) > limit:
        raise error(f"{path}: larger than {limit} bytes; {remedy}")
    return data


def read_json(path: Path, kind: type[T], error: type[QmixError], remedy: str, limit: int = JSON_LIMIT) -> T:
    """Return the content of a JSON file as `kind`: a msgspec.Struct, dict[str, Any], or any type msgspec knows.

    Raises `error` naming the file, the place and `remedy`.
    """
    return decode_json(read_bounded(path, limit, error, remedy), kind, str(path), error, remedy)


def decode_json(
    data: bytes, kind: type[T], where: str, error: type[QmixError], remedy: str = "", unique: bool = False
) -> T:
    """Return one JSON value as `kind`; `where` (a file, a line) starts the message of a failure.

    Refuses what Python's json would let through: NaN, numbers beyond a float, lone surrogates, wrong types, nesting
    beyond the interpreter's limit; with `unique` also a key given twice in an object. A byte order mark is skipped.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        data.decode()  # msgspec leaves the text of fields that `kind` does not name unchecked
        value = msgspec.json.decode(data, type=kind)
        if unique:
            json.loads(data, object_pairs_hook=_unique)
        return value
    except msgspec.ValidationError as failure:
        what = _misfit(str(failure))
    except UnicodeDecodeError as failure:
        what = f"invalid JSON: not UTF-8 (byte {failure.start + 1})"
    except RecursionError:
        what = "invalid JSON: nested too deeply"
    except _DuplicateKey as failure:
        what = f"invalid JSON: the key {failure.args[0]!r} is given twice"
    except ValueError as failure:
        what = f"invalid JSON: {_plain(str(failure))}"
    raise error(f"{where}: {what}" + (f"; {remedy}" if remedy else "")) from None


class _DuplicateKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(key[:100])
        found[key] = value
    return found


def _misfit(message: str) -> str:
    """Return msgspec's 'Expected `int`, got `str` - at `$.moe.num_experts`' with the place first."""
    what, _, place = message.partition(" - at `$")
    what = what.replace("`", "")
    what = what[:1].lower() + what[1:]
    path = place.rstrip("`").removeprefix(".")
    return f"{path}: {what}" if path else what


def _plain(message: str) -> str:
    """Return msgspec's 'JSON is malformed: invalid character (byte 5)' without its first words."""
    return re.sub(r"^JSON is malformed: ", "", message)


def read_state(path: Path, kind: type[T]) -> T | None:
    """Return the content of one of the user's own cache or state files, None where there is none.

    What cannot be read is set aside as `NAME.unreadable`, so that it is made anew and never stops a command.
    """
    try:
        return read_json(path, kind, _UnreadableState, "")
    except _UnreadableState:
        with suppress(OSError):
            path.replace(path.with_name(f"{path.name}.unreadable"))
        return None


class _UnreadableState(QmixError):
    pass


def read_object(path: Path, schema: str, what: str, again: str) -> dict[str, Any]:
    """Return the object in a file. Raises UsageError naming it where it is not `what`; `again` says what to do."""
    content = read_json(path, dict[str, Any], UsageError, f"is it {what}?")
    found = content.get("schema")
    if found != schema:
        raise UsageError(f"{path}: schema {found!r}, this qmix reads {schema!r}; {again}")
    return content


class LineFile:
    """Lines that are added for good; close it, or use it as a context manager.

    Raises QmixError, which says what to do (`elsewhere`), where the file cannot be opened or another has it open.
    """

    def __init__(self, path: Path, elsewhere: str) -> None:
        self.path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise QmixError(f"{path}: {error.strerror}; {elsewhere}") from None
        self._end = 0
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise QmixError(f"{path}: another qmix is writing it; wait until that one ends") from None

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def lines(self) -> Iterator[bytes]:
        """The lines that are there; read to the end, a last one that was cut off is dropped from the file."""
        self._end = 0
        self._file.seek(0)
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            yield raw
            self._end += len(raw)
        with suppress(OSError):  # what is no real file has no end to cut
            os.ftruncate(self._file.fileno(), self._end)

    def append(self, lines: list[bytes]) -> None:
        """Add lines, and return when they are on the disk. What cannot be written whole is taken back."""
        data = b"".join(lines)
        try:
            self._write(data)
            os.fsync(self._file.fileno())
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._end)
            if not isinstance(error, OSError):
                raise
            raise QmixError(
                f"{self.path}: {error.strerror}; {disk_advice(error)}. What is in it is whole, and the same command "
                "goes on from there"
            ) from None
        self._end += len(data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file.fileno(), view) :]


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place at once, on the disk with its name. Raises OSError, and leaves nothing then."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
