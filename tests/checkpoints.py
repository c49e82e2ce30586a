"""Small random Mixtral checkpoints of any geometry, in every published format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TINY_CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "tie_word_embeddings": False,
    "sliding_window": None,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def random_weights(config: dict, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights in Hugging Face names, scaled so that logits differ clearly between tokens."""
    rng = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def normal(*shape: int, scale: float | None = None) -> torch.Tensor:
        spread = shape[-1] ** -0.5 if scale is None else scale
        return (torch.randn(*shape, generator=rng) * spread).to(dtype)

    def near_one(size: int) -> torch.Tensor:
        return (1 + torch.randn(size, generator=rng) * 0.1).to(dtype)

    weights = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden, scale=1.0)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = near_one(hidden)
        weights[prefix + "post_attention_layernorm.weight"] = near_one(hidden)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, hidden)
        weights[prefix + "self_attn.o_proj.weight"] = normal(hidden, q)
        weights[prefix + "block_sparse_moe.gate.weight"] = normal(config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            inside = f"{prefix}block_sparse_moe.experts.{expert}."
            weights[inside + "w1.weight"] = normal(inner, hidden)
            weights[inside + "w2.weight"] = normal(hidden, inner)
            weights[inside + "w3.weight"] = normal(inner, hidden)
    weights["model.norm.weight"] = near_one(hidden)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(config["vocab_size"], hidden)
    return weights


def write_checkpoint(
    directory: Path,
    weights: dict[str, torch.Tensor],
    config: dict,
    shards: int = 1,
    tokenizer: Path | None = None,
) -> Path:
    """Hugging Face form: one model.safetensors, or several shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
    else:
        names, where = list(weights), {}
        for index in range(shards):
            file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
            mine = names[index * len(names) // shards : (index + 1) * len(names) // shards]
            save_file({name: weights[name] for name in mine}, directory / file)
            where |= dict.fromkeys(mine, file)
        index_file = {
            "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
            "weight_map": where,
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    if tokenizer is not None:
        for path in tokenizer.iterdir():
            if path.name.startswith("tokenizer") or path.suffix == ".jinja":
                (directory / path.name).write_bytes(path.read_bytes())
    return directory


def make_checkpoint(
    directory: Path, shards: int = 1, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes
) -> Path:
    """A checkpoint of TINY_CONFIG with `changes`."""
    config = TINY_CONFIG | changes
    return write_checkpoint(directory, random_weights(config, seed, dtype), config, shards)


def write_mistral(directory: Path, weights: dict[str, torch.Tensor], config: dict, shards: int = 1) -> Path:
    """The same weights in the Mistral release's form, q and k rows interleaved for its rotary embedding."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe": "feed_forward",
    }
    head = config["head_dim"]
    released = {}
    for name, weight in weights.items():
        rows, released_name = weight, name
        if ".q_proj." in name or ".k_proj." in name:
            # [heads, 2, head / 2, H] -> [heads, head / 2, 2, H]: the inverse of the published conversion
            rows = weight.view(-1, 2, head // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            released_name = released_name.replace(ours, theirs)
        released[released_name] = rows.contiguous()
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": head,
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "max_seq_len": config["max_position_embeddings"],
        "moe": {
            "num_experts": config["num_local_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
        },
    }
    (directory / "params.json").write_text(json.dumps(params))
    if shards == 1:
        save_file(released, directory / "consolidated.safetensors")
    else:
        keys = list(released)
        for index in range(shards):
            mine = keys[index * len(keys) // shards : (index + 1) * len(keys) // shards]
            save_file(
                {key: released[key] for key in mine},
                directory / f"consolidated-{index + 1:05d}-of-{shards:05d}.safetensors",
            )
    return directory


def write_first_release(directory: Path, weights: dict[str, torch.Tensor], config: dict) -> Path:
    """Write the weights as 8x7B was first published: a layer's experts one below the other, w2 transposed."""
    write_mistral(directory, weights, config)
    released = load_file(directory / "consolidated.safetensors")
    whole = {name.replace("feed_forward", "block_sparse_moe"): weight for name, weight in released.items()}
    for layer in range(config["num_hidden_layers"]):
        for matrix in ("w1", "w2", "w3"):
            names = [
                f"layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
                for expert in range(config["num_local_experts"])
            ]
            each = [whole.pop(name) for name in names]
            rows = [weight.T for weight in each] if matrix == "w2" else each
            whole[f"layers.{layer}.block_sparse_moe.{matrix}"] = torch.cat(rows).contiguous()
    save_file(whole, directory / "consolidated.safetensors")
    return directory


def write_fused(directory: Path, weights: dict[str, torch.Tensor], config: dict) -> Path:
    """The same weights as transformers 5 keeps them: a layer's experts fused into two tensors."""
    fused = {name: weight for name, weight in weights.items() if ".experts." not in name}
    fused = {name.replace("block_sparse_moe.gate", "mlp.gate"): weight for name, weight in fused.items()}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts."
        experts = [
            [weights[f"{prefix}{expert}.{matrix}.weight"] for matrix in ("w1", "w3", "w2")]
            for expert in range(config["num_local_experts"])
        ]
        gate_up = [torch.cat((gate, up)) for gate, up, _ in experts]
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack([down for *_, down in experts])
    return write_checkpoint(directory, fused, config)


def reference_model(directory: Path, dtype: torch.dtype = torch.float32):
    """transformers' own model of a checkpoint (its grouped experts refuse sizes no multiple of 16)."""
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()
