"""One request's answers in the event loop: awaited as a whole, or piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from qmix.engine.completion import BatchResult
from qmix.engine.running import BatchRequest
from qmix.engine.sampler import Chosen
from qmix.serve.errors import ApiError
from qmix.serve.service import Outcome, Service, Ticket
from qmix.serve.tools import Call, Tooling


@dataclass(slots=True)
class Update:
    """The news of one answer since its last update; `result` is set in its last one."""

    index: int
    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    result: BatchResult | None = None
    calls: list[Call] = field(default_factory=list)


class Following:
    """Follows the answers to one request. Close it: what has not ended then is dropped.

    Pieces that nobody has taken yet are joined, so that a slow reader holds up nothing.
    """

    def __init__(
        self, service: Service, requests: Sequence[BatchRequest], streams: bool, tooling: Tooling | None = None
    ) -> None:
        self._service, self._tooling = service, tooling
        self._reader: asyncio.Future[bool] | None = None  # waits for news, which are the result
        self._tickets = [Ticket(request, self, streams) for request in requests]
        self._index = {ticket: index for index, ticket in enumerate(self._tickets)}
        self._pending: dict[int, Update] = {}
        self._sent = [0] * len(requests)  # characters of each answer
        self._held = [False] * len(requests)  # answers whose text may be a call by now
        self._open = len(requests)
        self._error: ApiError | None = None
        self.results: list[BatchResult | None] = [None] * len(requests)
        service.submit(self._tickets)

    def take(self, ticket: Ticket, text: str, chosen: Chosen | None, outcome: Outcome | None) -> None:
        """Take in a token or the outcome of an answer."""
        index = self._index[ticket]
        update = self._pending.setdefault(index, Update(index))
        if chosen is not None:
            update.tokens.append(chosen)
            self._held[index] |= self._tooling is not None and self._tooling.holds(chosen.token)
            update.text += "" if self._held[index] else text
            self._sent[index] += 0 if self._held[index] else len(text)
        if isinstance(outcome, BatchResult):
            self._finish(update, outcome)
            self.results[index] = update.result = outcome
            self._open -= 1
        elif outcome is not None:
            self._error = self._error or outcome
        self._wake(True)

    def _finish(self, update: Update, result: BatchResult) -> None:
        """Add the text that was held back, or the calls."""
        text, sent = result.text, self._sent[update.index]
        if self._tooling is None:
            update.text += text[sent:]
        else:
            text, update.calls = self._tooling.read(result)
            update.text += self._tooling.rest(text, update.calls, sent)

    @property
    def done(self) -> bool:
        """Return whether every answer has ended and was taken."""
        return not self._open and not self._pending

    async def updates(self, patience: float) -> list[Update]:
        """Wait for news at most `patience` seconds, and return them. Raises ApiError where an answer failed."""
        if not self._pending and self._error is None:
            loop = asyncio.get_running_loop()
            self._reader = loop.create_future()
            timer = loop.call_later(patience, self._wake, False)
            try:
                if not await self._reader:
                    return []
            finally:
                timer.cancel()
        if self._error is not None:
            raise self._error
        updates, self._pending = list(self._pending.values()), {}
        return updates

    def _wake(self, news: bool) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(news)

    async def all(self) -> list[BatchResult]:
        """Wait for all answers. Raises ApiError where one failed."""
        while not self.done:
            await self.updates(3600)
        return [result for result in self.results if result is not None]

    def close(self) -> None:
        """Drop the answers that have not ended."""
        if self._open:
            self._service.drop(self._tickets)
