"""Long prompts on GPUs layer by layer: all of a prompt's chunks go through a layer before the next layer.

Each expert that is not resident is then copied once for the whole prompt instead of once a chunk. Attention, norms and
routers take the chunks one after another, and an expert takes its tokens a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import MixtralForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from qmix.model.gpu.experts import DeviceExperts
from qmix.model.gpu.spread import Spread
from qmix.model.kv import KVCache
from qmix.plan.memory import PREFILL_CHUNK


def read_on_gpus(
    model: MixtralForCausalLM, spread: Spread, cache: KVCache, tokens: Sequence[int], together: int
) -> torch.Tensor:
    """Append `tokens` to the cache, `together` at a time through each layer; all layers on GPUs.

    Returns the last chunk's normed hidden states [t, H].
    """
    for first in range(0, len(tokens), together):
        stream = _Part(model, spread, cache, tokens[first : first + together]).read()
    last = (len(tokens) - 1) % PREFILL_CHUNK + 1
    hidden: torch.Tensor = model.model.norm(stream[-last:])
    return hidden


class _Part:
    """Tokens that go through each layer together."""

    def __init__(self, model: MixtralForCausalLM, spread: Spread, cache: KVCache, tokens: Sequence[int]) -> None:
        self.model, self.spread, self.cache = model, spread, cache
        self.start = cache.get_seq_length()
        self.chunks = [slice(at, min(at + PREFILL_CHUNK, len(tokens))) for at in range(0, len(tokens), PREFILL_CHUNK)]
        first = spread.layers[0]
        self.stream = model.model.embed_tokens(first.upload(torch.tensor(tokens)))  # [T, H]
        positions = first.upload(torch.arange(self.start, self.start + len(tokens)))
        self.rotary = model.model.rotary_emb(self.stream, positions[None])  # each [1, T, D]
        self.masks = [self._mask(rows, positions) for rows in self.chunks]

    def _mask(self, rows: slice, positions: torch.Tensor) -> torch.Tensor | None:
        """Return the mask that transformers makes for a chunk."""
        config = self.model.config
        make = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
        self._set_length(self.start + rows.start)
        mask = make(
            config=config,
            inputs_embeds=self.stream[None, rows],
            attention_mask=None,
            cache=self.cache,
            position_ids=positions[None, rows],
        )
        self._set_length(self.start)
        found: torch.Tensor | None = mask
        return found

    def _set_length(self, length: int) -> None:
        for layer in self.cache.layers:
            layer.length = length

    def read(self) -> torch.Tensor:
        """Return the stream [T, H] after the last layer."""
        for layer, device in zip(self.model.model.layers, self.spread.layers, strict=True):
            if self.stream.device != device.device:
                self.stream = self.stream.to(device.device)
                self.rotary = tuple(device.upload(table) for table in self.rotary)
                self.masks = [None if mask is None else device.upload(mask) for mask in self.masks]
            self._attend(layer)
            self._mix(layer)
        return self.stream

    def _attend(self, layer: Any) -> None:
        for rows, mask in zip(self.chunks, self.masks, strict=True):
            normed = layer.input_layernorm(self.stream[None, rows])
            rotary = tuple(table[:, rows] for table in self.rotary)
            added, _ = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask, cache=self.cache)
            self.stream[rows] += added[0]

    def _mix(self, layer: Any) -> None:
        experts = layer.mlp.experts
        assert isinstance(experts, DeviceExperts)
        normed = torch.empty_like(self.stream)
        chosen: list[list[int]] = []
        weights = []
        for rows in self.chunks:
            normed[rows] = layer.post_attention_layernorm(self.stream[rows])
            _, some, index = layer.mlp.gate(normed[rows])
            chosen += experts.read_routing(index)
            weights.append(some)
        self.stream += experts.mix(normed, chosen, torch.cat(weights))
