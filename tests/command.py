"""`qmix ARGUMENTS` as a user meets it: a process, its exit code, and what it left on its two streams.

Starting Python with torch takes seconds, so one process imports everything once and forks for every command. A fork of
that process imports numba as well, for the commands that use it: in the others' memory it would count against budgets.
A command's process has streams, environment and working directory of its own, and shows no progress that only slow work
has; `real` starts a fresh Python, for what a fork cannot show: what the imports say, and how it all ends.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TextIO

COMMAND = [sys.executable, "-m", "cli"]
USUAL = ("qmix.engine.load", "qmix.engine.stream", "qmix.engine.batch", "qmix.planner.view", "qmix.terminal.progress")
COMPILING = frozenset(("quantize", "compare", "calibrate"))  # the commands that import numba at once
COMPILER = ("qmix.store.quantize", "qmix.compare.fidelity", "qmix.engine.usable", "numba.np.ufunc")
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

    directory: Path
    finished: Finished

    @property
    def home(self) -> Path:
        return self.directory / "home"

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def store(self) -> Path:
        (made,) = (self.cache / "qmix").glob("tiny-*/")
        return made

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def watched(self) -> dict[str, str]:
        places = {"HOME": str(self.home), "XDG_CACHE_HOME": str(self.cache), "HF_HOME": str(self.home / "hf")}
        watching = {"PYTHONPATH": str(self.directory / "modules"), "WATCH_LOG": str(self.log), "HF_HUB_OFFLINE": "0"}
        return watching | places

    @classmethod
    def make(cls, directory: Path) -> None:
        """Run it in this directory, and two commands after it that measure Python's own memory."""
        modules = directory / "modules"
        installed = modules / "kernels-0.12.0.dist-info"
        installed.mkdir(parents=True)
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.12.0\n")
        (modules / "kernels.py").write_text(TELLTALE_KERNELS)
        (modules / "sitecustomize.py").write_text(NO_NETWORK)
        used = cls(directory, Finished(0, "", ""))
        used.home.mkdir()
        done = real("generate", "To install a package,", "--seed", "1", "--max-new-tokens", "24", **used.watched)
        (directory / "finished.json").write_text(json.dumps([done.status, done.out, done.err]))
        for model in ("tiny", "mixtral-8x7b"):  # without and with kernels
            assert real("plan", model, "--ram", "64GiB", XDG_CACHE_HOME=str(used.cache)).status == 0

    @classmethod
    def read(cls, directory: Path) -> FirstUse:
        """Return what was made in this directory, or in the one that it is a copy of."""
        return cls(directory, Finished(*json.loads((directory / "finished.json").read_text())))


def _prepare() -> None:
    """Import what commands import, but for what only those in COMPILING do."""
    from qmix.commands import shared

    shared.load_libraries()  # which a command calls before it imports them
    from transformers import MixtralForCausalLM  # noqa: F401

    from qmix.terminal import progress

    never = float("inf")  # lines that a slow machine would show besides
    shared.LOADING_PATIENCE = progress.LINE_SECONDS = never
    for name in (*USUAL, *sys.argv[1:]):
        import_module(name)


def _serve(requests: TextIO, answers: TextIO) -> None:
    """Run the command of each line; answer with its exit code and its peak of memory."""
    import cli

    compiling = None
    gc.freeze()  # or each command's first collection would touch, and so copy, every object
    for line in requests:
        request = json.loads(line)
        if request["argv"][:1] and request["argv"][0] in COMPILING and "numba" not in sys.modules:
            compiling = compiling or _fork_with_compiler()
            print(line, end="", file=compiling[0], flush=True)
            print(compiling[1].readline(), end="", file=answers, flush=True)
            continue
        child = os.fork()
        if child == 0:
            _become(**request)
            try:
                cli.main()
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code)  # Python's own end takes longer than most commands
        _, status, used = os.wait4(child, 0)
        print(os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024, file=answers, flush=True)


def _fork_with_compiler() -> tuple[TextIO, TextIO]:
    """Fork a server of the commands in COMPILING; return its requests and answers. It ends with its requests."""
    (reading, asking), (answering, writing) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(asking)
        os.close(answering)
        for name in COMPILER:
            import_module(name)
        _serve(os.fdopen(reading), os.fdopen(writing, "w"))
        os._exit(0)
    os.close(reading)
    os.close(writing)
    return os.fdopen(asking, "w"), os.fdopen(answering)


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
    _prepare()
    _serve(sys.stdin, sys.stdout)
