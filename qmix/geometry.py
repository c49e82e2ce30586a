"""The sizes of a Mixtral, and everything that follows from them.

Pure arithmetic; loads neither torch nor transformers, so that a plan is made at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from qmix.errors import CheckpointError
from qmix.files import convert_json

HALF_BYTES = 2  # bf16 and fp16 alike
MATRICES = ("w1", "w3", "w2")  # gate, up, down: the order inside an expert record
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "max_position": "max_position_embeddings",
}


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one Mixtral. `sliding_window` is None where attention sees the whole context.

    Raises CheckpointError where the sizes contradict each other.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    max_position: int
    tie_embeddings: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        sizes = {key: getattr(self, name) for name, key in CONFIG_KEYS.items()}
        if self.sliding_window is not None:
            sizes["sliding_window"] = self.sliding_window
        for key, value in sizes.items():
            if value < 1:
                raise CheckpointError(f"config: {key} must be a whole number above zero, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config: {self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly"
            )
        if self.experts_per_token > self.num_experts:
            raise CheckpointError(
                f"config: {self.experts_per_token} experts a token, but only {self.num_experts} a layer"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> Geometry:
        """Return the geometry in a Hugging Face config. Raises CheckpointError naming `where`."""
        if config.get("model_type") != "mixtral":
            raise CheckpointError(f"{where}: model_type is {config.get('model_type')!r}; qmix runs Mixtral models only")
        if config.get("per_layer_config"):
            raise CheckpointError(f"{where}: per_layer_config: qmix runs only models whose layers are all alike")
        read = convert_json(config, _Config, where, CheckpointError)
        sizes = {name: getattr(read, key) for name, key in CONFIG_KEYS.items()}
        if read.num_key_value_heads is None:
            sizes["num_kv_heads"] = read.num_attention_heads
        if read.head_dim is None:
            sizes["head_dim"] = read.hidden_size // max(1, read.num_attention_heads)
        try:
            return cls(**sizes, tie_embeddings=bool(read.tie_word_embeddings), sliding_window=read.sliding_window)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {str(error).removeprefix('config: ')}") from None

    @property
    def expert_matrices(self) -> dict[str, tuple[int, int]]:
        """Return [rows, columns] of the three matrices of one expert, in record order."""
        inner, hidden = self.intermediate_size, self.hidden_size
        return {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}

    @property
    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's dense weights, by name without the layer's prefix."""
        hidden, q_rows = self.hidden_size, self.num_heads * self.head_dim
        kv_rows = self.num_kv_heads * self.head_dim
        return {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_rows, hidden),
            "self_attn.k_proj.weight": (kv_rows, hidden),
            "self_attn.v_proj.weight": (kv_rows, hidden),
            "self_attn.o_proj.weight": (hidden, q_rows),
            "post_attention_layernorm.weight": (hidden,),
            "block_sparse_moe.gate.weight": (self.num_experts, hidden),
        }

    @property
    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights outside layers, by name, in the order in which a token meets them."""
        table = (self.vocab_size, self.hidden_size)
        tensors: dict[str, tuple[int, ...]] = {EMBEDDINGS: table, "model.norm.weight": (self.hidden_size,)}
        return tensors if self.tie_embeddings else tensors | {HEAD: table}

    def each_dense_tensor(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the published Hugging Face name and the shape of every dense weight."""
        first, *rest = self.outer_tensors.items()
        yield first
        for layer in range(self.num_layers):
            yield from ((f"model.layers.{layer}.{name}", shape) for name, shape in self.layer_tensors.items())
        yield from rest

    @property
    def dense_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all dense weights by published name."""
        return dict(self.each_dense_tensor())

    @property
    def num_records(self) -> int:
        """Return the number of experts in the whole model, one record each."""
        return self.num_layers * self.num_experts

    @property
    def num_weights(self) -> int:
        """Return the number of tensors in the whole model: dense ones, and three for each expert."""
        a_layer = len(self.layer_tensors) + len(MATRICES) * self.num_experts
        return len(self.outer_tensors) + self.num_layers * a_layer

    @property
    def kv_bytes_per_token(self) -> int:
        """Return the bytes of one token's keys and values over all layers, in half precision."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * HALF_BYTES


class _Config(msgspec.Struct):
    """The keys of a Hugging Face config.json that give a Mixtral's sizes; defaults are transformers'."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    max_position_embeddings: int = 4096 * 32
    tie_word_embeddings: bool | None = False
    sliding_window: int | None = None
    rms_norm_eps: Annotated[float, msgspec.Meta(ge=0)] = 1e-5


class _Mixture(msgspec.Struct):
    num_experts: int
    num_experts_per_tok: int


class _Params(msgspec.Struct):
    """The content of a Mistral release's params.json."""

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    moe: _Mixture
    rope_theta: float = 1e6
    max_seq_len: int | None = None
    max_position_embeddings: int | None = None
    sliding_window: int | None = None
    tied_embeddings: bool | None = False


def config_from_params(params: dict[str, Any], where: str = "params.json") -> dict[str, Any]:
    """Return the Hugging Face config of a Mistral release's params.json. Raises CheckpointError naming `where`."""
    read = convert_json(params, _Params, where, CheckpointError, "is it of a Mixtral?")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": read.dim,
        "intermediate_size": read.hidden_dim,
        "num_hidden_layers": read.n_layers,
        "num_attention_heads": read.n_heads,
        "num_key_value_heads": read.n_kv_heads,
        "head_dim": read.head_dim,
        "num_local_experts": read.moe.num_experts,
        "num_experts_per_tok": read.moe.num_experts_per_tok,
        "vocab_size": read.vocab_size,
        "rms_norm_eps": read.norm_eps,
        "max_position_embeddings": read.max_seq_len or read.max_position_embeddings or 65536,
        "sliding_window": read.sliding_window,
        "tie_word_embeddings": bool(read.tied_embeddings),
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": read.rope_theta, "rope_type": "default"},
    }
