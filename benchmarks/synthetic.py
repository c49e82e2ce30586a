"""Write a random Mixtral checkpoint of any geometry, shard by shard, without ever holding it in memory.

    python benchmarks/synthetic.py OUT --layers 1 --hidden 6144 --intermediate 16384 --experts 2 --heads 48 --kv-heads 8

The weights of a matrix are drawn once per shape and repeated: real bytes to read, quantise and multiply. It speaks
the embedded model's vocabulary, of which it knows nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import BinaryIO

import click
import numpy as np

from qmix.checkpoint.naming import expected_weights
from qmix.geometry import Geometry
from qmix.models import EMBEDDED
from qmix.safetensors_header import build_header

SHARD_BYTES = 2 * 10**9
PATTERN = 2**22  # distinct weights; a power of two that is no multiple of a row repeats nowhere alike


def config_of(geometry: Geometry) -> dict[str, object]:
    """The config.json of a geometry."""
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
    }


def _shards(weights: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.items():
        if shard and 2 * sum(map(prod, [*shard.values(), shape])) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def write_checkpoint(directory: Path, geometry: Geometry, seed: int = 0) -> None:
    """Random bf16 weights, norms near one, in Hugging Face names."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(seed)
    values = random.standard_normal(PATTERN, dtype=np.float32)
    shards = list(_shards(expected_weights(geometry)))
    where = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        offsets = np.cumsum([0, *(2 * prod(shape) for shape in shard.values())]).tolist()
        tensors = [(name, "BF16", shape, at) for (name, shape), at in zip(shard.items(), offsets, strict=False)]
        header, _ = build_header(tensors, offsets[-1], 8)
        with (directory / file).open("wb") as out:
            out.write(header)
            for name, shape in shard.items():
                _write_tensor(out, values, shape, int(random.integers(PATTERN)))
                where[name] = file
    index_file = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    (directory / "config.json").write_text(json.dumps(config_of(geometry), indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED["tiny"] / name, directory / name)


def _write_tensor(out: BinaryIO, values: np.ndarray, shape: tuple[int, ...], start: int) -> None:
    scaled = 1 + 0.1 * values if len(shape) == 1 else values * shape[-1] ** -0.5
    pattern = (np.roll(scaled, -start).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    left = prod(shape)
    while left:
        part = pattern[:left]
        out.write(part.tobytes())
        left -= len(part)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--layers", default=2)
@click.option("--hidden", default=4096)
@click.option("--intermediate", default=14336)
@click.option("--experts", default=8)
@click.option("--experts-per-token", default=2)
@click.option("--heads", default=32)
@click.option("--kv-heads", default=8)
@click.option("--head-dim", default=128)
@click.option("--vocabulary", default=32000, help="at least the 4096 of the embedded tokenizer")
@click.option("--max-position", default=32768)
def main(directory: Path, **sizes: int) -> None:
    """Write a checkpoint to DIRECTORY."""
    geometry = Geometry(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        num_experts=sizes["experts"],
        experts_per_token=sizes["experts_per_token"],
        vocab_size=sizes["vocabulary"],
        max_position=sizes["max_position"],
    )
    write_checkpoint(directory, geometry)


if __name__ == "__main__":
    main()
