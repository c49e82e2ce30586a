"""The shape of a Mixtral: everything that follows from config.json alone.

Pure arithmetic; loads neither torch nor transformers, so that a plan can be made at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmix.errors import CheckpointError

HALF_BYTES = 2  # bf16 and fp16 alike
MATRICES = ("w1", "w3", "w2")  # gate, up, down: the order inside an expert record
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
    """Sizes of one Mixtral. `sliding_window` is None where attention sees the whole context."""

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
            if type(value) is not int or value < 1:
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
        """From the contents of a Hugging Face config.json. Raises CheckpointError, naming `where`."""
        if config.get("model_type") != "mixtral":
            raise CheckpointError(f"{where}: model_type is {config.get('model_type')!r}; qmix runs Mixtral models only")
        full = _DEFAULTS | config
        if full["num_key_value_heads"] is None:
            full["num_key_value_heads"] = full.get("num_attention_heads")
        try:
            if full["head_dim"] is None:
                full["head_dim"] = _whole_quotient(full["hidden_size"], full["num_attention_heads"])
            return cls(
                **{name: full[key] for name, key in CONFIG_KEYS.items()},
                tie_embeddings=bool(full["tie_word_embeddings"]),
                sliding_window=full["sliding_window"],
            )
        except KeyError as error:
            raise CheckpointError(f"{where}: the key {error} is missing") from None
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {str(error).removeprefix('config: ')}") from None

    @property
    def expert_matrices(self) -> dict[str, tuple[int, int]]:
        """[rows, columns] of the three matrices of one expert, in record order."""
        inner, hidden = self.intermediate_size, self.hidden_size
        return {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}

    @property
    def dense_tensors(self) -> dict[str, tuple[int, ...]]:
        """Published Hugging Face name to shape of every weight that is not an expert's."""
        hidden, q_rows = self.hidden_size, self.num_heads * self.head_dim
        kv_rows = self.num_kv_heads * self.head_dim
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            tensors |= {
                prefix + "input_layernorm.weight": (hidden,),
                prefix + "self_attn.q_proj.weight": (q_rows, hidden),
                prefix + "self_attn.k_proj.weight": (kv_rows, hidden),
                prefix + "self_attn.v_proj.weight": (kv_rows, hidden),
                prefix + "self_attn.o_proj.weight": (hidden, q_rows),
                prefix + "post_attention_layernorm.weight": (hidden,),
                prefix + "block_sparse_moe.gate.weight": (self.num_experts, hidden),
            }
        tensors["model.norm.weight"] = (hidden,)
        if not self.tie_embeddings:
            tensors["lm_head.weight"] = (self.vocab_size, hidden)
        return tensors

    @property
    def num_records(self) -> int:
        """Experts in the whole model, one record each."""
        return self.num_layers * self.num_experts

    @property
    def kv_bytes_per_token(self) -> int:
        """Key and value cache of one token over all layers, in half precision."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * HALF_BYTES


_DEFAULTS = {  # transformers', for the keys that a published config may leave out
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 4096 * 32,
    "tie_word_embeddings": False,
    "sliding_window": None,
}


def _whole_quotient(a: Any, b: Any) -> Any:
    """a // b, or 1 where that is not defined: the check of a and b themselves then says what is wrong."""
    return a // b if type(a) is type(b) is int and b > 0 else 1


def config_from_params(params: dict[str, Any], where: str = "params.json") -> dict[str, Any]:
    """The Hugging Face config that says what a Mistral-release params.json says."""
    context = ("max_seq_len", "max_position_embeddings")
    try:
        moe = params["moe"]
        config = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": params["dim"],
            "intermediate_size": params["hidden_dim"],
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params["n_kv_heads"],
            "head_dim": params["head_dim"],
            "num_local_experts": moe["num_experts"],
            "num_experts_per_tok": moe["num_experts_per_tok"],
            "vocab_size": params["vocab_size"],
            "rms_norm_eps": params["norm_eps"],
            "max_position_embeddings": next((params[key] for key in context if params.get(key)), 65536),
            "sliding_window": params.get("sliding_window"),
            "tie_word_embeddings": bool(params.get("tied_embeddings", False)),
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }
    except KeyError as error:
        raise CheckpointError(f"{where}: the key {error} is missing; is it of a Mixtral?") from None
    except TypeError:
        raise CheckpointError(f"{where}: moe is not an object; is it of a Mixtral?") from None
    theta = params.get("rope_theta", 1e6)
    return config | {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
