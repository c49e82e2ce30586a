"""Commands on terminals, as forks of the process in `command.py`: what `pexpect.spawn` is for a fresh Python.

A fork has its terminal as a session's leader has, so that Ctrl-C and a hang-up reach it. It loads a model sooner than a
command that must import its libraries first: tests of that time, and of shells, take `pexpect.spawn`.
"""

from __future__ import annotations

import os
import pty
import sys
from typing import Any

import pexpect
from command import LIMIT_SECONDS, Commands
from ptyprocess import PtyProcess


class Terminal(pexpect.spawn):
    """`qmix ARGUMENTS` on a terminal of its own; `environment` is on top of the test's."""

    def __init__(
        self,
        commands: Commands,
        *argv: object,
        rows: int = 24,
        columns: int = 80,
        environment: dict[str, str],
        **options: Any,
    ) -> None:
        self._commands, self._argv = commands, argv
        self._environment = {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm-256color"} | environment
        super().__init__(sys.executable, timeout=LIMIT_SECONDS, dimensions=(rows, columns), **options)

    def _spawnpty(self, args: list[str], dimensions: tuple[int, int], **options: Any) -> PtyProcess:
        ours, theirs = pty.openpty()
        try:
            process = _Forked(self._commands, 0, ours)
            process.setwinsize(*dimensions)
            process.pid = self._commands.begin(os.ttyname(theirs), *map(str, self._argv), **self._environment)
        finally:
            os.close(theirs)
        return process


class _Forked(PtyProcess):
    """A process that the server of `commands` is the parent of, and waits for."""

    def __init__(self, commands: Commands, pid: int, fd: int) -> None:
        super().__init__(pid, fd)
        self._commands = commands

    def isalive(self) -> bool:
        if not self.terminated:
            self._end(self._commands.wait(self.pid, 0 if self.flag_eof else os.WNOHANG))
        return not self.terminated

    def wait(self) -> int | None:
        if not self.terminated:
            self._end(self._commands.wait(self.pid))
        return self.exitstatus

    def _end(self, code: int | None) -> None:
        if code is not None:
            self.terminated, self.status = True, code
            self.exitstatus, self.signalstatus = (code, None) if code >= 0 else (None, -code)
