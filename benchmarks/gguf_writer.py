"""Write a synthetic model as GGUF for llama.cpp, with the same weights as its checkpoint or store.

    PYTHONPATH=. PEER/bin/python benchmarks/gguf_writer.py STORE OUT.gguf --dense bf16

STORE is a store or checkpoint written by synthetic_store.py or synthetic.py; only its config is read. PEER is an
environment with gguf and llama-cpp-python, whose quantiser does the rounding. Experts are Q4_0, gates and norms F32.
Dense weights are BF16. With `--dense q4_0` they have the types that llama-quantize gives them in its Q4_0 with 8
experts: Q4_0, but Q8_0 for k and v, Q6_K for the head. A pattern that several matrices repeat is quantised once. This
is exact, because no block crosses a row and rolls are of whole blocks.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path

import gguf  # type: ignore[import-not-found, unused-ignore]
import numpy as np
from gguf import GGMLQuantizationType as Type
from llama_cpp import _ggml  # type: ignore[import-not-found, unused-ignore]
from synthetic_weights import MATRICES, SPECIAL_TOKENS, Array, SyntheticModel, to_float32

from qmix.checkpoint.naming import expert_key
from qmix.disk.space import require_space

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
Q6_K_COLUMNS = 256
QUANTIZE_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file; `encode` makes its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Type
    encode: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size

    @property
    def layer(self) -> int:
        """-1 for what belongs to none."""
        return int(self.name.split(".")[1]) if self.name.startswith("blk.") else -1


class Encoder:
    """Turns a model's weights into bytes, and knows each one's type."""

    def __init__(self, model: SyntheticModel, experts: Type, dense: Type) -> None:
        self.model, self.experts, self.dense = model, experts, dense
        self.pattern = cache(self._pattern)  # by kind and type

    def type_of(self, name: str) -> Type:
        """Return the type of a dense weight."""
        kind = name.split(".")[-2]
        if kind == "gate" or "norm" in kind:
            return Type.F32
        if self.dense == Type.Q4_0 and kind == "lm_head":
            return Type.Q8_0 if self.model.geometry.hidden_size % Q6_K_COLUMNS else Type.Q6_K
        if self.dense == Type.Q4_0 and kind in ("k_proj", "v_proj") and self.model.geometry.num_experts == 8:
            return Type.Q8_0
        return self.dense

    def encode(self, name: str, kind: Type) -> Array:
        """Return a weight's bytes, [rows, bytes of a row]."""
        matrix = name.split(".")[-2]
        if matrix not in MATRICES:
            return quantize(self.model.rows(name), kind)
        pattern, (down, right) = self.pattern(matrix, kind), self.model.roll(name)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        order = (self._row_order(matrix, self.model.shapes[name][0]) + down) % len(pattern)
        return np.take(np.roll(pattern, -(right // block) * size, axis=1), order, axis=0)

    def encode_experts(self, layer: int, matrix: str) -> Array:
        """[experts, rows, bytes of a row]"""
        experts = range(self.model.geometry.num_experts)
        return np.stack([self.encode(expert_key(layer, expert, matrix), self.experts) for expert in experts])

    def _pattern(self, matrix: str, kind: Type) -> Array:
        return quantize(self.model.pattern(matrix), kind)

    def _row_order(self, matrix: str, rows: int) -> Array:
        """Rotary pairs lie side by side in q and k here, halves of a head apart in Hugging Face's order."""
        heads = {"q_proj": self.model.geometry.num_heads, "k_proj": self.model.geometry.num_kv_heads}
        order = np.arange(rows)
        if matrix not in heads:
            return order
        return order.reshape(heads[matrix], 2, -1).swapaxes(1, 2).reshape(-1)


def quantize(bits: Array, kind: Type) -> Array:
    """bf16 bit patterns [rows, columns] in a type of llama.cpp, by its own code: uint8 [rows, bytes of a row]."""
    rows, columns = bits.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind == Type.BF16:
        return bits.view(np.uint8)
    if kind == Type.F32:
        return to_float32(bits).view(np.uint8)
    out = np.empty((rows, columns // block * size), np.uint8)
    for start in range(0, rows, QUANTIZE_ROWS):
        values = to_float32(bits[start : start + QUANTIZE_ROWS])
        target = out[start : start + QUANTIZE_ROWS]
        pointers = (ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(target.ctypes.data))
        sizes = (ctypes.c_int64(0), ctypes.c_int64(len(values)), ctypes.c_int64(columns))
        function = _ggml.libggml.ggml_quantize_chunk
        function.restype = ctypes.c_size_t
        written = function(ctypes.c_int(int(kind)), *pointers, *sizes, ctypes.c_void_p(None))
        assert written == target.nbytes
    return out


def tensors_of(model: SyntheticModel, experts: str, dense: str) -> list[Tensor]:
    """All tensors, in the order of layers, those of no layer first."""
    geometry, tensors = model.geometry, []
    encoder = Encoder(model, Type[experts.upper()], Type[dense.upper()])
    for name, shape in geometry.dense_tensors.items():
        kind = encoder.type_of(name)
        tensors.append(Tensor(_name(name), shape, kind, partial(encoder.encode, name, kind)))
    for layer in range(geometry.num_layers):
        for matrix, (rows, columns) in geometry.expert_matrices.items():
            name, fused = f"blk.{layer}.{EXPERTS[matrix]}.weight", (geometry.num_experts, rows, columns)
            tensors.append(Tensor(name, fused, encoder.experts, partial(encoder.encode_experts, layer, matrix)))
    return sorted(tensors, key=lambda tensor: tensor.layer)


def write_gguf(path: Path, model: SyntheticModel, experts: str = "q4_0", dense: str = "bf16") -> int:
    """Write the file; returns its bytes. Raises StoreError where the disk is too small."""
    tensors = tensors_of(model, experts, dense)
    require_space([(path, sum(tensor.nbytes for tensor in tensors))])
    file = gguf.GGUFWriter(path, "llama")
    _metadata(file, model)
    for tensor in tensors:
        file.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    for tensor in tensors:
        file.write_tensor_data(tensor.encode().reshape(-1))
    file.close()
    return path.stat().st_size


def _name(name: str) -> str:
    """llama.cpp's name of a dense weight."""
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def _metadata(file: gguf.GGUFWriter, model: SyntheticModel) -> None:
    geometry, config = model.geometry, model.config
    file.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    file.add_quantization_version(gguf.GGML_QUANT_VERSION)
    file.add_context_length(geometry.max_position)
    file.add_embedding_length(geometry.hidden_size)
    file.add_block_count(geometry.num_layers)
    file.add_feed_forward_length(geometry.intermediate_size)
    file.add_head_count(geometry.num_heads)
    file.add_head_count_kv(geometry.num_kv_heads)
    file.add_key_length(geometry.head_dim)
    file.add_value_length(geometry.head_dim)
    file.add_rope_dimension_count(geometry.head_dim)
    file.add_rope_freq_base(config["rope_parameters"]["rope_theta"])  # type: ignore[index]
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_expert_count(geometry.num_experts)
    file.add_expert_used_count(geometry.experts_per_token)
    file.add_vocab_size(geometry.vocab_size)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    assert len(special) == SPECIAL_TOKENS
    file.add_tokenizer_model("llama")
    ordinary = geometry.vocab_size - len(special)
    file.add_token_list([*special, *(f"t{number}" for number in range(ordinary))])
    file.add_token_scores([0.0] * geometry.vocab_size)
    unknown, control, byte, normal = 2, 3, 6, 1
    file.add_token_types([unknown, control, control, *[byte] * 256, *[normal] * ordinary])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the GGUF of a synthetic checkpoint or store.")
    parser.add_argument("model", type=Path, help="directory whose config.json says which model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", choices=("q4_0", "q8_0", "bf16"), default="q4_0")
    parser.add_argument("--dense", choices=("bf16", "q4_0"), default="bf16")
    given = parser.parse_args()
    started = time.perf_counter()
    size = write_gguf(given.out, SyntheticModel.of(given.model), given.experts, given.dense)
    print(json.dumps({"gguf": str(given.out), "bytes": size, "seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    main()
