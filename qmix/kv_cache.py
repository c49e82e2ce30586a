"""A KV cache made once for a whole context: nothing is copied as it grows, nothing is taken that was not planned."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from qmix.direct_io import anonymous_memory
from qmix.geometry import HALF_BYTES, Geometry


class PlannedLayer(CacheLayerMixin):
    """Keys and values [batch, kv_heads, capacity, head_dim]: of the rows in use, the first `length` positions."""

    is_croppable = True
    is_sliding = False  # a sliding window is left to the mask: all positions are kept

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        rows, end = len(key_states), self.length + key_states.shape[-2]
        self.keys[:rows, :, self.length : end] = key_states
        self.values[:rows, :, self.length : end] = value_states
        self.length = end
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[-2]

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (transformers counts them below zero)."""
        self.length = max(0, self.length - abs(tokens_to_remove))


class PlannedCache(Cache):
    """A cache for up to `batch` sequences of `context` positions; its memory is taken at once."""

    def __init__(self, geometry: Geometry, context: int, dtype: torch.dtype, batch: int = 1) -> None:
        shape = (2, geometry.num_layers, batch, geometry.num_kv_heads, context, geometry.head_dim)
        memory = anonymous_memory(geometry.kv_bytes_per_token * context * batch)
        assert dtype.itemsize == HALF_BYTES
        both = memory.view(dtype).view(shape)
        super().__init__(layers=[PlannedLayer(keys, values) for keys, values in zip(both[0], both[1], strict=True)])
        self.context, self.batch = context, batch

    @property
    def complete_length(self) -> int:
        """The positions that every layer has; a step that was stopped left some layers with more."""
        return min(layer.length for layer in self.layers)

    def keep(self, length: int) -> None:
        """Forget all but the first `length` positions of every layer."""
        for layer in self.layers:
            assert layer.length >= length
            layer.length = length
