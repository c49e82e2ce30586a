"""The weights of a synthetic Mixtral whose greedy text and routing are known beforehand, in any engine and precision.

Embeddings are large, and all layers together change the hidden state by about an eighth of it, so the input of a layer
is approximately the token's own embedding. The head's row for a token is the embedding of its predecessor on a *tour*,
one long cycle through the ordinary tokens of the vocabulary. So greedy decoding follows the tour. With a tour a, b, c:

    embeddings  a: [A, 1]   b: [A, 2]   c: [C, 3]     first half: the topic, second half: the token itself
    head rows   b: [A, 1]   c: [A, 2]   a: [C, 3]     so after a comes b

The tour stays on a topic for 32 tokens. A layer's gate weighs topic against token such that consecutive tokens share
experts about as often as in Mixtral-8x7B: 45 to 50% of them in the first layer, 62 to 67% in the middle, 44 to 54% in
the last (Mixtral of Experts, 2024, table 5; 46% would be chance).

All other matrices are patterns of normal numbers, each rolled by its own number of rows and columns: real bytes that
are fast to make. Needs only numpy and qmix modules in plain Python, so that it also runs in a peer's environment,
without torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qmix.checkpoint.naming import expected_weights
from qmix.geometry import Geometry

Array = npt.NDArray[Any]

PRESETS = {
    "8x7b": Geometry(4096, 14336, 32, 32, 8, 128, 8, 2, 32000, 32768),
    "8x22b": Geometry(6144, 16384, 56, 48, 8, 128, 8, 2, 32768, 65536),
}
PATTERN_WEIGHTS = 2**22
ROLL_COLUMNS = 64  # columns roll by blocks of every quantisation
SPECIAL_TOKENS = 259  # <unk>, <s>, </s> and 256 bytes, as in Mixtral's vocabulary
TOPIC_TOKENS = 32
MOVED = 0.12  # of the hidden state's length, by all experts together, and by all attention over a short context
EXPERTS_OUT = 0.45  # standard deviation of a mixture of two experts whose w2 keeps lengths
SEEN_AGAIN = 0.22  # correlation of two layers with the same experts and gates of their own
HEAD_LOGIT = 16  # about what the next token gets; others of its topic half of it
# of the variance of a gate's logits, the topic's share: first layer, from a quarter to three quarters, last layer
TOPIC_SHARE = ((0, 0.25, 0.75, 1), (0.02, 0.3, 0.3, 0.04))
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w3", "w2")  # the position seeds the pattern


def to_bf16(values: Array) -> Array:
    """float32 as bit patterns of bfloat16 in uint16, to the nearest."""
    return ((values.astype(np.float32, copy=False).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def to_float32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class SyntheticModel:
    """A model's weights by Hugging Face name; the same for the same fields, wherever they are asked for.

    Expert weights of layer l are those of l mod `distinct_layers` (0: all layers differ); gates always differ.
    """

    geometry: Geometry
    seed: int = 0
    distinct_layers: int = 0

    def __post_init__(self) -> None:
        if self.geometry.tie_embeddings or self.geometry.hidden_size % 2:
            raise ValueError("a tour needs a head of its own, and a hidden size of two halves")

    @classmethod
    def of(cls, directory: Path) -> SyntheticModel:
        """Return the model that a checkpoint or store was written from."""
        config = json.loads((directory / "config.json").read_text())
        return cls(Geometry.from_config(config), **config["synthetic"])

    @property
    def config(self) -> dict[str, object]:
        """The config.json."""
        geometry = self.geometry
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": geometry.hidden_size,
            "intermediate_size": geometry.intermediate_size,
            "num_hidden_layers": geometry.num_layers,
            "num_attention_heads": geometry.num_heads,
            "num_key_value_heads": geometry.num_kv_heads,
            "head_dim": geometry.head_dim,
            "num_local_experts": geometry.num_experts,
            "num_experts_per_tok": geometry.experts_per_token,
            "vocab_size": geometry.vocab_size,
            "max_position_embeddings": geometry.max_position,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
            "synthetic": {"seed": self.seed, "distinct_layers": self.distinct_layers},
        }

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's name and shape."""
        return dict(expected_weights(self.geometry))

    # the tour

    @cached_property
    def tour(self) -> Array:
        """Return the ordinary tokens, each once, in the order of greedy text; after the last comes the first."""
        first = min(SPECIAL_TOKENS, self.geometry.vocab_size // 2)
        return first + self._random("tour").permutation(self.geometry.vocab_size - first)

    def prompt(self, start: int, count: int) -> list[int]:
        """`count` consecutive token ids of the tour, from place `start` on."""
        return self.tour[np.arange(start, start + count) % len(self.tour)].tolist()

    def continuation(self, prompt: list[int], count: int) -> list[int]:
        """Return the tokens that greedy decoding must give after a prompt that ends on the tour."""
        return self.prompt(int(np.flatnonzero(self.tour == prompt[-1])[0]) + 1, count)

    def routing(self, layer: int, tokens: list[int]) -> Array:
        """Return the experts that a gate chooses from embeddings alone, [tokens, experts_per_token]."""
        gate = to_float32(self._gate(layer))
        logits = to_float32(self._embeddings(np.array(tokens))) @ gate.T
        return np.argsort(-logits, axis=1)[:, : self.geometry.experts_per_token]

    # the weights

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of a weight, [rows, columns], bf16 bit patterns; a norm is one row."""
        *rows, columns = self.shapes[name]
        stop = rows[0] if rows and stop is None else stop or 1
        kind = name.split(".")[-2]
        if kind in MATRICES:
            return self._rolled(name, kind, start, stop)
        if kind == "embed_tokens":
            return self._embeddings(np.arange(start, stop))
        if kind == "lm_head":
            return self._head(start, stop)
        if kind == "gate":
            return self._gate(int(name.split(".")[2]))[start:stop]
        return np.full((1, columns), 0x3F80, np.uint16)  # a norm's 1.0

    def pattern(self, kind: str) -> Array:
        """Return the pattern that all matrices of a kind repeat: [pattern rows, columns] of bf16 bit patterns."""
        return _pattern(self, kind)

    def roll(self, name: str) -> tuple[int, int]:
        """By how many rows and columns a matrix starts into its pattern; columns a multiple of 64.

        Row r of the matrix is pattern row (rows + r) mod pattern rows, its column c is (columns + c) mod columns.
        """
        parts = name.split(".")
        number = int(parts[2])
        if "experts" in parts:
            number = self.source_layer(number) * self.geometry.num_experts + int(parts[parts.index("experts") + 1])
        height, width = self.pattern(parts[-2]).shape
        blocks = max(1, width // ROLL_COLUMNS)
        return (37 * (number // blocks) + 11 * (number % blocks)) % height, ROLL_COLUMNS * (number % blocks) % width

    def source_layer(self, layer: int) -> int:
        """Return the first layer with the same expert weights."""
        return layer % (self.distinct_layers or self.geometry.num_layers)

    def _random(self, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what.encode()])

    def _rolled(self, name: str, kind: str, start: int, stop: int) -> Array:
        pattern, (down, right) = self.pattern(kind), self.roll(name)
        height, width = pattern.shape
        out = np.empty((stop - start, width), np.uint16)
        row = start
        while row < stop:
            first = (down + row) % height
            count = min(height - first, stop - row)
            target, source = out[row - start : row - start + count], pattern[first : first + count]
            target[:, : width - right] = source[:, right:]
            target[:, width - right :] = source[:, :right]
            row += count
        return out

    def deviation(self, kind: str) -> float:
        """Return the standard deviation of a kind of matrix's weights."""
        geometry = self.geometry
        if kind == "o_proj":
            return MOVED * (2 * geometry.num_layers * geometry.num_heads * geometry.head_dim) ** -0.5
        if kind == "w2":
            repeats = geometry.num_layers / (self.distinct_layers or geometry.num_layers)
            layers = geometry.num_layers * (1 + SEEN_AGAIN * (repeats - 1))
            return MOVED / EXPERTS_OUT * (layers * geometry.intermediate_size) ** -0.5
        return geometry.hidden_size**-0.5

    @cached_property
    def _topics(self) -> Array:
        """[topics, hidden / 2]"""
        count = -(-len(self.tour) // TOPIC_TOKENS)
        shape = (count, self.geometry.hidden_size // 2)
        return to_bf16(self._random("topics").standard_normal(shape, dtype=np.float32))

    @cached_property
    def _identities(self) -> Array:
        """[vocabulary, hidden / 2]"""
        shape = (self.geometry.vocab_size, self.geometry.hidden_size // 2)
        return to_bf16(self._random("identities").standard_normal(shape, dtype=np.float32))

    @cached_property
    def _topic_of(self) -> Array:
        """By token; special ones have the first topic."""
        topics = np.zeros(self.geometry.vocab_size, np.int64)
        topics[self.tour] = np.arange(len(self.tour)) // TOPIC_TOKENS
        return topics

    @cached_property
    def _before(self) -> Array:
        """By token, the one before it on the tour; -1 for special ones."""
        before = np.full(self.geometry.vocab_size, -1)
        before[self.tour] = np.roll(self.tour, 1)
        return before

    def _embeddings(self, tokens: Array) -> Array:
        return np.concatenate((self._topics[self._topic_of[tokens]], self._identities[tokens]), axis=1)

    def _head(self, start: int, stop: int) -> Array:
        """Scaled by a power of two, and so exactly; rows of special tokens are zero, which never wins."""
        scale = np.float32(2.0 ** round(np.log2(HEAD_LOGIT / self.geometry.hidden_size)))
        before = self._before[start:stop]
        head = to_bf16(to_float32(self._embeddings(before)) * scale)
        head[before < 0] = 0
        return head

    def _gate(self, layer: int) -> Array:
        """[experts, hidden]; rows of length one, so that all experts are chosen equally often."""
        depth = layer / max(1, self.geometry.num_layers - 1)
        topic = np.interp(depth, *TOPIC_SHARE)
        shape = (2, self.geometry.num_experts, self.geometry.hidden_size // 2)
        halves = self._random(f"gate {layer}").standard_normal(shape, dtype=np.float32)
        halves /= np.linalg.norm(halves, axis=2, keepdims=True)
        return to_bf16(np.concatenate((halves[0] * topic**0.5, halves[1] * (1 - topic) ** 0.5), axis=1))


def shared_experts(chosen: Array) -> float:
    """Return the share of consecutive tokens with an expert in common; `chosen` [tokens, experts_per_token]."""
    return float((chosen[1:, :, None] == chosen[:-1, None, :]).any((1, 2)).mean())


@lru_cache(maxsize=16)
def _pattern(model: SyntheticModel, kind: str) -> Array:
    geometry = model.geometry
    projections = {"q_proj": geometry.num_heads, "k_proj": geometry.num_kv_heads, "v_proj": geometry.num_kv_heads}
    if kind in projections:
        rows, columns = projections[kind] * geometry.head_dim, geometry.hidden_size
    elif kind == "o_proj":
        rows, columns = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    else:
        rows, columns = geometry.expert_matrices[kind]
    height = min(rows, max(32, PATTERN_WEIGHTS // columns))
    values = model._random(kind).standard_normal((height, columns), dtype=np.float32)
    return to_bf16(values * np.float32(model.deviation(kind)))
