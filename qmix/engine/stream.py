"""One prompt at a time: transformers' `generate` in the compute thread, pieces of text to the caller.

A streamer in that thread turns ids into text and finds stop sequences; the caller takes the pieces from a queue. Many
prompts at once are `qmix.engine.batch`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteriaList
from transformers.generation import LogitsProcessorList

from qmix.checkpoint.torch_dtypes import HALF
from qmix.engine.completion import GrowingCompletion, Piece, Result
from qmix.engine.device_choice import plain_temperature
from qmix.engine.figures import Requests, Work
from qmix.engine.generation_config import Decoding, decoding
from qmix.engine.kept_placement import keep, with_kept
from qmix.engine.opener import OpenModel
from qmix.engine.prefill import known_chunk, read_prompt
from qmix.engine.prefixes import common_prefix
from qmix.engine.processors import own_processors
from qmix.engine.sampling import Sampling
from qmix.engine.streamer import PieceStreamer, StopAtSequence
from qmix.errors import UsageError, arg
from qmix.machine.found import peak_memory
from qmix.machine.rates import Rates
from qmix.model.gpu.prompt import read_on_gpus
from qmix.model.gpu.spread import residents, spread_for
from qmix.model.kv import KVCache
from qmix.model.kv_file import kv_identity, read_kv, write_kv
from qmix.plan import Plan
from qmix.plan.device_memory import captured_tokens
from qmix.plan.memory import PREFILL_CHUNK
from qmix.pool.counters import PoolCounters
from qmix.progress import OnProgress, ignore
from qmix.store.opened import Store
from qmix.text.prompt import PromptEncoder


class Runner(OpenModel):
    """A model ready to generate, one prompt at a time. Close it, or use it as a context manager.

    `model` is transformers' MixtralForCausalLM and can be used as any; `plan` says what lies where.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        attention: str = "sdpa",
        on_load: OnProgress = ignore,
        rates: Rates | None = None,
        kind: str = "cuda",
        keeps: bool = False,
    ) -> None:
        """`rates` say how fast the machine is. `kind` is torch's name for what stands behind the plan's GPUs.

        With `keeps` the run begins with the residents that the last one by this plan ended with, and keeps its own.
        """
        self._spread = spread = spread_for(plan, rates or Rates(), kind)
        asked = plan
        if keeps and spread:
            spread.plan = plan = with_kept(store, plan, spread.cards)
        self.plan, self.work = plan, Work()
        devices = [device.device for device in spread.layers] if spread else None
        self.cache = KVCache(store.geometry, plan.context, HALF[store.layout.dtype], layer_devices=devices)
        super().__init__(store, plan.slots_by_size, attention, spread=spread, on_load=on_load)
        rows = captured_tokens(store.geometry, plan.context, plan.batch)
        self._steps = self.capture(spread, self.cache, rows) if spread else None
        if keeps and spread:
            self._opened.callback(self._keep_residents, asked, spread.cards)
        self.encoder = PromptEncoder(self.tokenizer, plan.context, store.geometry.max_position)
        self._held: list[int] = []

    def generate(
        self, prompt: str | list[int], sampling: Sampling | None = None, *, reuse: bool = False, **options: Any
    ) -> Iterator[Piece]:
        """Stream the continuation of a prompt (text, or token ids): pieces of text, the last with `.result`.

        Options are Sampling's fields. With `n` completions one follows the other, each with its result. With `reuse`,
        tokens that the prompt begins with and the KV cache still holds are not computed again. Their keys and values
        may be rounded differently, because they were computed one token at a time and not as one prompt: where two
        tokens are nearly as likely, the text may differ from that of a fresh run. Closing the iterator stops the
        computation within a layer, or within a token if all experts are in memory. Raises UsageError where the prompt
        is empty or does not fit the context.
        """
        if sampling is not None and options:
            raise UsageError("give either a Sampling or its fields, not both")
        sampling, ids = sampling or Sampling(**options), self._ids(prompt)
        sampling.check_vocabulary(self.store.geometry.vocab_size)
        self.constraint(sampling, self.plan)  # whatever is wrong is told before the run
        room = self.plan.context - len(ids)
        return self._completions(ids, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room)), reuse)

    def complete(self, prompt: str | list[int], sampling: Sampling | None = None, **options: Any) -> Result:
        """Return the whole continuation at once; parameters and errors as `generate`, for one completion."""
        if (n := sampling.n if sampling is not None else options.get("n", 1)) != 1:
            raise UsageError(f"{arg('n')} {n}: `complete` returns one completion; use `generate`")
        for piece in self.generate(prompt, sampling, **options):
            if piece.result is not None:
                return piece.result
        raise AssertionError("a generation ended without a result")

    def _keep_residents(self, plan: Plan, cards: list[str]) -> None:
        """Keep the residents that are there now for the next run by `plan`, where experts were exchanged."""
        moved = self._steps.exchanges.moved if self._steps is not None else {}
        if moved:
            others = [key for key in residents(self.plan) if key[0] not in moved]
            keep(self.store, plan, cards, [*others, *((layer, each) for layer, row in moved.items() for each in row)])

    def requests(self) -> Requests:
        """Return how many prompts are being answered: one."""
        return Requests()

    @property
    def held(self) -> list[int]:
        """The token ids whose keys and values the KV cache holds: what `reuse` can go on from."""
        return list(self._held)

    def save_cache(self, path: Path) -> int:
        """Write the KV cache's content to a safetensors file; return how many tokens it holds. Raises OSError."""
        write_kv(path, self.cache, self._held, kv_identity(self.store))
        return len(self._held)

    def load_cache(self, path: Path) -> int:
        """Read a KV cache that `save_cache` wrote; return how many tokens it holds.

        Raises SessionError where it is damaged, or belongs to another store. The cache is then empty.
        """
        self._held = []
        self._held = read_kv(path, self.cache, kv_identity(self.store))
        return len(self._held)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str) and not prompt.strip():
            raise UsageError("the prompt is empty; give some text to continue")
        ids = self.encoder.ids(prompt) if isinstance(prompt, str) else list(prompt)
        if not all(type(token) is int for token in ids):
            raise UsageError("the prompt must be text, or a list of whole numbers")
        if not ids:
            raise UsageError("the prompt has no tokens; give some text to continue")
        worst = max(ids, key=abs)
        if not 0 <= worst < self.store.geometry.vocab_size or min(ids) < 0:
            raise UsageError(f"the prompt holds the token id {worst}, outside the model's vocabulary")
        self.encoder.check_count(len(ids))
        return ids

    def _completions(self, prompt: list[int], sampling: Sampling, reuse: bool) -> Generator[Piece, None, None]:
        """Yield the pieces of each completion; those after the first find the prompt in the cache."""
        for index, one in enumerate(sampling.completions()):
            yield from self._stream(prompt, one, reuse or index > 0)

    def _stream(self, prompt: list[int], sampling: Sampling, reuse: bool) -> Generator[Piece, None, None]:
        """Yield pieces while the compute thread makes them; stop it when the caller has had enough."""
        queue: SimpleQueue[Piece | None] = SimpleQueue()
        job = self.thread.start(self._run, prompt, sampling, reuse, queue.put)
        job.add_done_callback(lambda _: queue.put(None))
        try:
            while (piece := queue.get()) is not None:
                yield piece
            job.result()
        finally:
            self.thread.stop(job)

    def _run(self, prompt: list[int], sampling: Sampling, reuse: bool, send: Callable[[Piece], None]) -> None:
        before = self.pool.counters.copy()
        defaults = self.model.generation_config
        how = decoding(defaults, sampling)
        config = how.config
        config.prefill_chunk_size, config.use_cache = PREFILL_CHUNK, True
        constraint = self.constraint(sampling, self.plan)
        own = own_processors(sampling, len(prompt), constraint)
        completion = GrowingCompletion(prompt, how, self.decode, constraint)
        streamer = PieceStreamer(completion, send, self.work, sampling.logprobs)
        reused = self._keep(prompt if reuse else [])
        self.work.begin(len(prompt), reused)
        ids = torch.tensor([prompt])
        self.model.generation_config = config  # transformers fills what is None here from the model's own
        try:
            with torch.inference_mode(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(sampling.seed)
                read = self._prefilled(ids) if sampling.draft_ngram else self._layer_by_layer(prompt)
                with read, self._choosing(how, sampling, prompt, own), streamer.watching(self.model):
                    self.model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        generation_config=config,
                        logits_processor=own,
                        cache=self.cache,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([StopAtSequence(streamer.completion)]),
                    )
        finally:
            self.model.generation_config = defaults
            self.work.prompt = 0
            self._note_held(prompt + streamer.completion.token_ids)
        streamer.send_text(streamer.completion.finish())
        send(Piece("", [], self._result(streamer, sampling.seed, before, reused)))

    def _choosing(
        self, how: Decoding, sampling: Sampling, prompt: list[int], own: LogitsProcessorList
    ) -> AbstractContextManager[None]:
        """Let a GPU verify drafts in its steps, or choose the tokens, where no option needs their logits."""
        if self._steps is None:
            return nullcontext()
        if sampling.draft_ngram:
            return self._steps.verifying(sampling.draft_ngram)
        if sampling.logprobs is not None:
            return nullcontext()
        return self._steps.choosing(plain_temperature(self.model, how.config, prompt, own), sampling.seed)

    def _keep(self, prompt: list[int]) -> int:
        """Crop the cache to the tokens that it has in common with the prompt; return how many these are.

        transformers goes on from there, a chunk at a time. The prompt's last token is always computed: its logits are
        needed.
        """
        same = common_prefix(self._held, prompt[:-1])
        self.cache.keep(same)
        self._held = []  # until the run has ended, one way or another
        return same

    def _note_held(self, ids: list[int]) -> None:
        """Crop the cache to positions that every layer has and that hold one of these tokens for certain.

        A run that was stopped ended between two layers. A run with drafts leaves tokens that were never accepted.
        """
        self._held = ids[: self.cache.complete_length]
        self.cache.keep(len(self._held))

    @contextmanager
    def _layer_by_layer(self, prompt: list[int]) -> Iterator[None]:
        """Read a prompt of several chunks into the cache, if the plan has room for more than one, and give
        transformers the result when it asks for the last chunk.
        """
        new = prompt[self.cache.get_seq_length() :]
        if len(new) <= PREFILL_CHUNK or self.plan.prefill == PREFILL_CHUNK:
            yield
            return
        with known_chunk(self.model, self.cache, self._read(new)):
            yield

    def _read(self, tokens: list[int]) -> torch.Tensor:
        """Put tokens behind those in the cache, layer by layer; return the last chunk's normed hidden states."""
        if self._spread is not None:
            return read_on_gpus(self.model, self._spread, self.cache, tokens, self.plan.prefill)
        return read_prompt(self.model, self.cache, tokens, self.plan.prefill)

    @contextmanager
    def _prefilled(self, ids: torch.Tensor) -> Iterator[None]:
        """Read all but the last id into the cache, and tell the model to leave them out.

        With drafts transformers gives the model the whole prompt at once, which no plan for long prompts allows.
        """
        new = ids[0, self.cache.get_seq_length() : -1].tolist()
        if len(new) > PREFILL_CHUNK and self.plan.prefill > PREFILL_CHUNK:
            self._read(new)
        for chunk in ids[:, self.cache.get_seq_length() : -1].split(PREFILL_CHUNK, dim=1):
            if chunk.shape[1]:
                self.model.model(chunk, cache=self.cache, use_cache=True)
        hook = self.model.register_forward_pre_hook(_without_cached, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _result(self, streamer: PieceStreamer, seed: int, before: PoolCounters, reused: int) -> Result:
        completion, times, used = streamer.completion, streamer.times, self.pool.counters.since(before)
        return Result(
            text=completion.text,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            prompt_tokens=completion.prompt_tokens,
            seed=seed,
            ttft_s=times[0] - streamer.started,
            tpot_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0,
            total_s=times[-1] - streamer.started,
            peak_memory=peak_memory(),
            budget=self.plan.ram,
            hits=used.hits,
            misses=used.misses,
            hit_rate=used.hit_rate,
            bytes_read=used.bytes_read,
            reused_tokens=reused,
            logprobs=streamer.tokens,
        )


def _without_cached(
    module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the model's arguments without the ids that its cache holds already."""
    cached = options["cache"].get_seq_length() - int(options["position_ids"][0, 0])
    for name in ("input_ids", "position_ids"):
        options[name] = options[name][:, cached:]
    return arguments, options
