"""Runs of the quantiser in processes of their own that are killed (SIGKILL), by what they have noted or at a point.

Importing torch takes seconds, so one process imports everything once and forks for every run. In a fork
chunks are small and slow and the journal is flushed all the time, so that a tiny checkpoint has many moments
to be killed at.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import LIMIT_SECONDS
from killed_batches import lines_of

CHUNK_WEIGHTS = 2048
CHUNK_SECONDS = 0.001
FLUSH_SECONDS = 0.004
POLL_SECONDS = 0.001


class Runs:
    """Starts runs, one at a time; close it when done."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(LIMIT_SECONDS)

    def __call__(self, checkpoint: Path, store: Path, precision: str, **kill: Any) -> int:
        """The exit status, -9 if it was killed: `after` seconds, counted from where its journal has so many `lines`, or
        `at` the `count`th call of something."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {"checkpoint": str(checkpoint), "store": str(store), "precision": precision, "kill": kill}
        self._server.stdin.write(json.dumps(request) + "\n")
        return int(self._server.stdout.readline())


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _torn_write(write: Callable[..., Any]) -> Callable[..., Any]:
    def half(writer: Any, file: Any, data: Any, offset: int) -> None:
        write(writer, file, memoryview(data)[: len(data) // 2], offset)
        _die()

    return half


def _torn_journal(append: Callable[..., Any]) -> Callable[..., Any]:
    def half(journal: Any, entries: list[Any]) -> None:
        from qmix.store.journal import encoded

        os.write(journal._file.fileno(), b"".join(map(encoded, entries))[:-7])
        _die()

    return half


def _torn_file(write_bytes: Callable[..., Any]) -> Callable[..., Any]:
    def half(path: Path, data: bytes) -> None:
        write_bytes(path, data[: len(data) // 2])
        _die()

    return half


def _instead(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_: _die()


def _behind(done: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: (done(*args), _die())


def _arm(at: str, count: int) -> None:
    """Make the `count`th call of a function the last thing that this process does."""
    from qmix.store.journal import Journal
    from qmix.store.writer import StoreWriter

    owner, name, fatal = {
        "write": (StoreWriter, "write", _torn_write),
        "journal": (Journal, "append", _torn_journal),
        "digest": (StoreWriter, "unit_digested", _instead),
        "small file": (Path, "write_bytes", _torn_file),
        "before the rename": (Path, "rename", _instead),
        "after the rename": (Path, "rename", _behind),
    }[at]
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def counted(*args: Any, **kwargs: Any) -> Any:
        return (fatal(original) if next(calls) == count else original)(*args, **kwargs)

    setattr(owner, name, counted)


def _run(checkpoint: str, store: str, precision: str, kill: dict[str, Any]) -> None:
    from stores import make_store

    from qmix.store import weight_run
    from qmix.store import writer as store_writer

    weight_run.CHUNK_WEIGHTS, store_writer.FLUSH_SECONDS = CHUNK_WEIGHTS, FLUSH_SECONDS
    rows = weight_run.WeightFile.rows
    weight_run.WeightFile.rows = lambda *args: time.sleep(CHUNK_SECONDS) or rows(*args)
    if "at" in kill:
        _arm(kill["at"], kill.get("count", 1))
    make_store(Path(checkpoint), Path(store), precision)


def _warm_up() -> None:
    """Load what every fork needs, the compiled kernels included."""
    import stores  # noqa: F401
    import torch

    from qmix.precision.quantizer import MatrixQuantizer

    for precision, rows, cols in (("nf4", 32, 64), ("nf4", 2, 3), ("int8", 2, 3)):
        weights = torch.ones(rows, cols, dtype=torch.bfloat16)
        MatrixQuantizer(precision, "bf16", rows, cols, "").quantize(weights, 0)


def _serve() -> None:
    _warm_up()
    gc.freeze()  # or each fork's first collection would copy every page
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _run(**request)
                status = 0
            finally:
                os._exit(status)
        if "lines" in request["kill"]:
            _kill_when_noted(child, Path(f"{request['store']}.partial") / "journal.jsonl", **request["kill"])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _kill_when_noted(child: int, journal: Path, lines: int, after: float) -> None:
    """Wait until a journal has so many lines, and `after` seconds; a run that ends by then is left alone."""
    while lines_of(journal) < lines and _runs(child):
        time.sleep(POLL_SECONDS)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)  # of one that has ended nothing is left to kill


def _runs(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


if __name__ == "__main__":
    _serve()
