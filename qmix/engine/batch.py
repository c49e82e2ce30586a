"""Many prompts together: continuous batching, a pass at a time.

A pass is one flat row of tokens: the next one of every sequence that is being continued, and pieces of the prompts
of new ones, as far as there is room. One read of an expert serves them all, so that where experts come
from disk, taking in a prompt costs no pass of its own. A pass of several chunks goes layer by layer, where that costs
the sequences that are being continued no time (`qmix.engine.pace`). A sequence that ends makes room for one that waits.

transformers has continuous batching too, made for GPUs. It takes memory by what is free and not by a plan; on CPUs it
gathers each sequence's keys and values anew in every pass and masks them against all others; all sequences share one
set of sampling options; and a token's numbers depend on its neighbours.
"""

from __future__ import annotations

import time
from collections import abc
from contextlib import closing

import torch

from qmix.checkpoint.torch_dtypes import HALF
from qmix.engine.completion import BatchOutcome, BatchResult, Failure, GrowingCompletion
from qmix.engine.figures import Requests, Work
from qmix.engine.opener import OpenModel
from qmix.engine.pace import Pace
from qmix.engine.prefill import read_together
from qmix.engine.running import BatchRequest, OnToken, RunningRequest, ignore_token
from qmix.engine.sampler import Chosen, Sampler, chosen_tokens
from qmix.engine.scheduler import Scheduler, Sequence, Slots
from qmix.errors import UsageError
from qmix.machine.rates import Rates
from qmix.model.attention import ROW_ATTENTION
from qmix.model.gpu.spread import spread_for
from qmix.model.gpu.steps import NOT_ON_GPUS, Steps
from qmix.model.kv import Chunk, KVCache, Rows, positions_of
from qmix.model.resident import ResidentSteps
from qmix.plan import Plan
from qmix.plan.device_memory import captured_tokens
from qmix.plan.memory import HEAD_ROWS, PREFILL_CHUNK
from qmix.progress import OnProgress, ignore
from qmix.store.opened import Store


