"""The engine that all requests share: a queue with a bound in front of one continuous batch.

One thread runs pass after pass. Between two passes it takes in requests that wait and drops those whose client is gone.
What a pass brought goes to the event loop in one call.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qmix.engine.batch import BatchRunner
from qmix.engine.completion import BatchResult, Failure
from qmix.engine.running import BatchRequest
from qmix.engine.sampler import Chosen
from qmix.engine.scheduler import Sequence as Place
from qmix.errors import Cancelled
from qmix.serve.errors import ApiError, busy, invalid, stopping, told

Outcome = BatchResult | ApiError
LONGEST_WAIT = 60  # seconds that a client is told to wait at most


class Follower(Protocol):
    """Receives what becomes of a ticket, in the event loop."""

    def take(self, ticket: Ticket, text: str, chosen: Chosen | None, outcome: Outcome | None) -> None: ...


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in the service. `streams` wants each token; others only the outcome. Times in seconds."""

    request: BatchRequest
    follower: Follower
    streams: bool = False
    bulk: bool = False  # waits until no other request does
    asked: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    count: int = 0
    place: Place | None = None

    @property
    def most_tokens(self) -> int:
        """The tokens that its prompt and its longest answer take."""
        return len(self.request.prompt) + self.request.sampling.max_new_tokens


Event = tuple[Ticket, str, "Chosen | None", "Outcome | None"]


