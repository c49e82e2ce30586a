"""One run over a file of requests, which answers the lines that are left."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from qmix.batch.forms import Forms
from qmix.batch.lines import Entry, Requests
from qmix.batch.output import SCHEMA, Answers
from qmix.batch.prompts import Asking, LineRefused
from qmix.engine.batch import BatchRunner
from qmix.engine.completion import BatchOutcome, BatchResult, Failure
from qmix.engine.running import BatchRequest
from qmix.errors import UsageError
from qmix.machine.found import peak_memory

REFUSED_AT_ONCE = 1000  # lines that are written together


@dataclass(slots=True)
class Job:
    """The work of a run: lines to answer, and lines that cannot be answered.

    `needs` has the tokens that a completion of each line may take, `counts` the number of its completions.
    `structured` says that a line has a grammar, `biased` are the completions with a bias.
    """

    entries: list[Entry] = field(default_factory=list)
    needs: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    structured: bool = False
    biased: int = 0

    @property
    def sequences(self) -> list[int]:
        """Return the tokens that each sequence of the run may take."""
        return [need for need, count in zip(self.needs, self.counts, strict=True) for _ in range(count)]

    @classmethod
    def of(cls, requests: Requests, asking: Asking, answers: Answers) -> Job:
        """Tokenise each pending line once."""
        job = cls()
        for entry in requests.entries:
            if entry.id in answers.done:
                continue
            try:
                request = asking.request(requests.line(entry))
            except LineRefused as reason:
                job.refused.append((entry.id, f"line {entry.number}: {reason}"))
            else:
                job.entries.append(entry)
                job.needs.append(len(request.prompt) + request.sampling.max_new_tokens)
                job.counts.append(request.sampling.n)
                job.structured |= request.sampling.source is not None
                job.biased += request.sampling.n if request.sampling.logit_bias else 0
        return job


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of a run so far. `seconds` are of this run alone, `resumed` are lines of earlier runs.

    `rate` is new tokens/s. `tokens_left` is the most that the lines without an answer may need.
    """

    lines: int
    answered: int
    refused: int
    resumed: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    tokens: int
    tokens_left: int
    passes: int
    seconds: float
    hit_rate: float
    bytes_read: int
    peak_memory: int
    budget: int

    @property
    def done(self) -> int:
        """Return the number of lines in the output."""
        return self.answered + self.refused

    @property
    def rate(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        fields = {name: value for name, value in asdict(self).items() if not name.startswith("tokens")}
        return {"schema": SCHEMA, **fields, "tok_s": self.rate}


Answer = Callable[[Iterable[BatchRequest]], Generator[list[BatchOutcome], None, None]]


class BatchRun:
    """Answers the lines of a job with a runner and writes the answers."""

    def __init__(self, requests: Requests, job: Job, asking: Asking, forms: Forms, answers: Answers) -> None:
        self.requests, self.job, self.asking, self.forms, self.answers = requests, job, asking, forms, answers
        self._resumed = len(answers.done)
        self._answered, self._refused = self._resumed - answers.refused, answers.refused
        self._failed: set[str] = set()
        self._left = sum(job.sequences)
        self._started = time.perf_counter()

    @property
    def resumable(self) -> bool:
        """Return whether another run can continue this one."""
        return self.answers.lasting

    def refuse(self) -> None:
        """Write the error lines of requests that cannot be answered."""
        for start in range(0, len(self.job.refused), REFUSED_AT_ONCE):
            some = self.job.refused[start : start + REFUSED_AT_ONCE]
            self.answers.append([self.forms.refused(name, reason) for name, reason in some])
            self._refused += len(some)

    def run(self, runner: BatchRunner, on_pass: Callable[[Summary], None], answer: Answer | None = None) -> Summary:
        """Answer all lines; `on_pass` is called with a summary after each pass.

        `answer` is another way to have requests answered by the runner, which it shares with others.
        """
        self._started = time.perf_counter()
        entries = {entry.id: entry for entry in self.job.entries}
        counts = dict(zip(entries, self.job.counts, strict=True))
        needs = dict(zip(entries, self.job.needs, strict=True))
        parts: dict[str, list[BatchResult]] = {}  # completions of lines that wait for their others
        with closing((answer or runner.outcomes)(self._ask(self.job.entries))) as passes:
            for outcomes in passes:
                for each in outcomes:
                    self._left -= needs[each.name]
                    if isinstance(each, BatchResult):
                        parts.setdefault(each.name, []).append(each)
                whole = [parts.pop(name) for name in list(parts) if len(parts[name]) == counts[name]]
                if whole:
                    lines = [self.requests.line(entries[answers[0].name]) for answers in whole]
                    self.answers.append([self.forms.answered(*each) for each in zip(lines, whole, strict=True)])
                    self._answered += len(whole)
                self._refuse_failed([each for each in outcomes if isinstance(each, Failure)], entries)
                on_pass(self.summary(runner))
        return self.summary(runner)

    def _refuse_failed(self, failures: Iterable[Failure], entries: Mapping[str, Entry]) -> None:
        """Write the error lines of requests that the engine refused. Raises any other error of the engine."""
        for failure in failures:
            if not isinstance(failure.error, UsageError):
                raise failure.error
            if failure.name not in self._failed:  # another completion of the line
                self._failed.add(failure.name)
                reason = f"line {entries[failure.name].number}: {failure.error}"
                self.answers.append([self.forms.refused(failure.name, reason)])
                self._refused += 1

    def _ask(self, entries: Sequence[Entry]) -> Iterator[BatchRequest]:
        for entry in entries:
            yield self.asking.request(self.requests.line(entry))

    def summary(self, runner: BatchRunner | None) -> Summary:
        """Return the summary so far, without a runner where there was nothing to compute."""
        work, counters = (runner.work, runner.pool.counters) if runner else (None, None)
        return Summary(
            lines=len(self.requests.entries),
            answered=self._answered,
            refused=self._refused,
            resumed=self._resumed,
            batch=runner.plan.batch if runner else 0,
            prompt_tokens=work.prompt_tokens if work else 0,
            new_tokens=work.new_tokens if work else 0,
            tokens=work.tokens if work else 0,
            tokens_left=self._left,
            passes=work.passes if work else 0,
            seconds=time.perf_counter() - self._started if runner else 0.0,
            hit_rate=counters.hit_rate if counters else 1.0,
            bytes_read=counters.bytes_read if counters else 0,
            peak_memory=peak_memory(),
            budget=runner.plan.ram if runner else 0,
        )
