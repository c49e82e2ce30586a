"""OpenAI's /v1/batches: files of requests, answered when no other request waits.

A batch is a run of `qmix batch` over an uploaded file that shares the server's engine. Each answer is on the disk
before it is counted, so that a server that was killed goes on with the lines that are left.
"""

from __future__ import annotations

import fcntl
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from qmix.batch.answering import Summary
from qmix.batch.lines import Requests
from qmix.batch.output import FileAnswers
from qmix.batch.session import begin_run
from qmix.engine.batch import BatchRequest
from qmix.engine.completion import BatchResult
from qmix.engine.sampler import Chosen
from qmix.errors import QmixError, UsageError, arg
from qmix.serve.asked import CHAT, COMPLETION, COMPLETION_TOKENS
from qmix.serve.errors import ApiError, invalid
from qmix.serve.files import PART, Files, Records, is_error, new_id
from qmix.serve.service import Outcome, Service, Ticket

MOST_LINES = 20_000  # of a batch: their places are in memory while it runs
LOOK_SECONDS = 0.5  # between two looks whether to go on
WINDOW_SECONDS = 24 * 3600
Status = Literal["in_progress", "completed", "failed", "cancelling", "cancelled"]


class Batch(msgspec.Struct, kw_only=True):
    """A batch as it lies on the disk; times in seconds since 1970."""

    id: str
    endpoint: str
    input_file_id: str
    created_at: int
    context: int  # tokens of a line, prompt and answer together
    status: Status = "in_progress"
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    errors: list[str] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's batch object."""
        fields = msgspec.structs.asdict(self)
        del fields["context"]
        counts = {name: fields.pop(name) for name in ("total", "completed", "failed")}
        errors = [{"code": "invalid_request", "message": text, "line": None, "param": None} for text in self.errors]
        return fields | {
            "object": "batch",
            "request_counts": counts,
            "errors": {"object": "list", "data": errors} if errors else None,
            "in_progress_at": self.created_at,
            "finalizing_at": self.completed_at,
            "expires_at": self.created_at + WINDOW_SECONDS,
            "expired_at": None,
        }


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request for a batch."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None


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

    def answer(self, requests: Iterable[BatchRequest]) -> Iterator[list[BatchResult]]:
        """Yield results as they come. Raises QmixError where the engine failed."""
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

    def _finished(self, names: dict[Ticket, str]) -> list[BatchResult]:
        """Return the results that there are, after a while perhaps none."""
        found = []
        with suppress(queue.Empty):
            found.append(self._news.get(timeout=LOOK_SECONDS))
            while True:
                found.append(self._news.get_nowait())
        results = []
        for ticket, outcome in found:
            name = names.pop(ticket)
            if isinstance(outcome, ApiError):
                raise QmixError(outcome.message)
            results.append(replace(outcome, name=name))
        return results


