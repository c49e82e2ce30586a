"""The first turn of a chat on a terminal: its user types it while the model is loaded."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

from prompt_toolkit import PromptSession
from prompt_toolkit.patch_stdout import patch_stdout

PATIENCE = 0.05  # seconds between two attempts to end a prompt


class FirstTurn:
    """A prompt in a thread of its own. Lines that the main thread prints meanwhile appear above it."""

    def __init__(self, session: PromptSession[str], status: Callable[[], str]) -> None:
        self._session = session
        self._over, self._ending = threading.Event(), threading.Lock()
        self._typed: str | None = None
        self._failure: BaseException | None = None
        session.bottom_toolbar = status
        self._printing = ExitStack()
        if sys.stderr is not None and sys.stderr.isatty():
            self._printing.enter_context(patch_stdout(raw=True))
        self._thread = threading.Thread(target=self._read, name="qmix-first-turn", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while self._typed is None and self._failure is None:
            try:
                self._typed = self._session.prompt()
            except KeyboardInterrupt as interrupt:
                if self._over.is_set() or not self._session.default_buffer.text:  # else only the line is dropped
                    self._failure = interrupt
            except BaseException as error:
                self._failure = error
        with self._ending:  # the main thread is interrupted before it begins to wait for the turn, or not at all
            if self._failure is not None and not self._over.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def refresh(self) -> None:
        """Show the status as it is now."""
        self._session.app.invalidate()

    def hide_status(self) -> None:
        """End the status: from now on the main thread waits for the turn."""
        with self._ending:
            self._over.set()
        self._session.bottom_toolbar = None
        self.refresh()

    def text(self) -> str:
        """Wait for the turn. Raises EOFError and KeyboardInterrupt as the prompt does."""
        try:
            self._thread.join()
        finally:
            self._printing.close()
        if self._failure is not None:
            raise self._failure
        assert self._typed is not None
        return self._typed

    def stop(self) -> bool:
        """End the prompt; return whether its user left by Ctrl-D. Raises what went wrong with the prompt itself."""
        left = isinstance(self._failure, EOFError)
        if self._failure is not None and not isinstance(self._failure, EOFError | KeyboardInterrupt):
            self._printing.close()
            raise self._failure
        self.hide_status()
        while self._thread.is_alive():  # the prompt has a loop only a moment after it began
            if (loop := self._session.app.loop) is not None:
                with suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(self._exit)
            self._thread.join(PATIENCE)
        self._printing.close()
        return left

    def _exit(self) -> None:
        with suppress(Exception):  # the turn was entered just now
            self._session.app.exit(exception=EOFError)
