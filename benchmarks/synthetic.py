"""Write a synthetic Mixtral checkpoint of any geometry, shard by shard, without holding it in memory.

    python benchmarks/synthetic.py OUT --layers 1 --hidden 6144 --intermediate 16384 --experts 2 --heads 48 --kv-heads 8
    python benchmarks/synthetic.py OUT --model 8x22b --layers 1

Its greedy text and its routing are known beforehand: see synthetic_weights.py. The tokenizer is the embedded model's,
which has names for few of its tokens. Give prompts as token ids: `SyntheticModel.of(OUT).prompt(start, count)`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np
from synthetic_weights import PRESETS, SyntheticModel, shared_experts

from qmix.checkpoint.safetensors_header import build_header
from qmix.disk.space import require_space
from qmix.models import EMBEDDED

SHARD_BYTES = 2 * 10**9
CHUNK_WEIGHTS = 2**24
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SAMPLE = 4096  # tokens that routing is looked at on

_SIZES = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "experts": "num_experts",
    "experts_per_token": "experts_per_token",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
    "max_position": "max_position",
}


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which model; `model_from` makes it of them."""
    for name in reversed(_SIZES):
        text = "at least the 4096 of the embedded tokenizer" if name == "vocabulary" else None
        command = click.option(f"--{name.replace('_', '-')}", type=int, help=text)(command)
    command = click.option("--distinct-layers", default=0, help="Expert weights of layer l mod this.")(command)
    command = click.option("--seed", default=0, show_default=True)(command)
    command = click.option("--layers", default=2, show_default=True)(command)
    presets = click.Choice(list(PRESETS))
    return click.option("--model", type=presets, default="8x7b", help="Whose other sizes it has.")(command)


def model_from(model: str, layers: int, seed: int, distinct_layers: int, **sizes: int | None) -> SyntheticModel:
    given: dict[str, Any] = {_SIZES[name]: size for name, size in sizes.items() if size is not None}
    geometry = replace(PRESETS[model], num_layers=layers, **given)
    return SyntheticModel(geometry, seed, distinct_layers if distinct_layers < layers else 0)


def describe_routing(model: SyntheticModel) -> dict[str, Any]:
    """By layer the share of consecutive tokens with an expert in common; the use of the least and most used expert."""
    tokens, experts = model.prompt(0, SAMPLE), model.geometry.num_experts
    chosen = [model.routing(layer, tokens) for layer in range(model.geometry.num_layers)]
    use = np.concatenate([np.bincount(layer.ravel(), minlength=experts) for layer in chosen])
    shares = [round(shared_experts(layer), 3) for layer in chosen]
    return {"shared_experts": shares, "expert_use": [round(float(f(use) / use.mean()), 2) for f in (np.min, np.max)]}


def copy_tokenizer(directory: Path) -> None:
    for name in TOKENIZER_FILES:
        shutil.copyfile(EMBEDDED["tiny"] / name, directory / name)


def _shards(weights: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.items():
        if shard and 2 * sum(map(prod, [*shard.values(), shape])) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def write_checkpoint(directory: Path, model: SyntheticModel) -> int:
    """bf16 weights in Hugging Face names; returns their bytes. Raises StoreError where the disk is too small."""
    total = 2 * sum(map(prod, model.shapes.values()))
    require_space([(directory, total)])
    directory.mkdir(parents=True)
    shards = list(_shards(model.shapes))
    where = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors, end = [], 0
        for name, shape in shard.items():
            tensors.append((name, "BF16", shape, end))
            end += 2 * prod(shape)
        header, _ = build_header(tensors, end, 8)
        with (directory / file).open("wb") as out:
            out.write(header)
            for name, shape in shard.items():
                for start, stop in row_chunks(shape):
                    out.write(model.rows(name, start, stop).data)
                where[name] = file
    index_file = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    (directory / "config.json").write_text(json.dumps(model.config, indent=2))
    copy_tokenizer(directory)
    return total


def row_chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """[start, stop) of some 16 million weights each; a norm is one row."""
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@model_options
def main(directory: Path, **options: Any) -> None:
    """Write a checkpoint to DIRECTORY; print its size and measured routing, one JSON line."""
    model = model_from(**options)
    size = write_checkpoint(directory, model)
    print(json.dumps({"checkpoint": str(directory), "bytes": size, **describe_routing(model)}))


if __name__ == "__main__":
    main()
