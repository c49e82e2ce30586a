"""Write a model, or a store, as an ordinary checkpoint, in half precision and under the published names.

Quantised experts are dequantised a few rows at a time as they are written, so that writing takes no more memory than
running the model. transformers' own `MixtralForCausalLM.from_pretrained` reads the checkpoint; so does qmix.

Until all weights are on the disk, their files have names that nothing reads. `config.json`, which makes a directory a
checkpoint, is deleted before the shards are replaced, and written last.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import MixtralForCausalLM

from qmix.checkpoint.naming import expert_key
from qmix.checkpoint.safetensors_header import DTYPES, build_header
from qmix.checkpoint.torch_dtypes import HALF
from qmix.disk.space import require_space
from qmix.errors import QmixError, StoreError, UsageError, mending
from qmix.files import JSON_LIMIT, read_bounded, write_whole
from qmix.geometry import HALF_BYTES, MATRICES, Geometry
from qmix.model.dense import DenseWeights
from qmix.pool.experts import ExpertPool
from qmix.pool.protocol import Pool
from qmix.progress import OnProgress, counted, ignore
from qmix.store.opened import Store, is_store
from qmix.store.use import StoreUse
from qmix.units import parse_bytes

SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")
INDEX, CONFIG, GENERATION = "model.safetensors.index.json", "config.json", "generation_config.json"
PARTIAL = ".partial"
EXPORT_SLOTS = 2  # records in memory: one that is written, one that is read


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
    files = {GENERATION: _generation_config(model).encode(), CONFIG: _config(model)}
    _write(directory, _dense(model, pool.store.geometry), pool, files, max_shard_size)


def export_store(
    store: Store, directory: Path, max_shard_size: int | str, on_progress: OnProgress = ignore
) -> dict[str, int]:
    """Write a store as a checkpoint, with its tokenizer; return the bytes of its weight files by name.

    Dense weights and records are read and checked one by one. Raises as `write_checkpoint` does, and StoreError.
    """
    small = {name: store.directory / name for name in store.parts if (store.directory / name).is_file()}
    files = {name: read_bounded(path, JSON_LIMIT, StoreError, mending(store.directory)) for name, path in small.items()}
    files |= {CONFIG: _as_json(store.config, HALF[store.layout.dtype])}
    slots = dict.fromkeys(store.layout.record_counts, EXPORT_SLOTS)
    use = closing(StoreUse(store.directory))  # nobody removes it meanwhile
    with use, closing(DenseWeights(store)) as dense, closing(ExpertPool(store, slots)) as pool:
        return _write(directory, dense, pool, files, max_shard_size, on_progress)


def _write(
    directory: Path,
    dense: Mapping[str, torch.Tensor],
    pool: Pool,
    small_files: Mapping[str, bytes],
    max_shard_size: int | str,
    on_progress: OnProgress = ignore,
) -> dict[str, int]:
    """Write shards and their index, then the small files, the config last; return the shards' bytes of weights."""
    if directory.is_file() or is_store(directory):
        raise UsageError(f"{directory}: is a {'file' if directory.is_file() else 'store'}; give another directory")
    plan = _plan(pool.store.geometry)
    shards = split_state_dict_into_shards_factory(
        {each.name: each for each in plan},
        get_storage_size=lambda each: each.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size if isinstance(max_shard_size, int) else parse_bytes(max_shard_size),
    )
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    total = sum(each.nbytes for each in plan)
    require_space([(directory, total)])
    by_name = {each.name: each for each in plan}
    written = counted(total, on_progress)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, names in shards.filename_to_tensors.items():
            with (directory / (file + PARTIAL)).open("wb") as out:
                _write_shard(out, [by_name[name] for name in names], dense, pool, written)
        _put_in_place(directory, list(shards.filename_to_tensors))
        if shards.is_sharded:
            write_whole(directory / INDEX, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
        for name in sorted(small_files, key=lambda name: name == CONFIG):
            write_whole(directory / name, small_files[name])
    except OSError as error:
        raise QmixError(f"{directory}: {error.strerror} while writing the checkpoint; give another directory") from None
    return {file: sum(by_name[name].nbytes for name in names) for file, names in shards.filename_to_tensors.items()}


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


def _write_shard(
    out: BinaryIO,
    tensors: list[Planned],
    dense: Mapping[str, torch.Tensor],
    pool: Pool,
    written: Callable[[int], None],
) -> None:
    stored, placed, position = DTYPES[pool.store.layout.dtype], [], 0
    for each in tensors:
        placed.append((each.name, stored, each.shape, position))
        position += each.nbytes
    out.write(build_header(placed, position, 8, {"format": "pt"})[0])
    for each in tensors:
        whole = [dense[each.name].detach().cpu()] if each.expert is None else _pieces(pool, *each.expert)
        for piece in whole:
            out.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
            written(piece.nbytes)
    out.flush()
    os.fsync(out.fileno())


def _pieces(pool: Pool, layer: int, expert: int, matrix: str) -> Iterator[torch.Tensor]:
    """Yield one matrix of an expert, dequantised, a few rows at a time, while the next expert is read."""
    experts = pool.store.geometry.num_experts
    following = layer * experts + expert + 1
    coming = [divmod(following, experts)] if following < pool.store.geometry.num_records else []
    for _, found in pool.get(layer, [expert], coming):
        by_name = dict(zip(MATRICES, (found.gate, found.up, found.down), strict=True))
        yield from by_name[matrix].widened(HALF[pool.store.layout.dtype])


def _config(model: MixtralForCausalLM) -> bytes:
    return _as_json(json.loads(model.config.to_json_string(use_diff=True)), model.dtype)


def _as_json(config: Mapping[str, Any], dtype: torch.dtype) -> bytes:
    """Return the content of config.json: the model's own, with the keys by which transformers finds its class."""
    known = {name: value for name, value in config.items() if name != "torch_dtype"}  # the older name of `dtype`
    content = known | {"architectures": ["MixtralForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _generation_config(model: MixtralForCausalLM) -> str:
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"model.generation_config: transformers would not read it again ({reason[:200]})") from None
    text: str = model.generation_config.to_json_string()
    return text
