"""A KV cache made once for a whole context: nothing is copied as it grows, nothing is taken that was not planned."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from qmix.direct_io import anonymous_memory
from qmix.geometry import HALF_BYTES, Geometry


class PlannedLayer(CacheLayerMixin):
    """Keys and values [1, kv_heads, capacity, head_dim], of which the first `length` positions are filled."""

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
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

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
    """One sequence's cache for up to `context` positions; its memory is taken at once."""

    def __init__(self, geometry: Geometry, context: int, dtype: torch.dtype) -> None:
        shape = (2, geometry.num_layers, 1, geometry.num_kv_heads, context, geometry.head_dim)
        memory = anonymous_memory(geometry.kv_bytes_per_token * context)
        assert dtype.itemsize == HALF_BYTES
        both = memory.view(dtype).view(shape)
        super().__init__(layers=[PlannedLayer(keys, values) for keys, values in zip(both[0], both[1], strict=True)])
        self.context = context
