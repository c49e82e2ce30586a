"""The KV cache: room for a fixed number of positions in each layer, taken at once.

It is written in one of two ways. transformers' `generate` appends: the sequences of a step grow together. In a pass of
the continuous engine each sequence has a range of positions of its own, and `rows` say where every token goes. In both,
attention reads keys and values where they lie: nothing is copied as a sequence grows, and nothing is taken that was not
planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from qmix.errors import UsageError
from qmix.geometry import HALF_BYTES, Geometry
from qmix.model.gpu.devices import Allocator, take_memory

COLUMNS = 16  # qmix's attention kernel takes heads of a multiple of these
COPIED = 512  # positions that are copied at once between ranges that overlap
HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive `tokens` of one sequence in a pass, from its `position` on.

    The sequence's own range of the cache begins at `start`. `wanted` asks for the logits after the last token.
    """

    tokens: Sequence[int]
    position: int
    start: int
    wanted: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of a pass in the cache: the place of each [T], the first place that it sees, and how many it sees."""

    places: torch.Tensor
    first: torch.Tensor
    seen: torch.Tensor
    longest: int

    @classmethod
    def of(cls, chunks: Sequence[Chunk], window: int | None) -> Rows:
        """Lay out chunks; with a sliding `window` a token sees that many positions at most, its own included."""
        starts = torch.tensor([chunk.start for chunk in chunks for _ in chunk.tokens])
        positions = positions_of(chunks)
        first = starts if window is None else starts + (positions + 1 - window).clamp_(min=0)
        seen = starts + positions + 1 - first
        return cls(starts + positions, first, seen, int(seen.max()))


def positions_of(chunks: Sequence[Chunk]) -> torch.Tensor:
    """Return the position of every token of a pass in its own sequence: [T]."""
    return torch.cat([torch.arange(c.position, c.position + len(c.tokens)) for c in chunks])


class KVLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, G, N, W]: of the sequences in use, the first `length` positions.

    Heads of D columns leave the last W - D as they are: zero.
    """

    is_croppable = True
    is_sliding = False  # a sliding window is left to the mask: all positions are kept
    keys: torch.Tensor
    values: torch.Tensor

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
        """Append [b, G, T, D] to the first b sequences; return the keys and values of all their positions."""
        if key_states.requires_grad:
            raise UsageError("a planned cache keeps no gradients; call the model without it, or within torch.no_grad()")
        rows, _, tokens, columns = key_states.shape
        keys, values = self.extend(tokens, rows)
        keys[:, :, -tokens:, :columns] = key_states
        values[:, :, -tokens:, :columns] = value_states
        return keys, values

    def extend(self, tokens: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the first `rows` sequences with `tokens` more positions, yet to be written."""
        self.length += tokens
        return self.keys[:rows, :, : self.length], self.values[:rows, :, : self.length]

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor, places: torch.Tensor) -> None:
        """Put [1, G, T, D] at `places` [T]."""
        columns = key_states.shape[-1]
        self.keys[0, :, :, :columns].index_copy_(1, places, key_states[0])
        self.values[0, :, :, :columns].index_copy_(1, places, value_states[0])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.keys.shape[-2]

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (transformers counts them below zero)."""
        self.length = max(0, self.length - abs(tokens_to_remove))


class KVCache(Cache):
    """A cache of `capacity` positions for each of `batch` sequences, or for as many as share them by `rows`.

    `layer_devices` has a device for each layer; without it all layers lie in main memory. With `aligned`, heads are
    filled up to the columns of qmix's attention kernel. While `rows` is set, a pass is written where they say.
    """

    def __init__(
        self,
        geometry: Geometry,
        capacity: int,
        dtype: torch.dtype,
        batch: int = 1,
        layer_devices: Sequence[torch.device] | None = None,
        aligned: bool = False,
        allocate: Allocator = take_memory,
    ) -> None:
        devices = layer_devices or [HOST] * geometry.num_layers
        layers: dict[int, KVLayer] = {}
        for device in dict.fromkeys(devices):  # one block on each
            mine = [layer for layer, where in enumerate(devices) if where == device]
            made = kv_layers(geometry, len(mine), capacity, dtype, batch, device, aligned, allocate)
            layers |= dict(zip(mine, made, strict=True))
        super().__init__(layers=[layers[layer] for layer in range(geometry.num_layers)])
        self.capacity = capacity
        self.rows: Rows | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [b, G, T, D]; return what attention reads: the sequences so far, or with `rows` the whole layer."""
        layer = self.layers[layer_idx]
        if self.rows is None:
            return layer.update(key_states, value_states)
        layer.write(key_states, value_states, self.rows.places)
        return layer.keys, layer.values

    def copy_rows(self, source: int, target: int, count: int) -> None:
        """Copy `count` positions of every layer, from `source` on to `target` on.

        The ranges may overlap where `target` comes first.
        """
        step = count if abs(source - target) >= count else COPIED
        for layer in self.layers:
            for rows in (layer.keys, layer.values):  # [B, G, N, W]
                for at in range(0, count, step):
                    end = min(at + step, count)
                    piece = rows[:, :, source + at : source + end]
                    rows[:, :, target + at : target + end] = piece if step == count else piece.clone()

    @property
    def complete_length(self) -> int:
        """The positions that every layer has; a step that was stopped left some layers with more."""
        return min(layer.length for layer in self.layers)

    def keep(self, length: int) -> None:
        """Forget all but the first `length` positions of every layer."""
        for layer in self.layers:
            assert layer.length >= length
            layer.length = length


def kv_layers(
    geometry: Geometry,
    count: int,
    capacity: int,
    dtype: torch.dtype,
    batch: int = 1,
    device: torch.device = HOST,
    aligned: bool = False,
    allocate: Allocator = take_memory,
) -> list[KVLayer]:
    """Return `count` layers in one block of memory on `device`, zero in main memory; parameters as KVCache's."""
    assert dtype.itemsize == HALF_BYTES
    width = -(-geometry.head_dim // COLUMNS) * COLUMNS if aligned else geometry.head_dim
    shape = (2, count, batch, geometry.num_kv_heads, capacity, width)
    nbytes = prod(shape) * HALF_BYTES
    keys, values = allocate(nbytes, device).view(dtype).view(shape)
    return [KVLayer(*pair) for pair in zip(keys, values, strict=True)]
