"""Read and write small files: bounded and typed JSON, files of whole lines, replacement in one step. Loads no torch.

All JSON that qmix reads goes through `decode_json`: the size is bounded before anything is parsed, and msgspec checks
syntax, UTF-8, numbers, nesting and the types that the caller states. Failures are the caller's QmixError, with the
file, the place in it and one thing to do.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from qmix.disk.faults import disk_advice
from qmix.errors import QmixError, UsageError

JSON_LIMIT = 64 * 2**20  # bytes of one JSON file: ten times the manifest of the largest Mixtral
TEXT_LIMIT = 4 * 2**20  # bytes of one text of a user's: some ten times what fits the longest context of a Mixtral
T = TypeVar("T")


def read_bounded(path: Path, limit: int, error: type[QmixError], remedy: str, where: str = "") -> bytes:
    """Return a file's bytes. Raises `error` where it cannot be read or is larger than `limit` bytes.

    Endless files such as /dev/zero are refused after `limit` bytes. `where` starts the message of a failure in place of
    the path.
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
    """Return a user's text, its lines ended by newlines. Raises UsageError where it is too large, or not UTF-8.

    `where` starts the message of a failure in place of the path.
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
    """Return one JSON value as `kind`; `where` (a file, a line) starts the message of a failure.

    Refuses what Python's json would let through: NaN, numbers beyond a float, lone surrogates, wrong types, nesting
    beyond the interpreter's limit; with `unique` also a key given twice in an object. A byte order mark is skipped.
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
    """Return a value that was decoded already as `kind`; failures as those of `decode_json`."""
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
    """Return `$.KEY` for the key of an object whose value no type can hold: msgspec itself says `$[...]` there."""
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
    """Return what msgspec's 'JSON is malformed: invalid character (byte 5)' means.

    Half of a surrogate pair, which is no text, has a message there that says something else.
    """
    with suppress(ValueError, RecursionError):
        try:
            json.dumps(json.loads(data), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "an unpaired surrogate"
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


class _Versioned(msgspec.Struct):
    schema: Any = None


def read_versioned(path: Path, kind: type[T], schema: str, what: str, again: str) -> T:
    """Return the content of a JSON file that names its schema, as `kind`.

    Raises UsageError naming the file where it is not `what`; `again` says what to do about one of another schema or one
    that is damaged.
    """
    data = read_bounded(path, JSON_LIMIT, UsageError, f"is it {what}?")
    found = decode_json(data, _Versioned, str(path), UsageError, f"is it {what}?").schema
    if found != schema:
        raise UsageError(f"{path}: schema {str(found)[:100]!r}, this qmix reads {schema!r}; {again}")
    return decode_json(data, kind, str(path), UsageError, again)


class LineFile:
    """Lines that are added for good; close it, or use it as a context manager.

    Raises QmixError, which says what to do (`elsewhere`), where the file cannot be opened or another has it open, and
    UsageError where it is a device, a pipe, or anything else that does not keep what is written.
    """

    def __init__(self, path: Path, elsewhere: str) -> None:
        self.path = path
        try:
            if path.exists() and not path.is_file():  # before it is opened: that may have an effect, or wait
                raise UsageError(f"{path}: not a regular file; {elsewhere}")
            self._file = path.open("a+b")
        except OSError as error:
            raise QmixError(f"{path}: {error.strerror}; {elsewhere}") from None
        self._end = 0
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise QmixError(f"{path}: another qmix process is writing it; wait until it ends") from None

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def lines(self, limit: int = JSON_LIMIT) -> Iterator[bytes]:
        """The lines that are there; read to the end, a last one that was cut off is dropped from the file.

        A line of more than `limit` bytes is cut there, has no end then, and nothing is dropped where one was yielded.
        """
        self._end = 0
        self._file.seek(0)
        while raw := self._file.readline(limit + 1):
            if len(raw) > limit:
                yield raw
                return
            if not raw.endswith(b"\n"):
                break
            yield raw
            self._end += len(raw)
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
                f"{self.path}: {error.strerror}; {disk_advice(error)}. Run the same command again to continue"
            ) from None
        self._end += len(data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file.fileno(), view) :]


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place at once, on the disk with its name. Raises OSError, and leaves nothing then."""
    with written_whole(path) as file:
        file.write(content)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once all of it is on the disk; nothing changes there before.

    It is written under one scratch name beside `path`, by one process at a time: what a killed run leaves there is
    taken over by the next that writes this file. Raises OSError, also where there is something that is no file: a
    device must not be replaced by one.
    """
    target = path.resolve()  # what a link points to is replaced, not the link
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with scratch_file(target.with_name(f".{target.name[:200]}.new")) as (scratch, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        scratch.replace(target)
    sync(target.parent)


@contextmanager
def scratch_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """An empty file under a name that is the same in every run, for one process at a time; it is deleted afterwards.

    Waits for a process that has it. What a killed run left is taken over. Raises OSError.
    """
    file = _held(path)
    try:
        yield path, file
    finally:
        if leads_to(path, file):
            path.unlink()
        file.close()


def _held(scratch: Path) -> BinaryIO:
    while True:
        file = os.fdopen(os.open(scratch, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if leads_to(scratch, file):
                file.truncate(0)
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the other has put it in its place, or deleted it


def leads_to(path: Path, file: BinaryIO) -> bool:
    """Return whether the open file is what lies at `path`: another process may have moved or replaced it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Return when a file or directory is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
