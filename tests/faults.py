"""A disk that fails: system calls on files whose path matches raise, or give other bytes, so many times.

`install` replaces the calls in this process; faults come from `FAULTS` in its environment, JSON of `Fault`s, so that
forks of `tests/command.py` (which import this module) can be given some of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Fault:
    """`call` on a file whose path ends with `path` fails with `errno` (0: gives flipped bytes), `times` times.

    With `offset`, only calls whose range includes that byte; `seen` counts the calls that matched.
    """

    call: str
    path: str
    errno: int
    times: int = 10**6
    offset: int | None = None
    seen: int = 0

    def matches(self, fd: int, nbytes: int, offset: int | None) -> bool:
        with suppress(OSError):
            path = str(Path(f"/proc/self/fd/{fd}").readlink())
            at_place = self.offset is None or offset is None or offset <= self.offset < offset + nbytes
            return path.endswith(self.path) and at_place
        return False


installed: list[Fault] = []


def environment(*faults: Fault) -> dict[str, str]:
    """Return the environment in which a command meets these faults."""
    return {"FAULTS": json.dumps([asdict(fault) for fault in faults])}


def _current(call: str) -> list[Fault]:
    if not installed and "FAULTS" in os.environ:
        installed.extend(Fault(**each) for each in json.loads(os.environ["FAULTS"]))
    return [fault for fault in installed if fault.call == call]


def wrapped(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """A call of `os` by this name that its faults befall."""

    def faulty(fd: int, *arguments: Any) -> Any:
        offset = arguments[1] if len(arguments) > 1 else None
        data = arguments[0][0] if call == "preadv" else arguments[0] if arguments else b""
        nbytes = len(data) if hasattr(data, "__len__") else 0
        for fault in _current(call):
            if not fault.matches(fd, nbytes, offset):
                continue
            fault.seen += 1
            if fault.seen > fault.times:
                continue
            if fault.errno:
                raise OSError(fault.errno, os.strerror(fault.errno))
            count = real(fd, *arguments)
            data[(fault.offset or 0) - (offset or 0)] ^= 1
            return count
        return real(fd, *arguments)

    return faulty


def install(monkeypatch: Any | None = None) -> None:
    """Replace the calls; for the test alone with pytest's `monkeypatch`, else for good."""
    for call in ("preadv", "pwrite", "write", "fsync", "ftruncate"):
        replacement = wrapped(call, getattr(os, call))
        if monkeypatch is None:
            setattr(os, call, replacement)
        else:
            monkeypatch.setattr(os, call, replacement)


if os.environ.get("QMIX_FAULTY_DISK"):  # in the process that forks commands
    install()
