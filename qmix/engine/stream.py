"""Prompt ids in, a stream of pieces of text out.

transformers' `generate` runs in one thread that lives as long as its runner (its pool of compute threads is then
always the same); a streamer there turns ids into text and finds stop sequences, and the caller takes the pieces
from a queue. Many prompts at once are another engine's, see `qmix.engine.batch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn
from transformers import MixtralForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qmix.engine.generation_config import decoding
from qmix.engine.sampling import Sampling
from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.machine.found import peak_memory
from qmix.model.kv_cache import PlannedCache
from qmix.plan.memory import PREFILL_CHUNK
from qmix.pool.counters import PoolCounters
from qmix.pool.experts import ExpertPool
from qmix.text.detokenizer import Detokenizer, StopScanner

SHARED_WEIGHTS = 2**19  # in the largest matrix of an expert, from where on cores share a product


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation. Times in seconds, memory in bytes.

    `finish_reason` is "stop" (end of text, or a stop sequence) or "length". `text` leaves out the stop sequence,
    `token_ids` are all that were generated. The first `reused_tokens` of the prompt were in the KV cache already, the
    `prefilled_tokens` were computed. `hit_rate` is the share of experts found in memory.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seed: int
    ttft_s: float
    tpot_s: float
    total_s: float
    peak_memory: int
    budget: int
    hits: int
    misses: int
    hit_rate: float
    bytes_read: int
    reused_tokens: int = 0

    @property
    def prefilled_tokens(self) -> int:
        return self.prompt_tokens - self.reused_tokens

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens computed a second, up to the first new token."""
        return self.prefilled_tokens / self.ttft_s

    @property
    def rate(self) -> float:
        """New tokens a second after the first; 0 where there was only one."""
        return 1 / self.tpot_s if self.tpot_s else 0.0

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        groups = {
            "usage": ("prompt_tokens", "reused_tokens", "completion_tokens"),
            "timings": ("ttft_s", "tpot_s", "total_s"),
            "memory": ("peak_memory", "budget"),
            "cache": ("hits", "misses", "hit_rate", "bytes_read"),
        }
        grouped = {group: {name: fields.pop(name) for name in names} for group, names in groups.items()}
        return fields | grouped


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more text, and the ids of the tokens since the last piece; the last one carries the result."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    result: Result | None = None


def compute_threads(geometry: Geometry) -> int:
    """Threads that share one product: as many as torch takes, but one for matrices that are done sooner by one.

    Waking the others costs some 20 microseconds; a matrix of half a million weights takes one core about that long.
    """
    largest = max(rows * cols for rows, cols in geometry.expert_matrices.values())
    return torch.get_num_threads() if largest >= SHARED_WEIGHTS else 1


