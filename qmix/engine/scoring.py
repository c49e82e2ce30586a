"""Log-probabilities of tokens that are known: a pass goes through the model layer by layer, all of its tokens at once.

What is kept of a pass is its residual stream and what its experts give. Keys and values are those of one sequence in
one layer: sequences come in the order of `qmix.engine.passes`, so that a sequence finds those of its beginning
where the one before left them, and overwrites the rest. A layer's experts are read once for all of the pass. All parts
are the invariant ones of `qmix.model.invariant`: a query's result does not depend on its pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qmix.checkpoint.torch_dtypes import HALF
from qmix.engine.compute import ComputeThread
from qmix.engine.passes import Pass, Segment
from qmix.geometry import Geometry
from qmix.machine.found import give_back_freed_memory
from qmix.model import kv_arena
from qmix.model.build import build_model
from qmix.model.kv_arena import Rows, padded, row_attention
from qmix.plan.memory import HEAD_ROWS, PREFILL_CHUNK
from qmix.plan.scoring import ScoringPlan
from qmix.pool.experts import ExpertPool
from qmix.progress import OnProgress, ignore
from qmix.store.opened import Store

PATH_ATTENTION = "qmix_paths"  # its name among transformers' attention functions


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of a query's targets, in nats, and whether each of them was the likeliest token."""

    logprob: float
    greedy: bool


class PathMemory:
    """Keys and values [1, G, longest, D] of one sequence in one layer, D filled up to the kernel's columns."""

    def __init__(self, geometry: Geometry, longest: int, dtype: torch.dtype) -> None:
        width = padded(geometry.head_dim)
        self.window, self.padding = geometry.sliding_window, width - geometry.head_dim
        shape = (1, geometry.num_kv_heads, longest, width)
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def write(self, keys: torch.Tensor, values: torch.Tensor, position: int) -> None:
        """Put [1, G, T, D] at a sequence's `position`."""
        for whole, part in ((self.keys, keys), (self.values, values)):
            whole[:, :, position : position + part.shape[2]] = F.pad(part, (0, self.padding)) if self.padding else part


def path_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    path: PathMemory,
    segments: list[Segment],
    scaling: float,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] of rows in `segments`, one after another, to [1, T, H, D]."""
    parts, start = [], 0
    for segment in segments:
        end = start + segment.count
        path.write(key[:, :, start:end], value[:, :, start:end], segment.position)
        rows = Rows.of([kv_arena.Segment(range(segment.count), segment.position, 0, False)], path.window)
        part = row_attention(module, query[:, :, start:end], path.keys, path.values, None, rows, scaling)[0]
        parts.append(part)
        start = end
    return torch.cat(parts, dim=1), None


class Scorer:
    """A model that scores passes of up to `plan.tokens` rows. Close it, or use it as a context manager."""

    def __init__(self, store: Store, plan: ScoringPlan, on_load: OnProgress = ignore) -> None:
        give_back_freed_memory()
        ALL_ATTENTION_FUNCTIONS.register(PATH_ATTENTION, path_attention)
        self.plan = plan
        self.pool = ExpertPool(store, plan.slots, invariant=True)
        self._thread = ComputeThread(self.pool)
        try:
            self.model: MixtralForCausalLM = build_model(store, self.pool, PATH_ATTENTION)
            if self.pool.holds_all:
                self.pool.fill(on_load)
            self._path = PathMemory(store.geometry, plan.longest, HALF[store.layout.dtype])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._thread.close()

    def score(self, part: Pass, on_layer: Callable[[int], None] = lambda layers: None) -> list[Score]:
        """A score for each query of the pass. What interrupts the caller ends it within an expert's time.

        `on_layer` is told, in the thread that computes, how many layers are done.
        """
        return self._thread.run(self._score, part, on_layer)

    @torch.inference_mode()
    def _score(self, part: Pass, on_layer: Callable[[int], None]) -> list[Score]:
        chunks = list(_chunks(part.segments))
        tokens = torch.from_numpy(part.tokens)
        stream = self.model.model.embed_tokens(tokens)  # [N, H]
        for number, layer in enumerate(self.model.model.layers, 1):
            self._attend(layer, stream, chunks)
            self._mix(layer, stream)
            on_layer(number)
        logprobs, greedy = self._predict(stream, torch.from_numpy(part.rows), torch.from_numpy(part.targets))
        count = int(part.queries[-1]) + 1
        owners = torch.from_numpy(part.queries)
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, owners, logprobs.double())
        wrong = torch.zeros(count, dtype=torch.int64).index_add_(0, owners, (~greedy).long())
        return [Score(total, misses == 0) for total, misses in zip(sums.tolist(), wrong.tolist(), strict=True)]

    def _attend(self, layer: Any, stream: torch.Tensor, chunks: list[tuple[slice, list[Segment]]]) -> None:
        """Add what attention gives to the residual stream, a chunk of rows at a time."""
        for rows, segments in chunks:
            normed = layer.input_layernorm(stream[rows])[None]  # [1, T, H]
            positions = [torch.arange(piece.position, piece.position + piece.count) for piece in segments]
            rotary = self.model.model.rotary_emb(normed, torch.cat(positions)[None])
            stream[rows] += layer.self_attn(
                normed, position_embeddings=rotary, attention_mask=None, path=self._path, segments=segments
            )[0][0]

    def _mix(self, layer: Any, stream: torch.Tensor) -> None:
        """Add what the experts give, each read once."""
        normed, weights, experts = torch.empty_like(stream), [], []
        for rows in torch.arange(len(stream)).split(PREFILL_CHUNK):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            normed[part] = layer.post_attention_layernorm(stream[part])
            _, weight, chosen = layer.mlp.gate(normed[part])
            weights.append(weight)
            experts.append(chosen)
        stream += layer.mlp.experts(normed, torch.cat(experts), torch.cat(weights))

    def _predict(
        self, stream: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities in fp32 of `targets` [P] after `rows` [P], and whether each was the likeliest."""
        logprobs, greedy = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
        wanted, place = rows.unique(return_inverse=True)
        for start in range(0, len(wanted), HEAD_ROWS):
            hidden = self.model.model.norm(stream[wanted[start : start + HEAD_ROWS]])
            scores = self.model.lm_head(hidden).float().log_softmax(-1)  # [t, V]
            (asked,) = torch.where((place >= start) & (place < start + HEAD_ROWS))
            here = place[asked] - start
            logprobs[asked] = scores[here, targets[asked]]
            greedy[asked] = scores.argmax(-1)[here] == targets[asked]
        return logprobs, greedy


def _chunks(segments: tuple[Segment, ...]) -> Iterator[tuple[slice, list[Segment]]]:
    """Rows in chunks, with the segments or parts of segments in each."""
    start, count = 0, 0
    pieces: list[Segment] = []
    for segment in segments:
        position, left = segment.position, segment.count
        while left:
            taken = min(left, PREFILL_CHUNK - count)
            pieces.append(Segment(position, taken))
            position, left, count = position + taken, left - taken, count + taken
            if count == PREFILL_CHUNK:
                yield slice(start, start + count), pieces
                start, count, pieces = start + count, 0, []
    if pieces:
        yield slice(start, start + count), pieces
