"""The file of answers, from which an interrupted run continues. Loads no torch.

Its lines are whole and on the disk; one run at a time writes it. OUT.jsonl.qmix.json beside OUT.jsonl holds what the
answers belong to: input, model, options. It is written before the first answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol

import msgspec

from qmix.errors import DiskError, QmixError, UsageError, arg
from qmix.files import LineFile, convert_json, decode_json, read_json, write_whole

SCHEMA = "qmix-batch-1"
COMPUTED_ON = "computed on"  # in a subject: the processors
SHARD = "shard"  # in a subject: the part of the input
LONGEST_LINE = 256 * 2**20  # bytes: twice an answer of 65,536 tokens with 20 logprobs each
ELSEWHERE = "choose another name for the answers"


class AnswerLine(msgspec.Struct, frozen=True):
    """The fields of an answer that are read back."""

    custom_id: str
    error: dict[str, msgspec.Raw] | None


class Choices(msgspec.Struct, frozen=True):
    """The choices that a run takes over from an earlier one."""

    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    created: int


class Manifest(msgspec.Struct, frozen=True):
    """The run that answers belong to. `lines` is the number of requests, 0 in files of older versions."""

    subject: dict[str, Any]
    chosen: Choices
    lines: Annotated[int, msgspec.Meta(ge=0)] = 0


class Answers(Protocol):
    """A destination of answers. `done` are the ids that have a line, `refused` is the number of errors among them.

    `lasting` is true where a later run finds the answers.
    """

    @property
    def done(self) -> Collection[str]: ...
    @property
    def refused(self) -> int: ...
    @property
    def lasting(self) -> bool: ...

    def begin(self, subject: Mapping[str, Any], chosen: Mapping[str, Any], lines: int) -> dict[str, Any]:
        """Take in what the answers belong to, and return the choices of this run: those of an earlier part, if any."""

    def append(self, lines: list[bytes]) -> None: ...


class StreamAnswers:
    """Answers written to a stream, which a later run cannot read."""

    lasting = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.done: Collection[str] = ()
        self.refused = 0

    def begin(self, subject: Mapping[str, Any], chosen: Mapping[str, Any], lines: int) -> dict[str, Any]:
        return dict(chosen)

    def append(self, lines: list[bytes]) -> None:
        try:
            self._stream.write(b"".join(lines))
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise QmixError(f"stdout: {error.strerror}; choose another output") from None


class FileAnswers:
    """Answers in a file, locked by one run at a time; close it, or use it as a context manager.

    A truncated last line is dropped. Raises UsageError where the file is not the output of this batch, QmixError where
    it cannot be written.
    """

    lasting = True

    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, manifest_path(path)
        if not self.manifest.exists() and _is_cut(path):  # opening would drop its last line
            raise self._strange()
        self._file = LineFile(path, "choose another place for the answers")
        try:
            self.done, self.refused = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> FileAnswers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def begin(self, subject: Mapping[str, Any], chosen: Mapping[str, Any], lines: int) -> dict[str, Any]:
        """Return the choices of this run: those of the file if it has answers, else `chosen`, which is written.

        `lines` is the number of requests. Raises UsageError where the file has answers to another `subject`: other
        input, model or options.
        """
        known = self.known()
        if known is None and self.done:
            raise self._strange()
        if known is not None and self.done:
            if differs := differences(known.subject, subject):
                raise UsageError(
                    f"{self.path}: has answers from another run ({differs}); use the options of that run, "
                    "choose another name, or delete it"
                )
            return msgspec.structs.asdict(known.chosen)
        write_manifest(self.manifest, subject, chosen, lines)
        return dict(chosen)

    def append(self, lines: list[bytes]) -> None:
        """Append lines, and return when they are on the disk."""
        self._file.append(lines)

    def add(self, lines: Mapping[str, bytes]) -> None:
        """Append the lines of these ids that have none yet, and return when they are on the disk."""
        new = {name: line for name, line in lines.items() if name not in self.done}
        self.append(list(new.values()))
        self.done.update(new)
        self.refused += sum(answer_of(line, str(self.path)).error is not None for line in new.values())

    def _strange(self) -> UsageError:
        return UsageError(f"{self.path}: exists without its {self.manifest.name}; choose another name, or delete it")

    def _read(self) -> tuple[set[str], int]:
        """Return the ids that have a line, and the number of errors among them."""
        done: set[str] = set()
        refused = 0
        for number, raw in enumerate(self._file.lines(LONGEST_LINE), 1):
            answer = answer_of(raw, f"{self.path}: line {number}")
            done.add(answer.custom_id)
            refused += answer.error is not None
        return done, refused

    def known(self) -> Manifest | None:
        """Return what the file's answers belong to, None where that was never written. Raises UsageError."""
        if not self.manifest.exists():
            return None
        content = read_json(self.manifest, dict[str, Any], UsageError, ELSEWHERE)
        if content.get("schema") != SCHEMA:
            raise UsageError(f"{self.manifest}: from another version of qmix; {ELSEWHERE}")
        return convert_json(content, Manifest, str(self.manifest), UsageError, ELSEWHERE)


def _is_cut(path: Path) -> bool:
    """Return True if a regular file's last line has no end."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def answer_of(raw: bytes, where: str) -> AnswerLine:
    """Return the fields of a line of answers. Raises UsageError, with `where` the line is."""
    what = f"{where} is not an answer of a batch"
    return decode_json(raw, AnswerLine, what, UsageError, "choose another name, or delete the file")


def manifest_path(output: Path) -> Path:
    """Return where it lies what the answers of a file belong to."""
    return output.with_name(output.name + ".qmix.json")


def write_manifest(path: Path, subject: Mapping[str, Any], chosen: Mapping[str, Any], lines: int) -> None:
    """Write what answers belong to. Raises QmixError."""
    content = {"schema": SCHEMA, "subject": dict(subject), "chosen": dict(chosen), "lines": lines}
    try:
        write_whole(path, json.dumps(content).encode())
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}; nothing was run") from None


def differences(known: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return how two runs differ: options with both values, files by name."""
    found = []
    for name in [*known, *(name for name in asked if name not in known)]:
        was, now = known.get(name), asked.get(name)
        if was != now:
            if _is_checksum(was) and _is_checksum(now):
                found.append(f"another {name}")
            elif _is_checksum(was or now) and not (was and now):
                found.append(f"now {'without' if was else 'with'} {name}")
            else:
                option = arg(name[2:].replace("-", "_")) if name.startswith("--") else name
                found.append(f"{option} {json.dumps(was)}, now {json.dumps(now)}")
    return "; ".join(found)


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64
