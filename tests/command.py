"""`qmix ARGUMENTS` as a user meets it: a process, its exit code, and what it left on its two streams.

Starting Python with torch takes seconds, so one process imports everything once and forks for every command.
A fork has streams, environment and working directory of its own, and shows no progress that only slow work has;
`real` starts a fresh Python, for what a fork cannot show: what the imports say, and how it all ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

COMMAND = [sys.executable, "-m", "cli"]
LIMIT_SECONDS = 600  # a command that hangs is killed, and fails its test by its status; a slow machine is waited for

NO_NETWORK = """
import os, socket

def _refuse(*address, **options):
    if not (isinstance(address[0], socket.socket) and address[0].family == socket.AF_UNIX):
        with open(os.environ["WATCH_LOG"], "a") as log:
            log.write(f"network: {address}\\n")
        raise OSError("no network here")

socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = _refuse
"""
TELLTALE_KERNELS = """
import os

def get_kernel(name, *args, **options):
    with open(os.environ["WATCH_LOG"], "a") as log:
        log.write(f"get_kernel: {name}\\n")
    raise OSError("no network here")
"""


@dataclass(frozen=True)
class Finished:
    """The result of a command; `status` is below zero where a signal ended it.

    `peak` is the most memory it had, in bytes, for a command that was run in a fork.
    """

    status: int
    out: str
    err: str
    peak: int = 0

    @property
    def lines(self) -> list[str]:
        """The lines on stderr."""
        return self.err.splitlines()


class Commands:
    """Runs commands, one at a time; close it when done. Streams pass through files in `scratch`.

    `preloaded` are modules that are imported once besides.
    """

    def __init__(self, scratch: Path, *preloaded: str) -> None:
        self.scratch = scratch
        self.hub_cache = scratch / "hf" / "hub"  # read from the environment once, at the imports
        self._server = subprocess.Popen(
            [sys.executable, __file__, *preloaded],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1"},
            text=True,
            bufsize=1,
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(LIMIT_SECONDS)

    def __call__(self, *argv: str | Path, stdin: bytes = b"", cwd: Path | None = None, **environment: str) -> Finished:
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
        status, peak = map(int, self._server.stdout.readline().split())
        return Finished(status, streams[1].read_text("utf-8"), streams[2].read_text("utf-8"), peak)


def real(*argv: str | Path, stdin: bytes = b"", cwd: Path | None = None, **environment: str) -> Finished:
    """A command in a fresh Python."""
    done = subprocess.run(
        [*COMMAND, *argv],
        input=stdin,
        cwd=cwd,
        capture_output=True,
        env=os.environ | environment,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


@dataclass(frozen=True)
class FirstUse:
    """The first command in an empty home; `cache` is what later ones find there, `watched` an environment in
    which reaching for a network, or for a kernel on a hub, is refused and noted in `log`."""

    home: Path
    watched: dict[str, str]
    finished: Finished

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def store(self) -> Path:
        (made,) = (self.cache / "qmix").glob("tiny-*/")
        return made

    @property
    def log(self) -> Path:
        return Path(self.watched["WATCH_LOG"])

    @classmethod
    def of(cls, directory: Path, *argv: str) -> FirstUse:
        home, modules = directory / "home", directory / "modules"
        installed = modules / "kernels-0.12.0.dist-info"
        installed.mkdir(parents=True)
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.12.0\n")
        (modules / "kernels.py").write_text(TELLTALE_KERNELS)
        (modules / "sitecustomize.py").write_text(NO_NETWORK)
        watched = {"PYTHONPATH": str(modules), "WATCH_LOG": str(directory / "log"), "HF_HUB_OFFLINE": "0"}
        watched |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "HF_HOME": str(home / "hf")}
        home.mkdir()
        return cls(home, watched, real(*argv, **watched))


def _serve() -> None:
    import cli
    from qmix.commands.shared import load_libraries

    load_libraries()  # which a command calls before it imports them
    from transformers import MixtralForCausalLM  # noqa: F401

    from qmix.commands import shared
    from qmix.terminal import progress

    never = float("inf")  # lines that a slow machine would show besides
    shared.LOADING_PATIENCE = progress.LINE_SECONDS = never
    for name in sys.argv[1:]:
        import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(**json.loads(line))
            try:
                cli.main()
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code)  # Python's own end takes longer than most commands
        _, status, used = os.wait4(child, 0)
        print(os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024, flush=True)


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
