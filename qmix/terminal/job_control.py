"""Give the terminal back when a process that draws on it is stopped by Ctrl-Z or ended by SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.live import Live

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP, signal.SIGCONT)
LOOK_SECONDS = 0.25  # between two looks whether the process is in the foreground


class JobControl:
    """Handles the signals of a process that draws on a terminal, while it is entered in the main thread.

    `live` returns what is drawn, None before there is something. Ctrl-Z takes it off the screen and stops the process;
    it is drawn again when the process goes on in the foreground. SIGTERM calls `end`, and ends the process. Signals
    that are ignored stay so. Displays may be nested: each signal reaches all of them.
    """

    def __init__(self, live: Callable[[], Live | None], end: Callable[[], object] = lambda: None) -> None:
        self._live, self._end = live, end
        self._paused: Live | None = None
        self._deferring = False
        self._deferred: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> JobControl:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Defer signals while the block runs: it changes the terminal."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            deferred, self._deferred = self._deferred, []
            for number in deferred:
                signal.raise_signal(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferring:
            self._deferred.append(number)
            return
        if number in (signal.SIGTERM, signal.SIGTSTP):
            self._pause()
        if number == signal.SIGTERM:
            self._end()
        before = self._before.get(number, signal.SIG_DFL)
        if callable(before):
            before(number, frame)
        elif number != signal.SIGCONT:
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_kill(threading.get_ident(), number)  # the process ends or stops here
            signal.signal(number, self._handle)
        if self._paused is not None and in_foreground():
            live, self._paused = self._paused, None
            live.start(refresh=True)
        elif self._paused is not None:
            threading.Thread(target=self._wait, name="qmix-background", daemon=True).start()

    def _pause(self) -> None:
        live = self._live()
        if live is not None and live.is_started:
            live.stop()
            self._paused = live

    def _wait(self) -> None:
        """Wait for the foreground: a shell sends no signal to a job that runs there already."""
        while self._before and self._paused is not None and not in_foreground():
            time.sleep(LOOK_SECONDS)
        if self._before:
            os.kill(os.getpid(), signal.SIGCONT)


def in_foreground() -> bool:
    """Return whether this process may draw on the terminal of stderr."""
    try:
        return os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):  # stderr is no terminal of this session
        return False
