"""Write a model as an ordinary checkpoint, in half precision and under the published names.

Quantised experts are dequantised a few rows at a time as they are written, so that writing takes no more memory than
running the model. transformers' own `MixtralForCausalLM.from_pretrained` reads the checkpoint; so does qmix.

Until all weights are on the disk, their files have names that nothing reads. `config.json`, which makes a directory a
checkpoint, is deleted before the shards are replaced, and written last.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import MixtralForCausalLM

from qmix.checkpoint.naming import expert_key
from qmix.checkpoint.safetensors_header import DTYPES, build_header
from qmix.checkpoint.torch_dtypes import HALF
from qmix.disk.space import require_space
from qmix.errors import QmixError, UsageError
from qmix.files import write_whole
from qmix.geometry import HALF_BYTES, MATRICES, Geometry
from qmix.pool.protocol import Pool
from qmix.store.opened import is_store
from qmix.units import parse_bytes

SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")
INDEX, CONFIG, GENERATION = "model.safetensors.index.json", "config.json", "generation_config.json"
PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the checkpoint. `expert` is (layer, expert, matrix), None for a dense weight."""

    name: str
    shape: tuple[int, ...]
    expert: tuple[int, int, str] | None = None

    @property
    def nbytes(self) -> int:
        """Return its bytes in half precision."""
        return HALF_BYTES * torch.Size(self.shape).numel()


def write_checkpoint(model: MixtralForCausalLM, pool: Pool, directory: Path, max_shard_size: int | str) -> None:
    """Write all weights of a model with its experts in `pool`, its config and its generation config.

    Shards are at most `max_shard_size` bytes ("5GB", "512MiB"), except for a larger tensor. An earlier checkpoint in
    the directory is replaced. Raises UsageError where the directory is a store or a file, where the model has other
    dense weights than its store, or a generation config that transformers would refuse; QmixError where the disk fails.
    """
    if directory.is_file() or is_store(directory):
        raise UsageError(f"{directory}: is a {'file' if directory.is_file() else 'store'}; give another directory")
    dense, plan = _dense(model, pool.store.geometry), _plan(pool.store.geometry)
    shards = split_state_dict_into_shards_factory(
        {each.name: each for each in plan},
        get_storage_size=lambda each: each.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size if isinstance(max_shard_size, int) else parse_bytes(max_shard_size),
    )
    configs = {GENERATION: _generation_config(model), CONFIG: _config(model)}
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    require_space([(directory, sum(each.nbytes for each in plan))])
    by_name = {each.name: each for each in plan}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, names in shards.filename_to_tensors.items():
            with (directory / (file + PARTIAL)).open("wb") as out:
                _write_shard(out, [by_name[name] for name in names], dense, pool)
        _put_in_place(directory, list(shards.filename_to_tensors))
        if shards.is_sharded:
            write_whole(directory / INDEX, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
        for name, content in configs.items():
            write_whole(directory / name, content.encode())
    except OSError as error:
        raise QmixError(f"{directory}: {error.strerror} while writing the checkpoint; give another directory") from None


def _put_in_place(directory: Path, files: list[str]) -> None:
    """Rename finished shards to their names, and delete an earlier checkpoint's."""
    for name in (CONFIG, INDEX):
        (directory / name).unlink(missing_ok=True)
    for path in list(directory.iterdir()):
        if SHARD.fullmatch(path.name) and path.name.removesuffix(PARTIAL) not in files:
            path.unlink()
    for file in files:
        (directory / (file + PARTIAL)).replace(directory / file)


def _plan(geometry: Geometry) -> list[Planned]:
    """Return every tensor of the checkpoint, a layer's experts beside its dense weights."""
    tensors = []
    for name, shape in geometry.dense_tensors.items():
        tensors.append(Planned(name, shape))
        gate = re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.gate\.weight", name)
        for expert in range(geometry.num_experts) if gate else ():
            for matrix in MATRICES:
                where = int(gate[1]), expert, matrix  # type: ignore[index]
                tensors.append(Planned(expert_key(*where), geometry.expert_matrices[matrix], where))
    return tensors


def _dense(model: MixtralForCausalLM, geometry: Geometry) -> dict[str, torch.Tensor]:
    """Return the model's parameters as they are now, by published name."""
    found = {name.replace(".mlp.", ".block_sparse_moe."): weight for name, weight in model.named_parameters()}
    if geometry.tie_embeddings:
        found.pop("lm_head.weight", None)  # over several devices the head is a copy of the embeddings
    if {name: tuple(weight.shape) for name, weight in found.items()} != geometry.dense_tensors:
        strange = sorted(found.keys() ^ geometry.dense_tensors.keys())
        raise UsageError(
            f"the model's parameters are not those of its store ({', '.join(strange[:2]) or 'other shapes'}); "
            "merge or remove adapters, and undo changes of shape, before saving"
        )
    return found


def _write_shard(out: BinaryIO, tensors: list[Planned], dense: dict[str, torch.Tensor], pool: Pool) -> None:
    stored, placed, position = DTYPES[pool.store.layout.dtype], [], 0
    for each in tensors:
        placed.append((each.name, stored, each.shape, position))
        position += each.nbytes
    out.write(build_header(placed, position, 8, {"format": "pt"})[0])
    for each in tensors:
        if each.expert is None:
            _write(out, dense[each.name].detach().cpu())
            continue
        for piece in _pieces(pool, *each.expert):
            _write(out, piece)
    out.flush()
    os.fsync(out.fileno())


def _pieces(pool: Pool, layer: int, expert: int, matrix: str) -> Iterator[torch.Tensor]:
    """Yield one matrix of an expert, dequantised, a few rows at a time."""
    for _, found in pool.get(layer, [expert]):
        by_name = dict(zip(MATRICES, (found.gate, found.up, found.down), strict=True))
        yield from by_name[matrix].pieces(HALF[pool.store.layout.dtype])


def _write(out: BinaryIO, tensor: torch.Tensor) -> None:
    out.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _config(model: MixtralForCausalLM) -> str:
    """Return the content of config.json: the model's own, with the keys by which transformers finds its class."""
    content = json.loads(model.config.to_json_string(use_diff=True))
    content |= {"architectures": ["MixtralForCausalLM"], "dtype": str(model.dtype).removeprefix("torch.")}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _generation_config(model: MixtralForCausalLM) -> str:
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"model.generation_config: transformers would not read it again ({reason[:200]})") from None
    text: str = model.generation_config.to_json_string()
    return text