class BatchRunner(OpenModel):
    """A model that continues up to `plan.batch` prompts at once.

    On the CPU they have `plan.batch * plan.context` tokens between them. On GPUs each has `plan.context`, and a pass is
    a captured step of at most 32 tokens, those of prompts included. An answer does not depend on what else is computed.
    Close it, or use it as a context manager.
    """

    def __init__(
        self, store: Store, plan: Plan, on_load: OnProgress = ignore, rates: Rates | None = None, kind: str = "cuda"
    ) -> None:
        """`rates` and `kind` are as Runner takes them. Raises UsageError for a plan with GPUs that no kernels serve."""
        self.plan, self.work, self._pace = plan, Work(), Pace(plan.prefill)
        dtype, spread = HALF[store.layout.dtype], spread_for(plan, rates or Rates(), kind)
        self._steps: Steps | None = None
        self.capacity = plan.batch * plan.context
        self._longest = self.capacity if spread is None else plan.context  # tokens of a sequence
        if spread is None:
            self._cache = KVCache(store.geometry, self.capacity, dtype, aligned=True)
            super().__init__(store, plan.slots_by_size, ROW_ATTENTION, invariant=True, on_load=on_load)
        else:
            homes = [device.device for device in spread.layers]
            self._cache = KVCache(store.geometry, plan.context, dtype, plan.batch, homes)
            super().__init__(store, plan.slots_by_size, "sdpa", spread=spread, invariant=True, on_load=on_load)
            self._steps = self.capture(spread, self._cache, captured_tokens(store.geometry, plan.context, plan.batch))
            if self._steps is None or self._steps.cpu_layers:
                self.close()
                raise UsageError(NOT_ON_GPUS)
        self._scheduler = self._new_scheduler()
        self._running: dict[Sequence, RunningRequest] = {}

    def _new_scheduler(self) -> Scheduler:
        if self._steps is None:
            return Scheduler(self._longest, self.plan.batch, PREFILL_CHUNK)
        return Scheduler(self._longest, self.plan.batch, self._steps.rows, Slots(self.plan.batch, self.plan.context))

    def start_over(self) -> None:
        """Forget all requests. Prefixes are kept, unless a pass was stopped before their rows were copied."""
        if self._scheduler.take_copies():
            self._scheduler = self._new_scheduler()
        self._scheduler.clear()
        self._running.clear()
        self.work.prompt = 0

    def answer(self, requests: abc.Iterable[BatchRequest]) -> abc.Generator[list[BatchResult], None, None]:
        """Yield after every pass the results that it finished, which may be none.

        Requests are taken as there is room; one for several completions has a result for each. An answer ends where
        prompt and answer fill the capacity. What interrupts the caller ends a pass at the next expert. Raises
        UsageError where a prompt leaves no room, and the error of any other request that failed.
        """
        with closing(self.outcomes(requests)) as passes:
            for outcomes in passes:
                yield [each for each in outcomes if isinstance(each, BatchResult)]
                for each in outcomes:
                    if isinstance(each, Failure):
                        raise each.error

    def outcomes(self, requests: abc.Iterable[BatchRequest]) -> abc.Generator[list[BatchOutcome], None, None]:
        """Yield results as `answer` does, and the failures of single requests among them: the others go on."""
        waiting, more = iter(requests), True
        try:
            while more or self._running:
                refused: list[BatchOutcome] = []
                while more and len(self._running) < self.plan.batch:
                    if (request := next(waiting, None)) is None:
                        more = False
                    else:
                        refused += self._begin_all(request)
                if refused:
                    yield refused
                if self._running:
                    yield self.step()
        finally:  # a caller that has had enough leaves nothing behind
            self.start_over()

    def _begin_all(self, request: BatchRequest) -> list[Failure]:
        """Begin the completions of a request; return the failures of the ones that cannot be answered."""
        failures = []
        for each in request.completions():
            try:
                self.begin(each)
            except UsageError as error:
                failures.append(Failure(each.name, each.index, error))
        return failures

    def requests(self) -> Requests:
        """Return how many requests have a place."""
        return Requests(len(self._running), 0, self.plan.batch)

    def begin(self, request: BatchRequest, on_token: OnToken = ignore_token) -> Sequence:
        """Take in a request, which joins the passes as there is room, and return what `drop` takes.

        `on_token` receives each token in the compute thread. Raises UsageError where the prompt leaves no room.
        """
        prompt = list(request.prompt)
        limit = min(len(prompt) + request.sampling.max_new_tokens, self._longest + 1)
        if not prompt or limit <= len(prompt):
            raise UsageError(f"{request.name}: a prompt of {len(prompt)} tokens, planned for 1 to {self._longest}")
        request.sampling.check_vocabulary(self.store.geometry.vocab_size)
        echo = request.echo and request.sampling.logprobs is not None
        if echo and self._steps is not None:
            raise UsageError(f"{request.name}: echo with logprobs is computed on the CPU only; run it without GPUs")
        sequence = Sequence(prompt, limit, shares=not echo)
        constraint = self.constraint(request.sampling, self.plan)
        sampler = Sampler(self.model, request.sampling, prompt, constraint)
        completion = GrowingCompletion(prompt, sampler.decoding, self.decode, constraint)
        self._running[sequence] = running = RunningRequest(request, sampler, completion, on_token)
        if echo:
            running.prompt.append(Chosen(prompt[0]))
        self._scheduler.add(sequence)
        return sequence

    def drop(self, sequence: Sequence) -> None:
        """Forget a request between two passes; its room is free for others. Harmless when it has ended."""
        if self._running.pop(sequence, None) is not None:
            self._scheduler.drop(sequence)

    def step(self) -> list[BatchOutcome]:
        """Run one pass of the requests that were begun, and return the results that it finished.

        A request whose next token cannot be chosen is among them as a failure. Raises what fails the whole pass.
        """
        return self.thread.run(self._pass)

    @torch.inference_mode()
    def _pass(self) -> list[BatchOutcome]:
        """Run one pass, choose a token for every sequence whose tokens are all done, and return what that finished."""
        if self._steps is None:  # else a pass has the tokens of a captured step
            self._scheduler.pass_tokens = self._pace.tokens([len(each.tokens) - each.done for each in self._running])
        chosen = self._scheduler.next_pass()
        for copy in self._scheduler.places.copies:
            self._cache.copy_rows(*copy)
        self._scheduler.take_copies()
        chunks = [
            Chunk(
                sequence.tokens[sequence.done : sequence.done + count],
                sequence.done,
                sequence.start,
                wanted=sequence.done + count == len(sequence.tokens),
            )
            for sequence, count in chosen
        ]
        tokens = sum(count for _, count in chosen)
        continued = sum(bool(self._running[sequence].tokens) for sequence, _ in chosen)
        self.work.prompt = tokens - continued
        started, waited, reading = time.perf_counter(), self.pool.waited, self.pool.reading
        if self._steps is not None:
            logits = self._steps.chunks(chunks)
        else:
            hidden = self._hidden(chunks)
            self._score_prompts(chosen, hidden)
            logits = self._logits(chunks, hidden)
        seconds = time.perf_counter() - started
        self._pace.note(tokens, seconds, self.pool.waited - waited, self.pool.reading - reading)
        for sequence, count in chosen:
            sequence.done += count
        ready = [sequence for sequence, _ in chosen if sequence.done == len(sequence.tokens)]
        outcomes = [self._advance(sequence, scores.float()) for sequence, scores in zip(ready, logits, strict=True)]
        self.work.end_pass(tokens, continued, time.perf_counter() - started)
        return [each for each in outcomes if each is not None]

    def forward(self, chunks: abc.Sequence[Chunk]) -> torch.Tensor:
        """Return the logits [wanted chunks, V] of one pass."""
        if self._steps is not None:
            return self._steps.chunks(chunks)
        return self._logits(chunks, self._hidden(chunks))

    @torch.inference_mode()
    def _hidden(self, chunks: abc.Sequence[Chunk]) -> torch.Tensor:
        """Return the last hidden states [T, H] of one pass; those of many tokens go layer by layer."""
        if sum(len(chunk.tokens) for chunk in chunks) <= PREFILL_CHUNK:
            return self._whole_pass(chunks)
        hidden = read_together(self.model, self._cache, chunks)
        for rows in hidden.split(PREFILL_CHUNK):  # in place: a norm takes copies in fp32
            rows.copy_(self.model.model.norm(rows))
        return hidden

    def _logits(self, chunks: abc.Sequence[Chunk], hidden: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([len(chunk.tokens) for chunk in chunks]).cumsum(0) - 1
        wanted = ends[torch.tensor([chunk.wanted for chunk in chunks])]
        return self.model.lm_head(hidden[wanted]) if len(wanted) else hidden.new_empty(0, 0)

    def _whole_pass(self, chunks: abc.Sequence[Chunk]) -> torch.Tensor:
        """Return the hidden states [T, H] of all tokens of a pass, of a chunk at most."""
        self._cache.rows = rows = Rows.of(chunks, self.store.geometry.sliding_window)
        ids = torch.tensor([[token for chunk in chunks for token in chunk.tokens]])
        positions, steps = positions_of(chunks)[None], self.model.steps
        found = steps.rows(ids, positions, self._cache, rows) if isinstance(steps, ResidentSteps) else None
        if found is not None:
            return found[0]
        options = {"position_ids": positions, "cache": self._cache, "use_cache": True, "rows": rows}
        with self.model.few_threads(ids):
            hidden: torch.Tensor = self.model.model(ids, **options).last_hidden_state[0]
        return hidden

    def _score_prompts(self, chosen: abc.Sequence[tuple[Sequence, int]], hidden: torch.Tensor) -> None:
        """Add the log-probabilities of the prompt tokens after those of this pass, where they are requested."""
        first = 0
        for sequence, count in chosen:
            answer = self._running[sequence]
            prompt, rows = answer.request.prompt, hidden[first : first + count]
            first += count
            if answer.prompt and sequence.done < len(prompt):
                following = prompt[sequence.done + 1 : sequence.done + 1 + count]
                for start in range(0, len(following), HEAD_ROWS):
                    targets = following[start : start + HEAD_ROWS]
                    logits = self.model.lm_head(rows[start : start + len(targets)])
                    answer.prompt += chosen_tokens(targets, logits.float(), answer.sampler.logprobs)

    def _advance(self, sequence: Sequence, logits: torch.Tensor) -> BatchOutcome | None:
        """Add a token to a sequence; return the result if that ends it. A failure here is the request's alone."""
        answer = self._running[sequence]
        found: BatchOutcome
        try:
            self._add_token(sequence, logits)
            if not (answer.completion.ended or len(sequence.tokens) == sequence.limit):
                return None
            found = answer.result(sequence.shared)
        except Exception as error:
            found = Failure(answer.request.name, answer.request.index, error)
        self.drop(sequence)
        return found

    def _add_token(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Choose a sequence's next token from logits [V] in fp32."""
        answer = self._running[sequence]
        chosen = answer.sampler.sample(sequence.tokens, logits)
        if not answer.tokens:
            self.work.prompt_tokens += answer.completion.prompt_tokens
            self.work.reused_tokens += sequence.shared
        self.work.new_tokens += 1
        sequence.tokens.append(chosen.token)
        answer.tokens.append(chosen)
        answer.on_token(chosen, answer.completion.add(chosen.token))
