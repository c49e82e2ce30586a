"""The loop of a chat: reads, asks, shows."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from qmix.chat import slash
from qmix.chat.kept import KeptChat
from qmix.chat.reader import Reader
from qmix.chat.session import Answer, Session
from qmix.engine.completion import Result
from qmix.errors import QmixError
from qmix.units import format_bytes, plural

HINT = "Ctrl-D or /exit leaves; Ctrl-C stops an answer"


@dataclass(frozen=True)
class Screen:
    """The output of a chat. `show` takes an answer's text, `say` a line beside it, and `thinking` a function that
    describes the work until the first text. `sum_up` makes a line from a result, None for no line; `explain` makes one
    from an error. `live` is entered while an answer is shown; `end` is called after its last text."""

    show: Callable[[str], None]
    say: Callable[[str], None]
    thinking: Callable[[Callable[[], str]], AbstractContextManager[object]]
    sum_up: Callable[[Result], str] | None
    explain: Callable[[QmixError], str] = str
    end: Callable[[], None] = lambda: None
    live: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass
class Chat:
    """A chat. With `keeps_on`, for a user at a terminal, an interrupt stops an answer and not the chat. `kept` is the
    chat's file, if there is one."""

    session: Session
    reader: Reader
    screen: Screen
    keeps_on: bool
    kept: KeptChat | None = None
    failed: bool = False

    def run(self) -> None:
        """Run until the input ends or /exit; `failed` is then true where a turn failed."""
        goes_on = True
        while goes_on:
            try:
                text = self.reader.read()
                goes_on = self._attempt(text)
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.keeps_on:
                    raise
                if not self.reader.left_something():
                    self.screen.say(HINT)
            except QmixError as error:
                self._tell(self.screen.explain(error))
        if self.kept is not None:
            self.kept.end()

    def _attempt(self, text: str) -> bool:
        """Do one turn or command and keep the chat. Returns False to leave. A failure ends only the turn, except a
        closed stdout."""
        try:
            return self._turn(text)
        except (QmixError, BrokenPipeError):
            raise
        except MemoryError:
            self._tell("out of memory; this turn is not kept")
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}; this turn is not kept")
        finally:
            self._keep()
        return True

    def _keep(self) -> None:
        if self.kept is not None:
            self.kept.keep(self.session)

    def _tell(self, message: str) -> None:
        self.failed = True
        self.screen.say(f"qmix: {' '.join(message.splitlines())}")

    def _turn(self, text: str) -> bool:
        """Do one turn or command. Returns False to leave."""
        if not text.strip():
            return True
        if not text.startswith("/"):
            self._ask(text)
            return True
        outcome = slash.run(text, self.session)
        for line in outcome.lines:
            self.screen.say(line)
        if outcome.ask is not None:
            self._ask(outcome.ask, outcome.again)
        return not outcome.leave

    def _ask(self, text: str, again: bool = False) -> None:
        with _on_interrupt(signal.SIG_IGN) if self.keeps_on else nullcontext():
            answer = self.session.ask(text, again)
            if answer.forgotten:
                self.screen.say(_forgotten(answer.forgotten, self.session.conversation.context))
            try:
                with self.screen.live():
                    stopped = self._stream(answer)
            except Exception:
                self.session.drop(answer)
                raise
            finally:
                self.screen.end()
            said = self.session.keep(answer)
            self._keep()
            self._sum_up(answer, stopped, said)

    def _stream(self, answer: Answer) -> bool:
        """Show an answer as it is generated. Returns whether it was stopped."""
        try:
            with self._interruptible(), closing(answer.pieces) as pieces:
                with self.screen.thinking(self._describe()):
                    text = next(pieces, "")
                self.screen.show(text)
                for text in pieces:
                    self.screen.show(text)
        except KeyboardInterrupt:
            if not self.keeps_on:
                raise
            return True
        finally:
            if not answer.text.endswith("\n"):
                self.screen.show("\n")
        return False

    def _interruptible(self) -> AbstractContextManager[None]:
        return _on_interrupt(_once) if self.keeps_on else nullcontext()

    def _sum_up(self, answer: Answer, stopped: bool, said: bool) -> None:
        if not said:
            self.screen.say("stopped before the first token; this turn is not kept")
        elif self.screen.sum_up is None:
            return
        elif stopped:
            self.screen.say(f"stopped after {plural(len(answer.ids), 'token')}")
        elif answer.result is not None:
            self.screen.say(self.screen.sum_up(answer.result))

    def _describe(self) -> Callable[[], str]:
        pool = self.session.runner.pool
        layers, before = pool.store.geometry.num_layers, pool.counters.copy()

        def describe() -> str:
            used = pool.counters.since(before)
            return (
                f"thinking: layer {pool.layer + 1} of {layers}, {100 * used.hit_rate:.0f}% of experts in memory, "
                f"{format_bytes(used.bytes_read)} read"
            )

        return describe


def _forgotten(turns: int, context: int) -> str:
    return f"the context of {context} tokens is full: dropped the oldest {'turn' if turns == 1 else f'{turns} turns'}"


@contextmanager
def _on_interrupt(handler: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _once(number: int, frame: object) -> None:
    """Ignore a second Ctrl-C, which would interrupt the clean-up after the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
