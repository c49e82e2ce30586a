"""Results of single requests on disk, under a digest of model, context and tokens. Loads no torch.

A kept result is never computed again, whichever task or run needs it.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from qmix.errors import QmixError, UsageError, arg
from qmix.files import LineFile, decode_json
from qmix.store.opened import Store

FORMAT = "qmix-eval-requests-1"  # part of every key: changes when results are computed in another way
REQUESTS = "requests.jsonl"
KEY_BYTES = 16
AGAIN = f"choose another {arg('output')}, or delete the file"


class _Line(msgspec.Struct):
    key: str
    result: list[bool | int | float]  # [log-probability, greedy] of a continuation, or the ids of an answer


class Results:
    """The results of one model in a directory. Use it as a context manager.

    Raises QmixError if the directory cannot be used, UsageError if its file holds anything but results.
    """

    def __init__(self, directory: Path, model: str) -> None:
        """`model` is the digest of `identity`."""
        self._model = model.encode()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QmixError(f"{directory}: {error.strerror}; choose another {arg('output')}") from None
        self._file = LineFile(directory / REQUESTS, f"choose another {arg('output')}")
        try:
            self._values = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def key(self, *parts: bytes) -> bytes:
        """Return the key of a request's result."""
        lengths = b",".join(b"%d" % len(part) for part in parts)
        return hashlib.sha256(b"\n".join((self._model, lengths, *parts))).digest()[:KEY_BYTES]

    def get(self, key: bytes) -> Any:
        """Return a result, or None."""
        return self._values.get(key)

    def add(self, values: dict[bytes, Any]) -> None:
        """Keep results, as JSON values; they are on disk when this returns."""
        self._file.append(
            [json.dumps({"key": key.hex(), "result": value}).encode() + b"\n" for key, value in values.items()]
        )
        self._values |= values

    def _read(self) -> dict[bytes, Any]:
        found: dict[bytes, Any] = {}
        for number, raw in enumerate(self._file.lines(), 1):
            where = f"{self._file.path}: line {number} is not a result of an evaluation"
            line = decode_json(raw, _Line, where, UsageError, AGAIN)
            if not re.fullmatch(f"[0-9a-f]{{{2 * KEY_BYTES}}}", line.key):
                raise UsageError(f"{where}: key: expected {2 * KEY_BYTES} hex digits; {AGAIN}")
            found[bytes.fromhex(line.key)] = line.result
        return found


def identity(store: Store, where: str) -> str:
    """Return a digest of all that determines a result besides the request: the store, and the processors' names."""
    return hashlib.sha256(f"{FORMAT} {store.digest} {where}".encode()).hexdigest()