class Service:
    """Answers requests with a runner, at most `queue` of them waiting; close it.

    `deliver` runs a function in the event loop. `on_end` is called with each finished ticket, in the service's thread.
    """

    def __init__(
        self,
        runner: BatchRunner,
        queue: int,
        deliver: Callable[[Callable[[], None]], object],
        on_end: Callable[[Ticket, Outcome], None],
    ) -> None:
        self.runner, self.queue, self._deliver, self._on_end = runner, queue, deliver, on_end
        self._waiting: deque[Ticket] = deque()
        self._bulk: deque[Ticket] = deque()
        self._dropped: list[Ticket] = []
        self._running: dict[str, Ticket] = {}
        self._events: list[Event] = []
        self._mean = 1.0  # seconds of a request in the engine, a moving average
        self._closed = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="qmix-service", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place, bulk ones not counted."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return len(self._running)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue the tickets of one request. Raises ApiError where the queue has no room for all of them."""
        with self._wake:
            if self._closed:
                raise stopping()
            free = self.queue + self.runner.plan.batch - len(self._running) - len(self._waiting)
            if len(tickets) > self.queue + self.runner.plan.batch:
                raise invalid(
                    f"n, prompt: {len(tickets)} answers in one request; the server's queue holds {self.queue}"
                )
            if len(tickets) > free:
                raise busy(f"the queue is full (waiting: {len(self._waiting)})", self._patience())
            self._waiting.extend(tickets)
            self._wake.notify()

    def submit_bulk(self, ticket: Ticket) -> None:
        """Queue a request behind all that were submitted otherwise, without a bound."""
        with self._wake:
            self._bulk.append(ticket)
            self._wake.notify()

    def drop(self, tickets: Iterable[Ticket]) -> None:
        """Take tickets out before the next pass; harmless where they have ended."""
        with self._wake:
            self._dropped += tickets
            self._wake.notify()

    def close(self) -> None:
        """Stop at the next expert. Requests that have not ended get an error."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self.runner.thread.close()
        self._thread.join()

    def _patience(self) -> int:
        """Return the seconds after which a place in the queue is likely."""
        rounds = 1 + len(self._waiting) / self.runner.plan.batch
        return max(1, min(LONGEST_WAIT, round(rounds * self._mean)))

    def _run(self) -> None:
        while self._change():
            try:
                outcomes = self.runner.step() if self._running else []
            except Exception as error:  # the requests of the pass fail, the server goes on
                self.runner.start_over()
                self._fail(stopping() if isinstance(error, Cancelled) or self._closed else told(error))
            else:
                for each in outcomes:
                    outcome = told(each.error) if isinstance(each, Failure) else each
                    self._end(self._running.pop(each.name), outcome)
            self._send()
        self._fail(stopping())
        self._send()

    def _change(self) -> bool:
        """Drop and take in requests; wait where there is nothing to do. Return False once the service is closed."""
        with self._wake:
            while not (self._closed or self._running or self._waiting or self._bulk or self._dropped):
                self._wake.wait()
            dropped, self._dropped = self._dropped, []
            for ticket in dropped:
                self._forget(ticket)
        while (next_one := self._next()) is not None:
            self._begin(next_one)
        return not self._closed

    def _next(self) -> Ticket | None:
        """Take the next ticket that can begin out of its queue, None where there is none."""
        with self._wake:
            queue = None if self._closed else self._queue_to_serve()
            return queue.popleft() if queue else None

    def _queue_to_serve(self) -> deque[Ticket] | None:
        """Return the queue whose first ticket can begin.

        A quarter of the places and of the KV cache is never given to bulk, as far as one bulk ticket always runs.
        """
        batch, capacity = self.runner.plan.batch, self.runner.capacity
        if len(self._running) >= batch:
            return None
        if self._waiting:
            return self._waiting
        if not self._bulk:
            return None
        taken = sum(ticket.most_tokens for ticket in self._running.values())
        if self._running and taken + self._bulk[0].most_tokens > capacity:
            return None  # it would wait in the scheduler, before requests that have room
        bulk = [ticket.most_tokens for ticket in self._running.values() if ticket.bulk]
        tokens = sum(bulk) + self._bulk[0].most_tokens
        fits = len(bulk) < batch - max(1, batch // 4) and tokens <= capacity - capacity // 4
        return self._bulk if fits or not bulk else None

    def _begin(self, ticket: Ticket) -> None:
        """Begin a request, without holding up others that come: a grammar may take a while."""
        try:
            ticket.place = self.runner.begin(ticket.request, lambda chosen, text: self._token(ticket, chosen, text))
        except Exception as error:
            self._end(ticket, told(error))
        else:
            self._running[ticket.request.name] = ticket

    def _forget(self, ticket: Ticket) -> None:
        for queue in (self._waiting, self._bulk):
            if ticket in queue:
                queue.remove(ticket)
        if self._running.get(ticket.request.name) is ticket:
            assert ticket.place is not None
            self.runner.drop(ticket.place)
            del self._running[ticket.request.name]

    def _token(self, ticket: Ticket, chosen: Chosen, text: str) -> None:
        ticket.last = time.perf_counter()
        ticket.first = ticket.first or ticket.last
        ticket.count += 1
        if ticket.streams:
            self._events.append((ticket, text, chosen, None))

    def _end(self, ticket: Ticket, outcome: Outcome) -> None:
        if ticket.first is not None:
            self._mean += 0.1 * (time.perf_counter() - ticket.first - self._mean)
        self._events.append((ticket, "", None, outcome))
        self._on_end(ticket, outcome)

    def _fail(self, error: ApiError) -> None:
        """End every running request with an error; once closed, end the waiting ones too."""
        tickets, self._running = list(self._running.values()), {}
        if self._closed:
            with self._wake:
                tickets += [*self._waiting, *self._bulk]
                self._waiting.clear()
                self._bulk.clear()
        for ticket in tickets:
            self._end(ticket, error)

    def _send(self) -> None:
        events, self._events = self._events, []
        if events:
            self._deliver(lambda: hand_out(events))


def hand_out(events: Iterable[Event]) -> None:
    """Give events to their followers. A failure of one is the end of its request alone."""
    for ticket, text, chosen, outcome in events:
        try:
            ticket.follower.take(ticket, text, chosen, outcome)
        except Exception as error:
            ticket.follower.take(ticket, "", None, told(error))
