"""OpenAI's /v1/batches: files of requests, answered when no other request waits.

A batch is a run of `qmix batch` over an uploaded file that shares the server's engine. Each answer is on the disk
before it is counted, so that a server that was killed goes on with the lines that are left.
"""

from __future__ import annotations

import fcntl
import queue
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import msgspec

from qmix.batch.answering import Summary
from qmix.batch.lines import Requests
from qmix.batch.output import FileAnswers
from qmix.batch.session import begin_run
from qmix.errors import DiskError, QmixError, UsageError, arg
from qmix.machine.arithmetic import computed_on
from qmix.serve.asked import CHAT, COMPLETION, COMPLETION_TOKENS
from qmix.serve.errors import ApiError, invalid, told
from qmix.serve.files import PART, File, Files, Records, is_error, new_id
from qmix.serve.service import Service
from qmix.serve.shared_engine import EngineFailed, SharedEngine

LINES = (".out.jsonl", ".out.jsonl.qmix.json")  # the files of a batch's lines
MOST_LINES = 20_000  # of a batch: their places are in memory while it runs
MOST_BATCHES = 1000
MOST_LABELS, LONGEST_LABEL = 16, 512  # of a batch's metadata, as OpenAI has it
RETRY_SECONDS, LONGEST_RETRY = 1.0, 60.0  # between two attempts after an error that may pass
FAILURES = 3  # passes that fail in a row, without a finished line between them, end a batch
WINDOW_SECONDS = 24 * 3600
Label = Annotated[str, msgspec.Meta(max_length=LONGEST_LABEL)]
Status = Literal["in_progress", "completed", "failed", "cancelling", "cancelled"]


ENDED = ("completed", "failed", "cancelled")


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
    metadata: Annotated[dict[Label, Label], msgspec.Meta(max_length=MOST_LABELS)] | None = None


class Batches:
    """The batches of a server: a thread answers one after another. Those that were left unfinished are first.

    Raises QmixError where another server has the directory.
    """

    def __init__(self, directory: Path, files: Files, service: Service, context: int) -> None:
        self.files, self._service, self._context = files, service, context
        self.records = Records(directory, "batch")
        with ExitStack() as held:
            self._lock = held.enter_context(_locked(directory))
            files.sweep()
            self._known = {batch.id: batch for batch in self.records.all(Batch)}
            held.pop_all()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._changing = threading.Lock()
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
        self._make_room()
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
        with self._changing:
            batch = self.get(name)
            if batch.status == "in_progress":
                batch.status, batch.cancelling_at = "cancelling", int(time.time())
                self.records.write(batch.id, batch)
            return batch

    def output(self, name: str) -> Path:
        """Return the file with all lines that a batch has written."""
        return self.records.path(name, ".out.jsonl")

    def stop(self) -> None:
        """Take no more lines. Unfinished batches go on with the next server."""
        self._stop.set()
        self._queue.put(None)

    def close(self) -> None:
        """Stop, and wait until that is done."""
        self.stop()
        self._thread.join()
        self._lock.close()

    def forget_lines(self, file: File) -> None:
        """Delete the lines of a batch whose last file was deleted."""
        batch = self._known.get(file.lines_of or "")
        if batch is not None and batch.status in ENDED and not self._files_of(batch):
            for suffix in LINES:
                self.records.path(batch.id, suffix).unlink(missing_ok=True)

    def _files_of(self, batch: Batch) -> list[File]:
        """Return the files of a batch's lines that were not deleted."""
        return [file for file in self.files.all() if file.lines_of == batch.id]

    def _make_room(self) -> None:
        """Forget the oldest batch without files where there are too many. Raises ApiError where each has files."""
        if len(self._known) < MOST_BATCHES:
            return
        held = {file.lines_of for file in self.files.all()}
        for batch in reversed(self.all()):
            if batch.status in ENDED and batch.id not in held:
                del self._known[batch.id]
                for suffix in (".json", *LINES):
                    self.records.path(batch.id, suffix).unlink(missing_ok=True)
                return
        raise ApiError(400, f"there are {MOST_BATCHES} batches; delete the output files of some that have ended")

    def _keep(self, batch: Batch) -> None:
        self.records.write(batch.id, batch)
        self._known[batch.id] = batch

    def _run(self) -> None:
        while (name := self._queue.get()) is not None:
            patience, failures = RETRY_SECONDS, FAILURES
            while not self._stop.is_set():
                batch, done = self._known[name], self._known[name].completed
                error = self._attempt(batch, failures == 1)
                if error is None:
                    break
                batch.errors = [told(error).message]
                if isinstance(error, EngineFailed):
                    failures = FAILURES if batch.completed > done else failures - 1
                self._stop.wait(patience)
                patience = min(2 * patience, LONGEST_RETRY)

    def _attempt(self, batch: Batch, last: bool) -> Exception | None:
        """Answer a batch until it ends, or the server does. Return an error that may pass; of the engine, not the last.

        The lines of a pass that failed cannot be told apart, and are answered again.
        """
        try:
            try:
                self._answer(batch)
            except Exception as error:
                if _may_pass(error) and not (last and isinstance(error, EngineFailed)):
                    raise
                self._end(batch, [told(error).message])  # the server goes on
        except (DiskError, OSError, EngineFailed) as error:
            return error
        return None

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
                run, _, _ = begin_run(
                    runner.store,
                    requests,
                    answers,
                    options,
                    None,
                    batch.context,
                    runner.tokenizer,
                    computed_on(bool(runner.plan.devices)),
                )
                run.refuse()
                shared = SharedEngine(self._service, lambda: not self._stop.is_set() and batch.status == "in_progress")
                self._count(batch, run.run(runner, lambda summary: self._count(batch, summary), shared.answer))
        if batch.status == "cancelling" or not (self._stop.is_set() or batch.completed + batch.failed < batch.total):
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
        if self._stop.is_set() and errors:  # an error of the end, not of the batch
            return
        now = int(time.time())
        sizes = {True: 0, False: 0}
        if self.output(batch.id).exists():
            with self.output(batch.id).open("rb") as lines:
                for line in lines:
                    sizes[is_error(line)] += len(line)
        if sizes[False] and batch.output_file_id is None:
            batch.output_file_id = self.files.add_view(batch.id, sizes[False], errors=False).id
        if sizes[True] and batch.error_file_id is None:
            batch.error_file_id = self.files.add_view(batch.id, sizes[True], errors=True).id
        with self._changing:  # the status may change to "cancelling" until this one is on the disk
            if errors:
                changes: dict[str, Any] = {"status": "failed", "failed_at": now}
            elif batch.status == "cancelling":
                changes = {"status": "cancelled", "cancelled_at": now}
            else:
                changes = {"status": "completed", "completed_at": now}
            self._keep(msgspec.structs.replace(batch, errors=errors, **changes))


def _may_pass(error: Exception) -> bool:
    """Return whether another attempt may succeed: after a failed pass, or on a disk that had no room."""
    return isinstance(error, (DiskError, OSError, EngineFailed)) and not isinstance(error, FileNotFoundError)


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
