"""A KV cache made once for a whole context: nothing is copied as it grows, nothing is taken that was not planned."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from qmix.errors import UsageError
from qmix.geometry import HALF_BYTES, Geometry
from qmix.model.gpu.devices import Allocator, take_memory


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
        if key_states.requires_grad:
            raise UsageError("a planned cache keeps no gradients; call the model without it, or within torch.no_grad()")
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
    """A cache for up to `batch` sequences of `context` positions; its memory is taken at once.

    `layer_devices` has a device for each layer; without it all lie in main memory.
    """

    def __init__(
        self,
        geometry: Geometry,
        context: int,
        dtype: torch.dtype,
        batch: int = 1,
        layer_devices: Sequence[torch.device] | None = None,
        allocate: Allocator = take_memory,
    ) -> None:
        assert dtype.itemsize == HALF_BYTES
        devices = layer_devices or [torch.device("cpu")] * geometry.num_layers
        layers: dict[int, PlannedLayer] = {}
        for device in dict.fromkeys(devices):  # one block on each
            mine = [layer for layer, where in enumerate(devices) if where == device]
            shape = (2, len(mine), batch, geometry.num_kv_heads, context, geometry.head_dim)
            both = allocate(prod(shape) * HALF_BYTES, device).view(dtype).view(shape)
            layers |= {layer: PlannedLayer(*pair) for layer, *pair in zip(mine, both[0], both[1], strict=True)}
        super().__init__(layers=[layers[layer] for layer in range(geometry.num_layers)])
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
