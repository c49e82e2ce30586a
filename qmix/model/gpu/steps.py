"""Decode steps of a model on GPUs in transformers' model's place: its forward of a few tokens replays graphs.

`generate` drives it as it drives transformers' own forward. Where the next token is chosen on the GPU, its logits stay
there: the caller gets a row with 0 at the token and minus infinity elsewhere, from which every way of choosing takes
that token. If all experts are resident, the GPU begins the step after the next token before Python asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import MixtralForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from qmix.errors import arg
from qmix.model.continued import continues
from qmix.model.gpu.captured import CapturedStep, OnDevice
from qmix.model.gpu.devices import HOST, Mark
from qmix.model.gpu.exchange import Exchanges
from qmix.model.gpu.kernels import Kernels
from qmix.model.kv import Chunk, KVCache
from qmix.plan.device_memory import LEAST_STEP

NOT_ON_GPUS = (
    "batches and evaluations run on GPUs only where all layers fit there and Triton's kernels take the model; "
    f"{arg('gpu', 'none')} runs them on the CPU"
)
SIZES = (1, 2, 4, 8, 16, 32)  # tokens of a graph


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A step that was begun: the token that it follows, its position, and the mark and place of its choice."""

    token: int
    position: int
    mark: Mark
    place: int


class Steps:
    """Captured steps over a planned cache, of up to `rows` tokens."""

    def __init__(
        self, model: MixtralForCausalLM, cache: KVCache, kernels: Kernels, parts: list[OnDevice], rows: int
    ) -> None:
        self.model, self.cache, self.kernels, self.parts, self.rows = model, cache, kernels, parts, rows
        self._forward = model.model.forward  # another one in its place knows the result already
        self.eps = float(model.config.rms_norm_eps)
        self.cpu_layers = parts[0].first
        self.begins_early = not self.cpu_layers and all(each is None for part in parts for each in part.away)
        self.exchanges = Exchanges(model.pool, parts)
        self._captured: dict[int, CapturedStep] = {}
        self._most = min(rows, LEAST_STEP)
        self._chooses = False
        self._ahead: _Ahead | None = None
        self._choices = parts[-1].device.pinned(2, dtype=torch.int64)
        self._row = torch.full((1, 1, model.config.vocab_size), -torch.inf)
        self.captured(1)

    @property
    def launched(self) -> int:
        """The graphs that were replayed so far."""
        return sum(part.recorder.launched for part in self.parts)

    def captured(self, tokens: int) -> CapturedStep:
        """Return the step of at least `tokens` tokens, captured at its first use."""
        size = next(size for size in SIZES if size >= tokens)
        if size not in self._captured:
            with torch.inference_mode(mode=False), torch.no_grad():
                for part in self.parts:  # the run before a capture must not touch the cache
                    part.buffers.position.fill_(-1)
                made = CapturedStep(self.kernels, self.eps, self.parts, size, embeds=not self.cpu_layers)
            self._captured[size] = made
            self._ahead = None
        return self._captured[size]

    @contextmanager
    def choosing(self, temperature: float | None, seed: int) -> Iterator[None]:
        """Choose each next token on the GPU: the likeliest at temperature 0, otherwise drawn; None leaves it."""
        last = self.parts[-1].buffers
        last.temperature.fill_(temperature or 0.0)
        last.seed.fill_(seed)
        self._chooses, self._ahead = temperature is not None, None
        try:
            yield
        finally:
            self._chooses, self._ahead = False, None

    @contextmanager
    def verifying(self, drafts: int) -> Iterator[None]:
        """Serve steps of up to `drafts` drafted tokens and the one before, if there is room for them.

        Without it, a step of a few more tokens than LEAST_STEP is a prompt's, for which no graph is captured.
        """
        before, self._most = self._most, min(self.rows, max(self._most, drafts + 1))
        try:
            yield
        finally:
            self._most = before

    def forward(self, ids: torch.Tensor | None, options: dict[str, Any]) -> MoeCausalLMOutputWithPast | None:
        """Return what the model's forward would for these arguments; None where a step does not serve them."""
        if not self._serves(ids, options):
            return None
        assert ids is not None
        tokens, position = ids[0].tolist(), self.cache.get_seq_length()
        if self._chooses and len(tokens) == 1:
            token = self._next_token(tokens[0], position)
            self._row.fill_(-torch.inf)
            self._row[0, 0, token] = 0.0
            return MoeCausalLMOutputWithPast(logits=self._row, cache=self.cache)
        self.step(tokens, position)
        kept = options.get("logits_to_keep") or len(tokens)
        logits = self.parts[-1].buffers.logits[None, len(tokens) - kept : len(tokens)].clone()
        return MoeCausalLMOutputWithPast(logits=logits, cache=self.cache)

    def _serves(self, ids: torch.Tensor | None, options: dict[str, Any]) -> bool:
        """Return whether this is a step of a few tokens behind those in the cache, and nothing else is wanted."""
        if ids is None or options.get("cache") is not self.cache or not 0 < ids.shape[1] <= self._most:
            return False
        return self.model.model.forward == self._forward and continues(self.model.config, self.cache, ids, options)

    def step(self, tokens: list[int], position: int) -> None:
        """Queue the step of `tokens` of one sequence from `position` on, and count them in the cache."""
        captured = self.captured(len(tokens))
        self.exchanges.make(len(tokens))
        self._place(captured.tokens, tokens, list(range(position, position + len(tokens))), [0] * len(tokens))
        if self.cpu_layers:
            self.parts[0].buffers.stream[: len(tokens)].copy_(self._on_cpu(tokens, position))
        captured.run()
        self._count(len(tokens))

    def chunks(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Run the tokens of a batch's pass; return in main memory the logits [wanted chunks, V] after the last ones.

        Each sequence has the capacity of the cache to itself, from `start` on.
        """
        tokens = [token for chunk in chunks for token in chunk.tokens]
        positions = [chunk.position + index for chunk in chunks for index in range(len(chunk.tokens))]
        sequences = [chunk.start // self.cache.capacity for chunk in chunks for _ in chunk.tokens]
        captured = self.captured(len(tokens))
        self._place(captured.tokens, tokens, positions, sequences)
        captured.run()
        ends = accumulate(len(chunk.tokens) for chunk in chunks)
        wanted = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.wanted]
        return self.parts[-1].buffers.logits[wanted].to(HOST)

    def logits(self, tokens: int) -> torch.Tensor:
        """Return the logits [T, V] of the last step's first `tokens` rows, on a GPU; valid until the next step."""
        return self.parts[-1].buffers.logits[:tokens]

    def _place(self, size: int, tokens: list[int], positions: list[int], sequences: list[int]) -> None:
        """Write a step's rows to every GPU; a step of `size` rows has some without a token."""
        self.model.pool.check_running()
        self._ahead = None
        idle = size - len(tokens)
        for part in self.parts:
            part.buffers.position[:size].copy_(torch.tensor(positions + [-1] * idle))
            part.buffers.sequence[:size].copy_(torch.tensor(sequences + [0] * idle))
        self.parts[0].buffers.token[:size].copy_(torch.tensor(tokens + [0] * idle))

    def _count(self, tokens: int) -> None:
        for layer in self.cache.layers[self.cpu_layers :]:
            layer.length += tokens

    def _on_cpu(self, tokens: list[int], position: int) -> torch.Tensor:
        """Return the stream [T, H] after the layers on the CPU, by transformers' own modules."""
        inner, ids = self.model.model, torch.tensor([tokens])
        positions = torch.arange(position, position + len(tokens))[None]
        stream = inner.embed_tokens(ids)
        mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=stream,
            attention_mask=None,
            cache=self.cache,
            position_ids=positions,
        )
        rotary = inner.rotary_emb(stream, position_ids=positions)
        for layer in inner.layers[: self.cpu_layers]:
            stream = layer(
                stream, attention_mask=mask, position_ids=positions, cache=self.cache, position_embeddings=rotary
            )
        return stream[0]

    def _next_token(self, token: int, position: int) -> int:
        """Return the token that the GPU chooses after `token` at `position`."""
        self.model.pool.check_running()
        ahead = self._ahead
        if ahead is None or (ahead.token, ahead.position) != (token, position):
            self.step([token], position)
            ahead = self._mark(token, position, 0)
        else:
            self._count(1)
        following = None
        if self.begins_early and position + 1 < self.cache.capacity:
            self.parts[0].buffers.token[:1].copy_(self.parts[-1].buffers.chosen[:1], non_blocking=True)
            self.captured(1).run()
            following = self._mark(-1, position + 1, 1 - ahead.place)
        ahead.mark.wait()
        chosen = int(self._choices[ahead.place])
        self._ahead = following and _Ahead(chosen, following.position, following.mark, following.place)
        return chosen

    def _mark(self, token: int, position: int, place: int) -> _Ahead:
        """Queue the copy of the last step's choice to main memory."""
        self._choices[place : place + 1].copy_(self.parts[-1].buffers.chosen[:1], non_blocking=True)
        return _Ahead(token, position, self.parts[-1].device.mark(), place)
