"""The engine as a batch uses it: behind all other requests."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from qmix.engine.completion import BatchOutcome, Failure
from qmix.engine.running import BatchRequest
from qmix.engine.sampler import Chosen
from qmix.errors import QmixError, UsageError
from qmix.serve.errors import ApiError
from qmix.serve.files import new_id
from qmix.serve.service import Outcome, Service, Ticket

LOOK_SECONDS = 0.5  # between two looks whether to go on


class EngineFailed(QmixError):
    """A pass of the engine failed, and the requests in it."""


@dataclass(slots=True)
class SharedEngine:
    """Answers the requests of a batch with the engine that others use, while `goes_on` returns True."""

    service: Service
    goes_on: Callable[[], bool]
    _news: queue.SimpleQueue[tuple[Ticket, Outcome]] = field(default_factory=queue.SimpleQueue)

    def take(self, ticket: Ticket, text: str, chosen: Chosen | None, outcome: Outcome | None) -> None:
        """Take in an outcome, in the event loop."""
        if outcome is not None:
            self._news.put((ticket, outcome))

    def answer(self, requests: Iterable[BatchRequest]) -> Generator[list[BatchOutcome], None, None]:
        """Yield results as they come, and failures of single requests. Raises EngineFailed."""
        names: dict[Ticket, str] = {}
        waiting = iter(requests)
        try:
            while self.goes_on():
                while len(names) < self.service.runner.plan.batch and (request := next(waiting, None)) is not None:
                    for each in request.completions():
                        ticket = Ticket(replace(each, name=new_id("line")), self, bulk=True)
                        names[ticket] = each.name
                        self.service.submit_bulk(ticket)
                if not names:
                    return
                yield self._finished(names)
        finally:
            self.service.drop(names)

    def _finished(self, names: dict[Ticket, str]) -> list[BatchOutcome]:
        """Return the outcomes that there are, after a while perhaps none."""
        found = []
        with suppress(queue.Empty):
            found.append(self._news.get(timeout=LOOK_SECONDS))
            while True:
                found.append(self._news.get_nowait())
        outcomes: list[BatchOutcome] = []
        for ticket, outcome in found:
            name = names.pop(ticket)
            if not isinstance(outcome, ApiError):
                outcomes.append(replace(outcome, name=name))
            elif outcome.status == 400:
                outcomes.append(Failure(name, ticket.request.index, UsageError(outcome.message)))
            else:
                raise EngineFailed(outcome.message)
        return outcomes
