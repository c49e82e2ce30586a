"""Prompt ids in, a stream of pieces of text out.

transformers' `generate` runs in one thread that lives as long as its runner (its pool of compute threads is then
always the same); a streamer there turns ids into text and finds stop sequences, and the caller takes the pieces
from a queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from transformers import GenerationConfig, MixtralForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.kv_cache import PlannedCache
from qmix.machine import peak_memory
from qmix.plan import PREFILL_CHUNK
from qmix.pool import ExpertPool, PoolCounters
from qmix.sampling import Sampling
from qmix.text import Detokenizer, StopScanner

SHARED_WEIGHTS = 2**19  # in the largest matrix of an expert, from where on cores share a product


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation. Times in seconds, memory in bytes.

    `finish_reason` is "stop" (end of text, or a stop sequence) or "length". `text` leaves out the stop sequence,
    `token_ids` are all that were generated. `hit_rate` is the share of experts found in memory.
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

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens a second, up to the first new token."""
        return self.prompt_tokens / self.ttft_s

    @property
    def rate(self) -> float:
        """New tokens a second after the first; 0 where there was only one."""
        return 1 / self.tpot_s if self.tpot_s else 0.0

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        groups = {
            "usage": ("prompt_tokens", "completion_tokens"),
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
    """The model with its pool, cache and thread. One generation at a time."""

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
        self._thread = ThreadPoolExecutor(1, "qmix-compute", torch.set_num_threads, (threads,))

    def close(self) -> None:
        """Stop what is running, within a layer, and let go of the files; harmless to repeat."""
        self.closed = self.pool.cancelled = True
        self._thread.shutdown(cancel_futures=True)
        self.pool.close()

    def generate(self, prompt: list[int], sampling: Sampling) -> Iterator[Piece]:
        """Yield pieces, the last with the result. Closing the iterator stops the computation within a layer."""
        if self.closed:
            raise UsageError("this runner is closed; load the model again")
        queue: SimpleQueue[Piece | None] = SimpleQueue()
        job = self._thread.submit(self._run, prompt, sampling, queue)
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

    def _run(self, prompt: list[int], sampling: Sampling, queue: SimpleQueue[Piece | None]) -> None:
        before = self.pool.counters.copy()
        self.cache.reset()
        stream = _Stream(Detokenizer(self.decode, prompt), StopScanner(sampling.stop), queue)
        ids = torch.tensor([prompt])
        defaults, config = self.model.generation_config, self._config(sampling)
        self.model.generation_config = config  # transformers fills what is None here from the model's own
        try:
            with torch.inference_mode(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(sampling.seed)
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    cache=self.cache,
                    streamer=stream,
                    stopping_criteria=StoppingCriteriaList([_Stopped(stream)]),
                )
        finally:
            self.model.generation_config = defaults
        stream.finish(self._result(stream, prompt, sampling, config, before))

    def _config(self, sampling: Sampling) -> GenerationConfig:
        """The model's own defaults with the options of this run on top."""
        config = GenerationConfig(**self.model.generation_config.to_diff_dict())
        config.update(**sampling.overrides())
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
        config.prefill_chunk_size = PREFILL_CHUNK
        config.use_cache = True
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = config.min_p = None
        return config

    def _result(
        self,
        stream: _Stream,
        prompt: list[int],
        sampling: Sampling,
        config: GenerationConfig,
        before: PoolCounters,
    ) -> Callable[[str], Result]:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        stopped = stream.scanner.stopped or stream.ids[-1] in ends
        count, used = len(stream.ids), self.pool.counters.since(before)
        decoding = stream.times[-1] - stream.times[0]

        def finished(text: str) -> Result:
            return Result(
                text=text,
                token_ids=stream.ids,
                finish_reason="stop" if stopped else "length",
                prompt_tokens=len(prompt),
                completion_tokens=count,
                seed=sampling.seed,
                ttft_s=stream.times[0] - stream.started,
                tpot_s=decoding / (count - 1) if count > 1 else 0.0,
                total_s=time.perf_counter() - stream.started,
                peak_memory=peak_memory(),
                budget=self.budget,
                hits=used.hits,
                misses=used.misses,
                hit_rate=used.hit_rate,
                bytes_read=used.bytes_read,
            )

        return finished


class _Stream(BaseStreamer):
    """Takes ids from transformers and puts pieces of text on a queue."""

    def __init__(self, detokenizer: Detokenizer, scanner: StopScanner, queue: SimpleQueue[Piece | None]) -> None:
        self.detokenizer, self.scanner, self.queue = detokenizer, scanner, queue
        self.started = time.perf_counter()
        self.times: list[float] = []
        self.ids: list[int] = []
        self._text: list[str] = []
        self._sent = 0
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # transformers streams the prompt first
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        for token in value.view(-1).tolist():
            self.ids.append(token)
            self._send(self.scanner.add(self.detokenizer.add(token)))

    def end(self) -> None:
        pass

    def finish(self, result: Callable[[str], Result]) -> None:
        self._send(self.scanner.add(self.detokenizer.finish()) + self.scanner.finish())
        self.queue.put(Piece("", [], result("".join(self._text))))

    def _send(self, text: str) -> None:
        if text:
            self._text.append(text)
            self.queue.put(Piece(text, self.ids[self._sent :]))
            self._sent = len(self.ids)


class _Stopped(StoppingCriteria):
    """True once the stream has seen a stop sequence."""

    def __init__(self, stream: _Stream) -> None:
        self.stream = stream

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stream.scanner.stopped)
