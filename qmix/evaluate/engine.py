"""Answers of a store's model to requests; kept results are looked up, the others computed and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from qmix.engine.batch import BatchRunner
from qmix.engine.gpu_scoring import GpuScorer
from qmix.engine.passes import Query, make_pass, spans
from qmix.engine.running import BatchRequest
from qmix.engine.scoring import Score, Scorer
from qmix.evaluate.budget import Budget
from qmix.evaluate.prompt import Prompt
from qmix.evaluate.results import Results
from qmix.geometry import Geometry
from qmix.machine.found import peak_memory
from qmix.machine.rates import Machine
from qmix.pool.experts import ExpertPool
from qmix.progress import OnProgress, ignore
from qmix.store.opened import Store

GPU_PASS = 2**11  # tokens after which progress is shown and results are kept, on GPUs


@dataclass(slots=True)
class Work:
    """Progress of an evaluation. Repeated requests count once; seconds and tokens are of this run only.

    `tokens_left` is an upper bound on the tokens that the requests so far will still take through the model.
    """

    requests: int = 0
    done: int = 0
    kept: int = 0  # of `done`, from earlier runs
    tokens: int = 0
    tokens_left: int = 0
    passes: int = 0
    seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    peak_memory: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the figures of results.json."""
        names = ("requests", "kept", "tokens", "passes", "seconds", "hits", "misses", "bytes_read", "peak_memory")
        return {name: getattr(self, name) for name in names}


OnWork = Callable[[Work], None]


