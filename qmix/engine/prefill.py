"""Long prompts layer by layer: all chunks of a prompt, or of several, go through a layer before the next layer.

Each expert is then read once for all of them instead of once a chunk. Every number is the one that a chunk after the
other gives. For one stream, chunks have the same rows, masks and groups of tokens in each product; in a model of many
sequences a token's numbers do not depend on the tokens beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import MixtralForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import MoeModelOutputWithPast

from qmix.engine.layerwise import run_layers
from qmix.engine.passes import PathSegment, chunks, continued_pass
from qmix.engine.store_weights import StoreWeights
from qmix.model.kv import Chunk, KVCache, Rows
from qmix.plan.memory import PREFILL_CHUNK


class PromptWeights(StoreWeights):
    """The weights of a store's model, for a prompt's tokens after the cached ones."""

    def __init__(self, model: MixtralForCausalLM, cache: KVCache, segment: PathSegment) -> None:
        super().__init__(model)
        self.cache = cache
        try:
            self._masks = {part.position: self._mask(part) for _, (part,) in chunks([segment], PREFILL_CHUNK)}
        finally:
            _set_length(cache, segment.position)

    def attend(
        self, module: Any, normed: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], segments: list[PathSegment]
    ) -> torch.Tensor:
        """Return the attention of a chunk to the cache and to itself; add its keys and values to the cache."""
        mask = self._masks[segments[0].position]
        return module.self_attn(normed, position_embeddings=rotary, attention_mask=mask, cache=self.cache)[0][0]

    def _mask(self, part: PathSegment) -> torch.Tensor | None:
        """Return the mask that transformers makes for a chunk after `part.position` cached tokens."""
        config = self.model.config
        make = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
        _set_length(self.cache, part.position)
        rows = torch.empty(1, part.count, config.hidden_size, dtype=config.dtype)
        positions = torch.arange(part.position, part.position + part.count)[None]
        return make(config=config, inputs_embeds=rows, attention_mask=None, cache=self.cache, position_ids=positions)


class SharedWeights(StoreWeights):
    """The weights of a store's invariant model, for tokens of sequences that share a cache."""

    def __init__(self, model: MixtralForCausalLM, cache: KVCache) -> None:
        super().__init__(model)
        self.cache = cache

    def attend(
        self, module: Any, normed: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], segments: list[PathSegment]
    ) -> torch.Tensor:
        """Return the attention of each row to its own sequence; add the rows' keys and values to the cache."""
        parts = [Chunk(range(each.count), each.position, each.start, False) for each in segments]
        self.cache.rows = rows = Rows.of(parts, self.model.config.sliding_window)
        return module.self_attn(normed, position_embeddings=rotary, attention_mask=None, cache=self.cache, rows=rows)[
            0
        ][0]


def read_together(model: MixtralForCausalLM, cache: KVCache, parts: Sequence[Chunk]) -> torch.Tensor:
    """Take the tokens of several sequences through each layer together.

    Returns their hidden states [T, H] before the final norm.
    """
    tokens = [token for part in parts for token in part.tokens]
    segments = [PathSegment(part.position, len(part.tokens), part.start) for part in parts]
    (stream,) = run_layers(SharedWeights(model, cache), continued_pass(tokens, segments))
    return stream


def read_prompt(model: MixtralForCausalLM, cache: KVCache, tokens: Sequence[int], together: int) -> torch.Tensor:
    """Append `tokens` to the cache, `together` at a time through each layer.

    Returns the last chunk's normed hidden states [t, H].
    """
    start = cache.get_seq_length()
    for first in range(0, len(tokens), together):
        some = tokens[first : first + together]
        segment = PathSegment(start + first, len(some))
        (stream,) = run_layers(PromptWeights(model, cache, segment), continued_pass(some, [segment]))
    last = (len(tokens) - 1) % PREFILL_CHUNK + 1
    hidden: torch.Tensor = model.model.norm(stream[-last:])
    return hidden


@contextmanager
def known_chunk(model: MixtralForCausalLM, cache: KVCache, hidden: torch.Tensor) -> Iterator[None]:
    """Let the model's next forward, of the last chunk that the cache holds, return these hidden states [t, H]."""
    whole, before = cache.get_seq_length(), vars(model.model).get("forward")

    def restore() -> None:
        if before is not None:  # on GPUs hooks have one there
            model.model.forward = before
        else:
            del model.model.forward

    def forward(*arguments: object, **options: object) -> MoeModelOutputWithPast:
        restore()
        _set_length(cache, whole)
        return MoeModelOutputWithPast(last_hidden_state=hidden[None], cache=cache)

    cache.keep(whole - len(hidden))
    model.model.forward = forward
    try:
        yield
    finally:
        if vars(model.model).get("forward") is forward:  # it was stopped before
            restore()


def _set_length(cache: KVCache, length: int) -> None:
    """Let a cache count `length` positions, whatever they hold."""
    for layer in cache.layers:
        layer.length = length
