"""`qmix batch` or `eval` in processes that are killed (SIGKILL) once their output has so many more lines, or after some
time.

Importing torch takes seconds, so one process imports everything once and forks for every run.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from command import LIMIT_SECONDS

POLL_SECONDS = 0.001


class Batches:
    """Starts runs of a command, one at a time; close it when done. `preloaded` is a module imported once besides.

    The lines that are counted are those of the output, or of the file `within` it.
    """

    def __init__(
        self,
        environment: dict[str, str],
        command: str = "batch",
        preloaded: str = "qmix.batch.session",
        within: str = "",
    ) -> None:
        self._command, self._within = command, within
        self._server = subprocess.Popen(
            [sys.executable, __file__, preloaded],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(LIMIT_SECONDS)

    def __call__(self, output: Path, *argv: str | Path, after: float = LIMIT_SECONDS, lines: int = 10**9) -> int:
        """The exit status, -9 if it was killed: `after` seconds, counted from where the output has `lines` more, or
        from the start where it never comes to that."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        arguments = [self._command, *map(str, argv), "-o", str(output)]
        request = {"argv": arguments, "output": str(output / self._within), "after": after, "lines": lines}
        self._server.stdin.write(json.dumps(request) + "\n")
        return int(self._server.stdout.readline())


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _watch(child: int, output: Path, after: float, lines: int) -> int:
    """Kill a child when its time has come; its exit status."""
    before, due = lines_of(output), None
    started = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if due is None and lines_of(output) - before >= lines:
            due = now + after
        if now >= (due or started + LIMIT_SECONDS):
            os.kill(child, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _run(argv: list[str]) -> None:
    import cli

    sys.argv = ["qmix", *argv]
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
        try:
            cli.main()
        except SystemExit as end:
            os._exit(end.code)


def _serve() -> None:
    import torch

    from qmix.commands.shared import load_libraries

    load_libraries()
    import qmix.batch.display  # noqa: F401 -- imported for the forks
    from qmix.kernels.cpu.products import holds_in, product_kernel
    from qmix.kernels.cpu.sums import sums_of

    import_module(sys.argv[1])
    product_kernel()
    for precision in ("nf4", "half"):
        sums_of(holds_in(precision, torch.bfloat16))
    gc.freeze()  # or each fork's first collection would copy every page
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request["argv"])
        status = _watch(child, Path(request["output"]), request["after"], request["lines"])
        print(status, flush=True)


if __name__ == "__main__":
    _serve()
