"""One KV cache for many sequences: each has a stretch of positions of its own, taken when it begins and given back.

The memory is taken at once. A pass brings a flat row of tokens that belong to different sequences; each is written to
its own place, and attends to its own sequence where that lies, without a copy. Every token is a row of the attention
kernel by itself: what it sees, and in which order it is summed, follows from its position alone, so that neither the
other sequences nor the chunks that a prompt was taken in can change its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qmix.disk.files import anonymous_memory
from qmix.geometry import HALF_BYTES, Geometry
from qmix.plan.memory import PREFILL_CHUNK

ROW_ATTENTION = "qmix_rows"  # its name among transformers' attention functions
COLUMNS = 16  # of which the kernel wants a multiple: shorter heads are filled up with zeros


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one sequence in a pass: `tokens` at `position` of a sequence whose stretch begins at `start`.

    `wanted` says whether the logits after the last of them are.
    """

    tokens: Sequence[int]
    position: int
    start: int
    wanted: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of a pass: the place in the arena of each [T], and the first place and number of what it sees."""

    places: torch.Tensor
    first: torch.Tensor
    seen: torch.Tensor
    longest: int

    @classmethod
    def of(cls, segments: Sequence[Segment], window: int | None) -> Rows:
        starts = torch.tensor([segment.start for segment in segments for _ in segment.tokens])
        positions = positions_of(segments)
        first = starts if window is None else starts + (positions + 1 - window).clamp_(min=0)
        seen = starts + positions + 1 - first
        return cls(starts + positions, first, seen, int(seen.max()))


def positions_of(segments: Sequence[Segment]) -> torch.Tensor:
    """Of every token of a pass, in its own sequence: [T]."""
    return torch.cat([torch.arange(s.position, s.position + len(s.tokens)) for s in segments])


class Arena(Cache):
    """Keys and values of `capacity` positions in each layer: [G, capacity, D], D filled up to the kernel's columns.

    Before a pass `rows` says where its tokens go.
    """

    def __init__(self, geometry: Geometry, capacity: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        width = padded(geometry.head_dim)
        shape = (geometry.num_layers, 2, geometry.num_kv_heads, capacity, width)
        self.memory = anonymous_memory(arena_bytes(geometry, capacity)).view(dtype).view(shape)
        self.padding = width - geometry.head_dim
        self.rows: Rows | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, G, T, D] to the places of `rows`; the layer's whole keys and values [1, G, capacity, D]."""
        assert self.rows is not None
        for side, states in enumerate((key_states, value_states)):
            whole = F.pad(states[0], (0, self.padding)) if self.padding else states[0]
            self.memory[layer_idx, side].index_copy_(1, self.rows.places, whole)
        return self.memory[layer_idx, :1], self.memory[layer_idx, 1:]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def arena_bytes(geometry: Geometry, capacity: int) -> int:
    """What an arena of so many positions takes."""
    return 2 * geometry.num_layers * geometry.num_kv_heads * padded(geometry.head_dim) * HALF_BYTES * capacity


def padded(head_dim: int) -> int:
    return -(-head_dim // COLUMNS) * COLUMNS


def row_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    rows: Rows,
    scaling: float,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D] over an arena's keys and values [1, G, N, D], each row its own, to [1, T, H, D]."""
    from qmix.kernels.cpu.attention import BLOCK, attend_rows

    _, heads, tokens, head_dim = query.shape
    _, groups, _, width = key.shape
    shared = F.pad(query[0].transpose(0, 1), (0, width - head_dim)).view(tokens, groups, heads // groups, width)
    table = torch.zeros(tokens, 4, dtype=torch.int64)
    table[:, 0] = key.data_ptr() + rows.first * width * HALF_BYTES
    table[:, 1] = value.data_ptr() + rows.first * width * HALF_BYTES
    table[:, 2] = rows.seen
    strides = key.stride(1) * HALF_BYTES, value.stride(1) * HALF_BYTES
    step = max(1, PREFILL_CHUNK * BLOCK // rows.longest)  # rows at once, whose blocks' sums the plan has room for
    parts = [
        attend_rows(shared[i : i + step], table[i : i + step], strides, rows.longest, scaling)
        for i in range(0, tokens, step)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(1, tokens, heads, width)[..., :head_dim], None


def register() -> None:
    """Make the function known to transformers; harmless to repeat."""
    ALL_ATTENTION_FUNCTIONS.register(ROW_ATTENTION, row_attention)
