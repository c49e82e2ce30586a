"""`qmix ARGUMENTS` as a user meets it: a process of its own, its exit code, and what it left on its two streams.

Starting Python with torch takes seconds, so one process imports everything once and forks for every command. A fork
has streams, environment and working directory of its own and ends as the console command does; `real` starts the
installed command itself, for what a fork cannot show.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COMMAND = [sys.executable, "-m", "cli"]
LIMIT_SECONDS = 120  # a command that hangs is killed, and fails its test by its status


@dataclass(frozen=True)
class Finished:
    """What a command left behind; `status` is below zero where a signal ended it."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines on stderr."""
        return self.err.splitlines()


class Commands:
    """Runs commands, one at a time; close it when done. Streams pass through files in `scratch`."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(LIMIT_SECONDS)

    def __call__(
        self, *argv: str | Path, stdin: bytes = b"", cwd: Path | None = None, **environment: str
    ) -> Finished:
        """`environment` is on top of the test's own."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        streams = [self.scratch / name for name in ("stdin", "stdout", "stderr")]
        for stream, content in zip(streams, (stdin, b"", b""), strict=True):
            stream.write_bytes(content)
        request = {
            "argv": [os.fspath(argument) for argument in argv],
            "cwd": str(cwd or self.scratch),
            "environment": os.environ | environment,
            "streams": [str(stream) for stream in streams],
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        status = int(self._server.stdout.readline())
        return Finished(status, streams[1].read_text("utf-8"), streams[2].read_text("utf-8"))


def real(*argv: str | Path, stdin: bytes = b"", **environment: str) -> Finished:
    """A command in a fresh Python."""
    done = subprocess.run(
        [*COMMAND, *argv],
        input=stdin,
        capture_output=True,
        env=os.environ | environment,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


def _serve() -> None:
    import cli
    import qmix.quantize
    import qmix.runner
    import qmix.terminal  # noqa: F401 -- imported for the forks
    from transformers import MixtralForCausalLM  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(**json.loads(line))
            cli.main()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(argv: list[str], cwd: str, environment: dict[str, str], streams: list[str]) -> None:
    signal.alarm(LIMIT_SECONDS)
    for target, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_RDWR), target)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)  # noqa: SIM115
    sys.argv = ["qmix", *argv]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)


if __name__ == "__main__":
    _serve()
