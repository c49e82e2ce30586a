"""Tensor names of the published formats, mapped to one set of keys.

Keys are Hugging Face names: "model.norm.weight" for a dense weight, and for an expert's matrix
"model.layers.L.block_sparse_moe.experts.E.w1.weight". Three formats are known:

- Hugging Face, as published; transformers 5 may also write the experts of a layer fused into
  `mlp.experts.gate_up_proj` [E, 2I, H] and `mlp.experts.down_proj` [E, H, I];
- the Mistral release (`consolidated*.safetensors`), whose q and k rows are interleaved for rotary;
- the first release of 8x7B, like the Mistral release, but with the experts of a layer stacked in one tensor per matrix:
  `block_sparse_moe.w1` and `.w3` [E * I, H], and `.w2` [E * I, H] with each expert transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qmix.errors import CheckpointError
from qmix.geometry import Geometry

_MISTRAL = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward": "block_sparse_moe",
    "block_sparse_moe": "block_sparse_moe",
}
_NUMBER = r"0|[1-9]\d{0,8}"
_IN_LAYER = re.compile(
    rf"model\.layers\.(?P<layer>{_NUMBER})\."
    rf"(?:block_sparse_moe\.experts\.(?P<expert>{_NUMBER})\.(?P<matrix>w[123])\.weight|(?P<rest>.+))"
)
_FUSED = re.compile(
    r"model\.layers\.(?P<new>\d+)\.mlp\.experts\.(?P<kind>gate_up_proj|down_proj)"
    r"|layers\.(?P<old>\d+)\.block_sparse_moe\.(?P<matrix>w[123])"
)
_SKIPPED = re.compile(r".*rotary_emb\.inv_freq")  # computed from the config; in old checkpoints


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first_row, first_row + shape[0]) of a published tensor, seen as a matrix, hold the weight `key`.

    `shape` is the shape of the weight. `interleaved` rows are in the rotary order of the Mistral release. If
    `transposed`, the columns of the weight are the rows [first_row, first_row + shape[1]) of the tensor.
    """

    key: str
    tensor: str
    shape: tuple[int, ...]
    first_row: int = 0
    interleaved: bool = False
    transposed: bool = False


def expert_key(layer: int, expert: int, matrix: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def expected_weights(geometry: Geometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every key of a checkpoint with this geometry, with its shape: `num_weights` in all."""
    yield from geometry.each_dense_tensor()
    for layer in range(geometry.num_layers):
        for expert in range(geometry.num_experts):
            for matrix, shape in geometry.expert_matrices.items():
                yield expert_key(layer, expert, matrix), shape


def resolve(found: dict[str, tuple[int, ...]], geometry: Geometry, where: str) -> dict[str, Piece]:
    """Return key to piece for every expected weight, from the published names and shapes in `found`.

    Time and memory are bounded by what was found, whatever the sizes in the config. Raises CheckpointError naming a
    tensor that is missing, unknown or of the wrong shape.
    """
    pieces: dict[str, Piece] = {}
    for tensor, shape in found.items():
        if _SKIPPED.fullmatch(tensor):
            continue
        for piece in _pieces(tensor, shape, geometry, where):
            if piece.key in pieces:
                twice = pieces[piece.key].tensor
                raise CheckpointError(f"{where}: tensors {tensor!r} and {twice!r} are the same weight")
            pieces[piece.key] = piece
    for key, piece in pieces.items():
        want = _expected_shape(key, geometry)
        if want is None:
            raise CheckpointError(
                f"{where}: tensor {piece.tensor!r} does not belong to the model that its config describes"
            )
        if piece.shape != want:
            raise _wrong_shape(where, piece.tensor, piece.shape, want)
    lacking = geometry.num_weights - len(pieces)
    if lacking:
        first = next(key for key, _ in expected_weights(geometry) if key not in pieces)
        more = f", and {lacking - 1} more" if lacking > 1 else ""
        raise CheckpointError(f"{where}: tensor {first!r} is missing{more}; is a shard missing?")
    return pieces


def _expected_shape(key: str, geometry: Geometry) -> tuple[int, ...] | None:
    """Return the shape of a key in `expected_weights`, None if it is not there."""
    inside = _IN_LAYER.fullmatch(key)
    if inside is None:
        return geometry.outer_tensors.get(key)
    if int(inside["layer"]) >= geometry.num_layers:
        return None
    if inside["expert"] is None:
        return geometry.layer_tensors.get(inside["rest"])
    return geometry.expert_matrices[inside["matrix"]] if int(inside["expert"]) < geometry.num_experts else None


def _wrong_shape(where: str, tensor: str, shape: tuple[int, ...], want: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(f"{where}: tensor {tensor!r} has shape {list(shape)}, its config asks for {list(want)}")


def _pieces(tensor: str, shape: tuple[int, ...], geometry: Geometry, where: str) -> list[Piece]:
    fused = _FUSED.fullmatch(tensor)
    if fused:
        experts, inner, hidden = geometry.num_experts, geometry.intermediate_size, geometry.hidden_size
        wants = {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}
        want = wants.get(fused["kind"], (experts * inner, hidden))
        if shape != want:
            raise _wrong_shape(where, tensor, shape, want)
        return _fused_pieces(tensor, geometry, fused)
    key = tensor.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    if re.match(r"layers\.\d+\.", tensor) or tensor in _MISTRAL:
        key = _mistral_key(tensor)
        return [Piece(key, tensor, shape, interleaved=bool(re.search(r"\.(q|k)_proj\.", key)))]
    return [Piece(key, tensor, shape)]


def _mistral_key(tensor: str) -> str:
    if tensor in _MISTRAL:
        return _MISTRAL[tensor]
    _, layer, rest = tensor.split(".", 2)
    for theirs, ours in _MISTRAL.items():
        if rest.startswith(theirs + "."):
            return f"model.layers.{layer}.{ours}{rest[len(theirs) :]}"
    return tensor


def _fused_pieces(tensor: str, geometry: Geometry, fused: re.Match[str]) -> list[Piece]:
    layer, matrix = int(fused["new"] or fused["old"]), fused["matrix"]
    matrices = ("w1", "w3") if fused["kind"] == "gate_up_proj" else (matrix or "w2",)
    shape, transposed = geometry.expert_matrices[matrices[0]], matrix == "w2"
    there = shape[1] if transposed else shape[0]  # rows of an expert's matrix in the tensor
    return [
        Piece(
            expert_key(layer, expert, name),
            tensor,
            shape,
            (expert * len(matrices) + index) * there,
            transposed=transposed,
        )
        for expert in range(geometry.num_experts)
        for index, name in enumerate(matrices)
    ]