class Engine:
    """The model with its pool, cache and thread. One generation at a time.

    `held` are the token ids whose keys and values the cache holds, of the last prompt and its answer.
    """

    def __init__(
        self,
        model: MixtralForCausalLM,
        pool: ExpertPool,
        cache: PlannedCache,
        decode: Callable[[Sequence[int]], str],
        budget: int,
    ) -> None:
        self.model, self.pool, self.cache, self.decode, self.budget = model, pool, cache, decode, budget
        threads = compute_threads(pool.store.geometry)
        self.closed = False
        self.held: list[int] = []
        self._thread = ThreadPoolExecutor(1, "qmix-compute", torch.set_num_threads, (threads,))

    def close(self) -> None:
        """Stop what is running, within a layer, and let go of the files; harmless to repeat."""
        self.closed = self.pool.cancelled = True
        self._thread.shutdown(cancel_futures=True)
        self.pool.close()

    def generate(self, prompt: list[int], sampling: Sampling, reuse: bool = False) -> Generator[Piece, None, None]:
        """Yield pieces, the last one with the result.

        With `reuse`, what the prompt has in common with `held`, from the beginning on, is not computed again. Closing
        the iterator stops the computation within a layer.
        """
        if self.closed:
            raise UsageError("this runner is closed; load the model again")
        queue: SimpleQueue[Piece | None] = SimpleQueue()
        job = self._thread.submit(self._run, prompt, sampling, reuse, queue.put)
        job.add_done_callback(lambda _: queue.put(None))
        try:
            while (piece := queue.get()) is not None:
                yield piece
            job.result()
        finally:
            if not job.done() and not job.cancel():  # one that waits for another has not begun
                self.pool.cancelled = True
                job.exception()
                self.pool.cancelled = self.closed

    def _run(self, prompt: list[int], sampling: Sampling, reuse: bool, send: Callable[[Piece], None]) -> None:
        before = self.pool.counters.copy()
        defaults = self.model.generation_config
        how = decoding(defaults, sampling)
        config = how.config
        config.prefill_chunk_size, config.use_cache = PREFILL_CHUNK, True
        answer = _Answer(Detokenizer(self.decode, prompt), StopScanner(how.stops), how.ends, send)
        reused = self._keep(prompt if reuse else [])
        ids = torch.tensor([prompt])
        self.model.generation_config = config  # transformers fills what is None here from the model's own
        try:
            with torch.inference_mode(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(sampling.seed)
                with self._prefilled(ids) if sampling.draft_ngram else nullcontext():
                    self.model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        generation_config=config,
                        cache=self.cache,
                        streamer=answer,
                        stopping_criteria=StoppingCriteriaList([_Stopped(answer)]),
                    )
        finally:
            self.model.generation_config = defaults
            self._note_held(prompt + answer.ids)
        answer.finish(self._result(answer, prompt, sampling, before, reused))

    def _keep(self, prompt: list[int]) -> int:
        """Crop the cache to what it has in common with the prompt, all but its last token; how many tokens that is.

        From there transformers goes on, a chunk at a time. The last token is always computed: its logits are needed.
        """
        same = common_prefix(self.held, prompt[:-1])
        self.cache.keep(same)
        self.held = []  # until the run has ended, one way or another
        return same

    def _note_held(self, ids: list[int]) -> None:
        """Crop the cache to the positions that every layer has, and that hold one of these tokens for certain.

        A run that was stopped has ended between two layers; one that drafts has tokens in it that nobody has seen.
        """
        self.held = ids[: self.cache.complete_length]
        self.cache.keep(len(self.held))

    @contextmanager
    def _prefilled(self, ids: torch.Tensor) -> Iterator[None]:
        """All but the last id in the cache, read a chunk at a time, and the model told to leave them out.

        With drafts transformers gives the model the whole prompt at once, which no plan for long ones allows.
        """
        for start in range(self.cache.get_seq_length(), ids.shape[1] - 1, PREFILL_CHUNK):
            chunk = ids[:, start : min(start + PREFILL_CHUNK, ids.shape[1] - 1)]
            self.model.model(chunk, cache=self.cache, use_cache=True)
        hook = self.model.register_forward_pre_hook(_without_cached, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _result(
        self, answer: _Answer, prompt: list[int], sampling: Sampling, before: PoolCounters, reused: int
    ) -> Callable[[str], Result]:
        count, used = len(answer.ids), self.pool.counters.since(before)
        decoding = answer.times[-1] - answer.times[0]

        def finished(text: str) -> Result:
            return Result(
                text=text,
                token_ids=answer.ids,
                finish_reason="stop" if answer.ended else "length",
                prompt_tokens=len(prompt),
                completion_tokens=count,
                seed=sampling.seed,
                ttft_s=answer.times[0] - answer.started,
                tpot_s=decoding / (count - 1) if count > 1 else 0.0,
                total_s=answer.times[-1] - answer.started,
                peak_memory=peak_memory(),
                budget=self.budget,
                hits=used.hits,
                misses=used.misses,
                hit_rate=used.hit_rate,
                bytes_read=used.bytes_read,
                reused_tokens=reused,
            )

        return finished


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two lists begin with in common."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _without_cached(
    module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments without the ids that its cache holds already."""
    cached = options["cache"].get_seq_length() - int(options["position_ids"][0, 0])
    for name in ("input_ids", "position_ids"):
        options[name] = options[name][:, cached:]
    return arguments, options


class _Answer(BaseStreamer):
    """An answer while it grows: takes ids from transformers, a step at a time, and sends pieces of text."""

    def __init__(
        self, detokenizer: Detokenizer, scanner: StopScanner, ends: frozenset[int], send: Callable[[Piece], None]
    ) -> None:
        self.detokenizer, self.scanner, self.ends, self.send = detokenizer, scanner, ends, send
        self.started = time.perf_counter()
        self.times: list[float] = []
        self.ids: list[int] = []
        self.ended = False
        self._prompt_seen = False
        self._text: list[str] = []
        self._sent = 0

    def put(self, value: torch.Tensor) -> None:
        """[1] id of one step, or [1, k] of a verified draft."""
        if not self._prompt_seen:  # transformers streams the prompt first
            self._prompt_seen = True
            return
        now = time.perf_counter()
        for token in value.flatten().tolist():
            self._add(token, now)

    def end(self) -> None:
        pass

    def finish(self, result: Callable[[str], Result]) -> None:
        self._pass_on(self.scanner.add(self.detokenizer.finish()) + self.scanner.finish())
        self.send(Piece("", [], result("".join(self._text))))

    def _add(self, token: int, now: float) -> None:
        if self.ended:  # what a draft had behind the end
            return
        self.times.append(now)
        self.ids.append(token)
        self._pass_on(self.scanner.add(self.detokenizer.add(token)))
        self.ended = self.scanner.stopped or token in self.ends

    def _pass_on(self, text: str) -> None:
        if text:
            self._text.append(text)
            self.send(Piece(text, self.ids[self._sent :]))
            self._sent = len(self.ids)


class _Stopped(StoppingCriteria):
    """True once a stop sequence was seen."""

    def __init__(self, answer: _Answer) -> None:
        self.answer = answer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.tensor([self.answer.scanner.stopped])
