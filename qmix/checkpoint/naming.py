"""Tensor names of the published formats, mapped to one set of keys.

Keys are Hugging Face names: a dense weight's own ("model.norm.weight"), and for an expert's matrix
"model.layers.L.block_sparse_moe.experts.E.w1.weight". Three formats are known:

- Hugging Face, as published; transformers 5 may also write a layer's experts fused into
  `mlp.experts.gate_up_proj` [E, 2I, H] and `mlp.experts.down_proj` [E, H, I];
- the Mistral release (`consolidated*.safetensors`), whose q and k rows are interleaved for rotary.
"""

from __future__ import annotations

import re
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
}
_SKIPPED = re.compile(r".*rotary_emb\.inv_freq")  # computed from the config; old checkpoints carry it


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first_row, first_row + shape[0]) of a published tensor, seen as a matrix, hold the weight `key`.

    `shape` is the weight's own; `interleaved` rows come in the Mistral release's rotary order.
    """

    key: str
    tensor: str
    shape: tuple[int, ...]
    first_row: int = 0
    interleaved: bool = False


def expert_key(layer: int, expert: int, matrix: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def expected_weights(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Every key a checkpoint of this geometry must give, with its shape."""
    weights = dict(geometry.dense_tensors)
    for layer in range(geometry.num_layers):
        for expert in range(geometry.num_experts):
            for matrix, shape in geometry.expert_matrices.items():
                weights[expert_key(layer, expert, matrix)] = shape
    return weights


def resolve(found: dict[str, tuple[int, ...]], geometry: Geometry, where: str) -> dict[str, Piece]:
    """Key to piece for every expected weight, from the published names and shapes in `found`.

    Raises CheckpointError naming a tensor that is missing, unknown or of the wrong shape.
    """
    expected = expected_weights(geometry)
    pieces: dict[str, Piece] = {}
    for tensor, shape in found.items():
        for piece in _pieces(tensor, shape, geometry, where):
            want = expected.get(piece.key)
            if want is None:
                if _SKIPPED.fullmatch(tensor) or (piece.key == "lm_head.weight" and geometry.tie_embeddings):
                    continue
                raise CheckpointError(
                    f"{where}: tensor {tensor!r} does not belong to the model that its config describes"
                )
            if piece.shape != want:
                raise _wrong_shape(where, tensor, shape, want)
            if piece.key in pieces:
                twice = pieces[piece.key].tensor
                raise CheckpointError(f"{where}: tensors {tensor!r} and {twice!r} are the same weight")
            pieces[piece.key] = piece
    missing = [key for key in expected if key not in pieces]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing{more}; is a shard missing?")
    return pieces


def _wrong_shape(where: str, tensor: str, shape: tuple[int, ...], want: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(f"{where}: tensor {tensor!r} has shape {list(shape)}, its config asks for {list(want)}")


def _pieces(tensor: str, shape: tuple[int, ...], geometry: Geometry, where: str) -> list[Piece]:
    fused = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", tensor)
    if fused:
        inner, hidden = geometry.intermediate_size, geometry.hidden_size
        each = (2 * inner, hidden) if fused[2] == "gate_up_proj" else (hidden, inner)
        if shape != (geometry.num_experts, *each):
            raise _wrong_shape(where, tensor, shape, (geometry.num_experts, *each))
        return _fused_pieces(tensor, geometry, int(fused[1]), fused[2])
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


def _fused_pieces(tensor: str, geometry: Geometry, layer: int, kind: str) -> list[Piece]:
    matrices = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    rows, cols = geometry.expert_matrices[matrices[0]]
    return [
        Piece(expert_key(layer, expert, matrix), tensor, (rows, cols), (expert * len(matrices) + index) * rows)
        for expert in range(geometry.num_experts)
        for index, matrix in enumerate(matrices)
    ]
