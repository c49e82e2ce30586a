"""From a store and a plan to something that answers many prompts at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import MixtralForCausalLM, PreTrainedTokenizerBase

from qmix.checkpoint.torch_dtypes import HALF
from qmix.engine.batch import ContinuousEngine
from qmix.engine.generation_config import model_generation_config
from qmix.engine.sampler import Chosen, Sampler
from qmix.engine.sampling import Sampling
from qmix.engine.scheduler import Continuation
from qmix.errors import UsageError
from qmix.machine.found import give_back_freed_memory
from qmix.model.build import build_model
from qmix.model.kv_arena import ROW_ATTENTION, Arena, register
from qmix.plan import Plan
from qmix.pool.experts import ExpertPool
from qmix.progress import OnProgress, ignore
from qmix.store.opened import Store
from qmix.text.detokenizer import Detokenizer, StopScanner
from qmix.text.tokenizer import decode, load_tokenizer


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as ids, by a name of the caller's; `sampling.seed` fixes its draws.

    `logprobs` is how many of the likeliest tokens are told at each place, None for no log-probabilities.
    """

    name: str
    prompt: Sequence[int]
    sampling: Sampling
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What was made of a request. `finish_reason` is "stop" (end of text, or a stop sequence) or "length".

    `text` leaves out the stop sequence, `tokens` are all that were chosen.
    """

    name: str
    text: str
    tokens: list[Chosen]
    finish_reason: str
    prompt_tokens: int

    @property
    def token_ids(self) -> list[int]:
        return [chosen.token for chosen in self.tokens]


@dataclass(slots=True)
class Work:
    """What a runner has done so far: passes, tokens that went through the model, and of answers begun their tokens."""

    passes: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Growing:
    """An answer while it grows."""

    request: Request
    sequence: Continuation
    sampler: Sampler
    detokenizer: Detokenizer
    scanner: StopScanner
    tokens: list[Chosen] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    ended: bool = False

    def add(self, chosen: Chosen) -> bool:
        """Whether it goes on after this token."""
        self.tokens.append(chosen)
        self.sequence.tokens.append(chosen.token)
        self.text.append(self.scanner.add(self.detokenizer.add(chosen.token)))
        self.ended = self.scanner.stopped or chosen.token in self.sampler.decoding.ends
        return not self.ended and len(self.sequence.tokens) < self.sequence.limit

    def answer(self) -> Answer:
        self.text += [self.scanner.add(self.detokenizer.finish()), self.scanner.finish()]
        reason = "stop" if self.ended else "length"
        return Answer(self.request.name, "".join(self.text), self.tokens, reason, len(self.request.prompt))


class BatchRunner:
    """A model that continues up to `plan.batch` prompts at once, with `plan.batch * plan.context` tokens between them.

    An answer does not depend on what else is computed. Close it, or use it as a context manager.
    """

    def __init__(self, store: Store, plan: Plan, on_load: OnProgress = ignore) -> None:
        give_back_freed_memory()
        register()
        self.store, self.plan, self.work = store, plan, Work()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(store.directory)
        pool = ExpertPool(store, plan.slots_by_size, invariant=True)
        try:
            model = build_model(store, pool, ROW_ATTENTION)
            model.generation_config = model_generation_config(store.directory, store.config)
            if pool.holds_all:
                pool.fill(on_load)
            self.capacity = plan.batch * plan.context
            arena = Arena(store.geometry, self.capacity, HALF[store.layout.dtype])
            self.engine = ContinuousEngine(model, pool, arena, self.capacity, plan.batch)
        except BaseException:
            pool.close()
            raise
        self._growing: dict[Continuation, _Growing] = {}

    @property
    def model(self) -> MixtralForCausalLM:
        return self.engine.model

    @property
    def pool(self) -> ExpertPool:
        return self.engine.pool

    def __enter__(self) -> BatchRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.engine.close()

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Answer]]:
        """After every pass the answers that it finished, which may be none. Requests are taken as there is room.

        An answer ends where prompt and answer fill the capacity. Raises UsageError where a prompt leaves no room.
        """
        waiting, more = iter(requests), True
        try:
            while more or self._growing:
                while more and len(self._growing) < self.plan.batch:
                    if (request := next(waiting, None)) is None:
                        more = False
                    else:
                        self._begin(request)
                if self._growing:
                    yield self._pass()
        finally:  # whoever has had enough leaves nothing behind
            self._growing.clear()
            self.engine.clear()

    def _begin(self, request: Request) -> None:
        prompt = list(request.prompt)
        limit = min(len(prompt) + request.sampling.max_new_tokens, self.capacity + 1)
        if not prompt or limit <= len(prompt):
            raise UsageError(f"{request.name}: a prompt of {len(prompt)} tokens, planned for 1 to {self.capacity}")
        sequence = Continuation(prompt, limit)
        sampler = Sampler(self.model, request.sampling, prompt, request.logprobs)
        scanner = StopScanner(sampler.decoding.stops)
        self._growing[sequence] = _Growing(request, sequence, sampler, Detokenizer(self._decode, prompt), scanner)
        self.engine.scheduler.add(sequence)

    def _pass(self) -> list[Answer]:
        finished = []

        def take(sequence: Continuation, logits: torch.Tensor) -> bool:
            growing = self._growing[sequence]
            self.work.prompt_tokens += 0 if growing.tokens else len(growing.request.prompt)
            goes_on = growing.add(growing.sampler.sample(sequence.tokens, logits))
            self.work.new_tokens += 1
            if not goes_on:
                finished.append(self._growing.pop(sequence).answer())
            return goes_on

        self.work.tokens += self.engine.step(take)
        self.work.passes += 1
        return finished

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self.tokenizer, ids)