class Batches:
    """The batches of a server: a thread answers one after another. Those that were left unfinished are first.

    Raises QmixError where another server has the directory.
    """

    def __init__(self, directory: Path, files: Files, service: Service, context: int) -> None:
        self.files, self._service, self._context = files, service, context
        self.records = Records(directory, "batch")
        self._lock = _locked(directory)
        self._known = {batch.id: batch for batch in self.records.all(Batch)}
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stopping = False
        for batch in sorted(self._known.values(), key=lambda batch: (batch.created_at, batch.id)):
            if batch.status in ("in_progress", "cancelling"):
                self._queue.put(batch.id)
        self._thread = threading.Thread(target=self._run, name="qmix-batches", daemon=True)
        self._thread.start()

    def create(self, wanted: Wanted) -> Batch:
        """Queue a batch. Raises ApiError."""
        if wanted.endpoint not in (CHAT, COMPLETION):
            raise invalid(f"endpoint {wanted.endpoint[:100]!r}: must be {CHAT!r} or {COMPLETION!r}")
        if wanted.completion_window != "24h":
            raise invalid("completion_window: must be '24h'")
        self.files.path(wanted.input_file_id)
        batch = Batch(
            id=new_id("batch"),
            endpoint=wanted.endpoint,
            input_file_id=wanted.input_file_id,
            created_at=int(time.time()),
            context=self._context,
            metadata=wanted.metadata,
        )
        self._keep(batch)
        self._queue.put(batch.id)
        return batch

    def get(self, name: str) -> Batch:
        """Return a batch. Raises ApiError where there is none."""
        if name not in self._known:
            raise self.records.missing(name)
        return self._known[name]

    def all(self) -> list[Batch]:
        """Return all batches, the newest first."""
        return sorted(self._known.values(), key=lambda batch: (-batch.created_at, batch.id))

    def cancel(self, name: str) -> Batch:
        """Stop a batch before its next line; what it has answered stays."""
        batch = self.get(name)
        if batch.status == "in_progress":
            batch.status, batch.cancelling_at = "cancelling", int(time.time())
            self._keep(batch)
        return batch

    def output(self, name: str) -> Path:
        """Return the file with all lines that a batch has written."""
        return self.records.path(name, ".out.jsonl")

    def stop(self) -> None:
        """Take no more lines. Unfinished batches go on with the next server."""
        self._stopping = True
        self._queue.put(None)

    def close(self) -> None:
        """Stop, and wait until that is done."""
        self.stop()
        self._thread.join()
        self._lock.close()

    def _keep(self, batch: Batch) -> None:
        self._known[batch.id] = batch
        self.records.write(batch.id, batch)

    def _run(self) -> None:
        while (name := self._queue.get()) is not None and not self._stopping:
            batch = self._known[name]
            try:
                self._answer(batch)
            except ApiError as error:
                self._end(batch, [error.message])
            except (QmixError, OSError) as error:
                self._end(batch, [str(error)])
            except Exception as error:  # the server goes on
                self._end(batch, [f"a bug in qmix: {type(error).__name__}: {error}"])

    def _answer(self, batch: Batch) -> None:
        """Answer the lines of a batch that are left."""
        with self.files.path(batch.input_file_id).open("rb") as file:
            if sum(part.count(b"\n") for part in iter(lambda: file.read(PART), b"")) > MOST_LINES:
                raise UsageError(f"the file has more than {MOST_LINES} lines; split it")
            requests = Requests(file)
            if problems := requests.problems or self._misplaced(requests, batch.endpoint):
                return self._end(batch, problems)
            batch.total = len(requests.entries)
            runner = self._service.runner
            with FileAnswers(self.output(batch.id)) as answers:
                most = batch.context if batch.endpoint == CHAT else COMPLETION_TOKENS
                options = {"max_new_tokens": most}
                run, _, _ = begin_run(runner.store, requests, answers, options, None, batch.context, runner.tokenizer)
                run.refuse()
                shared = SharedEngine(self._service, lambda: not self._stopping and batch.status == "in_progress")
                self._count(batch, run.run(runner, lambda summary: self._count(batch, summary), shared.answer))
        if batch.status == "cancelling" or not (self._stopping or batch.completed + batch.failed < batch.total):
            self._end(batch, [])
        return None

    @staticmethod
    def _misplaced(requests: Requests, endpoint: str) -> list[str]:
        """Return the problem of the first line for another endpoint, and of a file without lines."""
        if not requests.entries:
            return ["the file has no requests"]
        for entry in requests.entries:
            if (url := requests.line(entry).url) != endpoint:
                return [f"line {entry.number}: url {url!r}: the batch is for {endpoint!r}"]
        return []

    @staticmethod
    def _count(batch: Batch, summary: Summary) -> None:
        batch.completed, batch.failed = summary.answered, summary.refused

    def _end(self, batch: Batch, errors: list[str]) -> None:
        """Write how a batch ended, and make files of its lines."""
        if self._stopping and errors:  # an error of the end, not of the batch
            return
        now = int(time.time())
        sizes = {True: 0, False: 0}
        if self.output(batch.id).exists():
            with self.output(batch.id).open("rb") as lines:
                for line in lines:
                    sizes[is_error(line)] += len(line)
        if sizes[False]:
            batch.output_file_id = self.files.add_view(batch.id, sizes[False], errors=False).id
        if sizes[True]:
            batch.error_file_id = self.files.add_view(batch.id, sizes[True], errors=True).id
        if errors:
            batch.status, batch.failed_at, batch.errors = "failed", now, errors
        elif batch.status == "cancelling":
            batch.status, batch.cancelled_at = "cancelled", now
        else:
            batch.status, batch.completed_at = "completed", now
        self._keep(batch)


def _locked(directory: Path) -> BinaryIO:
    """Return a file that holds a directory while it is open. Raises QmixError where another server has it."""
    file = (directory / "lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise QmixError(
            f"{directory}: another server has its batches here; choose another {arg('directory')}"
        ) from None
    return file