@dataclass(slots=True)
class StoreEngine:
    """A RequestEngine over a store under a memory budget.

    `base` is this process's memory, in bytes, before it loaded tasks. `gpus` is a machine whose GPUs take part.
    `loading` displays the reading of experts in advance and `showing` the work; each is entered when that starts.
    """

    store: Store
    results: Results
    ram: int | None
    batch_tokens: int | None
    base: int
    gpus: Machine | None = None
    loading: Callable[[], AbstractContextManager[OnProgress]] = lambda: nullcontext(ignore)
    showing: Callable[[], AbstractContextManager[OnWork]] = lambda: nullcontext(lambda work: None)
    work: Work = field(default_factory=Work)
    budget: Budget = field(init=False)

    def __post_init__(self) -> None:
        self.budget = Budget(self.store.layout, self.ram, self.batch_tokens, self.base, self.gpus)

    @property
    def geometry(self) -> Geometry:
        return self.store.geometry

    def check(self, queries: Sequence[Query], prompts: Sequence[Prompt]) -> None:
        """Check the budget against all coming requests. Raises DoesNotFitError, naming a budget that fits all."""
        scores = [query for query in queries if self.results.get(self._score_key(query)) is None]
        texts = [prompt for prompt in prompts if self.results.get(self._prompt_key(prompt)) is None]
        self.budget.check(scores, texts)

    def _score_key(self, query: Query) -> bytes:
        return self.results.key(b"score", query.inputs, query.targets)

    def _prompt_key(self, prompt: Prompt) -> bytes:
        return self.results.key(b"generate", prompt.part())

    def score(self, queries: Sequence[Query]) -> list[Score]:
        """Return the score of each query."""
        keys = [self._score_key(query) for query in queries]
        missing = self._missing(dict(zip(keys, queries, strict=True)))
        if missing:
            self._score(missing)
        return [Score(*self.results.get(key)) for key in keys]

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids that continue each prompt."""
        keys = [self._prompt_key(prompt) for prompt in prompts]
        missing = self._missing(dict(zip(keys, prompts, strict=True)))
        if missing:
            self._generate(missing)
        return [self.results.get(key) for key in keys]

    def _missing(self, wanted: dict[bytes, Any]) -> dict[bytes, Any]:
        """Return the requests without a kept result, and count all of them."""
        missing = {key: value for key, value in wanted.items() if self.results.get(key) is None}
        self.work.requests += len(wanted)
        self.work.kept += len(wanted) - len(missing)
        self.work.done += len(wanted) - len(missing)
        return missing

    def _score(self, missing: dict[bytes, Query]) -> None:
        pairs = sorted((query, key) for key, query in missing.items())
        queries, keys = [query for query, _ in pairs], [key for _, key in pairs]
        open_scorer, tokens = self._scorer(queries)
        parts = spans(queries, tokens)
        self.work.tokens_left = sum(part.rows for part in parts)
        with self.loading() as on_load:
            scorer = open_scorer(on_load)
        with scorer, self.showing() as on_work:
            clock = _Clock(self.work, scorer.pool, on_work)
            for part in parts:
                scores = scorer.score(make_pass(queries[part.first : part.last]), clock.layers(part.rows))
                found = zip(keys[part.first : part.last], scores, strict=True)
                self.results.add({key: [score.logprob, score.greedy] for key, score in found})
                clock.finished(len(scores))

    def _scorer(self, queries: list[Query]) -> tuple[Callable[[OnProgress], Scorer | GpuScorer], int]:
        """Return a function that opens a scorer, and the tokens of its passes."""
        if self.gpus is None:
            plan = self.budget.scoring_plan(queries)
            return partial(Scorer, self.store, plan), plan.tokens
        on_gpus = self.budget.gpu_scoring_plan(queries)
        rates = self.gpus.speeds
        return (lambda on_load: GpuScorer(self.store, on_gpus, on_load, rates)), max(on_gpus.context, GPU_PASS)

    def _generate(self, missing: dict[bytes, Prompt]) -> None:
        needs = {key: prompt.needs for key, prompt in missing.items()}
        plan = self.budget.lines_plan(list(missing.values()))
        requests = (BatchRequest(key.hex(), prompt.tokens, prompt.sampling) for key, prompt in missing.items())
        self.work.tokens_left = sum(needs.values())
        with self.loading() as on_load:
            runner = BatchRunner(self.store, plan, on_load, self.gpus.speeds if self.gpus else None)
        with runner, self.showing() as on_work:
            clock, before = _Clock(self.work, runner.pool, on_work), 0
            for finished in runner.answer(requests):
                keys = [bytes.fromhex(answer.name) for answer in finished]
                if finished:
                    self.results.add({key: answer.token_ids for key, answer in zip(keys, finished, strict=True)})
                clock.add(runner.work.tokens - before, sum(map(needs.__getitem__, keys)))
                clock.finished(len(finished))
                before = runner.work.tokens


class _Clock:
    """Adds a model's time, tokens and reads since its creation to the work, and reports them."""

    def __init__(self, work: Work, pool: ExpertPool, on_work: OnWork) -> None:
        self.work, self.pool, self.on_work = work, pool, on_work
        self._time, self._counters = time.perf_counter(), pool.counters.copy()

    def layers(self, rows: int) -> Callable[[int], None]:
        """Return a callback for a pass of `rows` rows: each finished layer counts an equal share of them."""
        count = self.pool.store.geometry.num_layers

        def done(layers: int) -> None:
            share = rows * layers // count - rows * (layers - 1) // count
            self.add(share, share)
            self.on_work(self.work)

        return done

    def add(self, tokens: int, no_longer: int) -> None:
        """Add `tokens` that went through the model; `no_longer` is how many fewer are left."""
        work, now, counters = self.work, time.perf_counter(), self.pool.counters.copy()
        since = counters.since(self._counters)
        work.tokens += tokens
        work.tokens_left -= no_longer
        work.seconds += now - self._time
        work.hits += since.hits
        work.misses += since.misses
        work.bytes_read += since.bytes_read
        work.peak_memory = peak_memory()
        self._time, self._counters = now, counters

    def finished(self, requests: int) -> None:
        """Count a finished pass and the requests that it answered."""
        self.add(0, 0)
        self.work.done += requests
        self.work.passes += 1
        self.on_work(self.work)
