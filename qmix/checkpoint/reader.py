"""The index of a checkpoint: the place of each weight in its files, checked before any weight is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from qmix.checkpoint.foreign import check_files, check_not_quantised
from qmix.checkpoint.naming import Piece, resolve
from qmix.checkpoint.safetensors_header import AGAIN, ITEM_BYTES, TensorInfo, check_no_pointer
from qmix.checkpoint.source import LocalSource, Source
from qmix.disk.faults import disk_advice
from qmix.errors import CheckpointError
from qmix.files import read_json
from qmix.geometry import HEAD, Geometry, config_from_params

if TYPE_CHECKING:
    import torch

HEADS = frozenset((HEAD, "output.weight"))  # in the published formats
WEIGHT_DTYPES = ("BF16", "F16", "F32")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # one of them is enough
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of the model, as rows and columns in one file of the checkpoint.

    `offset` is the position of its first row in the file, in bytes (None in pickle files). A one-dimensional weight is
    one row.
    """

    key: str
    file: str
    dtype: str
    rows: int
    cols: int
    offset: int | None
    piece: Piece

    @property
    def nbytes(self) -> int:
        return self.rows * self.cols * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: `config` (from `config_file`) in Hugging Face form; `weights` maps keys to places."""

    source: Source
    config: dict[str, Any]
    config_file: str
    geometry: Geometry
    weights: dict[str, Weight]

    @cached_property
    def seen(self) -> dict[str, str]:
        """Return the identity of each weight file at the first call."""
        return self.source.identities(self.files)

    @cached_property
    def identity(self) -> str:
        """Return a digest of the config and the weight files, without reading weights. A copy has another."""
        seen = self.source.fingerprint(self.files) or sorted(self.seen.items())
        return hashlib.sha256(json.dumps([self.config, seen], sort_keys=True).encode()).hexdigest()

    @property
    def known_fingerprint(self) -> str | None:
        """Return the fingerprint if it is known without reading, else None."""
        return self.identity if self.source.fingerprint(self.files) else self.source.recall(self.identity)

    def check_unchanged(self, files: Iterable[str] | None = None) -> None:
        """Raise CheckpointError where one of these weight files (default: all) has changed."""
        names = self.files if files is None else list(files)
        for name, identity in self.source.identities(names).items():
            if identity != self.seen[name]:
                raise CheckpointError(
                    f"{self.source.name}: {name} changed while it was read; run the same command again"
                )

    @property
    def files(self) -> list[str]:
        """Return the weight files in reading order."""
        return sorted({weight.file for weight in self.weights.values()})

    def of_file(self, file: str) -> list[Weight]:
        """Return the weights in one file in the order of their bytes."""
        mine = [weight for weight in self.weights.values() if weight.file == file]
        return sorted(mine, key=lambda weight: (weight.offset or 0, weight.key))

    def tokenizer_files(self) -> Iterator[Path]:
        for name in TOKENIZER_FILES:
            path = self.source.small_file(name)
            if path is not None:
                yield path

    @property
    def half_dtype(self) -> str:
        """Return the half precision with the least error: fp16 for a checkpoint in fp16, else bf16."""
        return "fp16" if all(weight.dtype == "F16" for weight in self.weights.values()) else "bf16"


def check_tokenizer(source: Source, required: bool = True) -> None:
    """Raise CheckpointError where a checkpoint has no tokenizer, or, if not `required`, only an unknown one."""
    there = source.files()
    if any(name in there for name in TOKENIZERS):
        return
    if required or any(_is_other_tokenizer(name) for name in there):
        raise CheckpointError(no_tokenizer(source.name, there))


def no_tokenizer(where: str, there: Iterable[str]) -> str:
    """Return the message for a directory with these files and no tokenizer that qmix reads."""
    lacks = f"{where}: has no {' or '.join(TOKENIZERS)}"
    other = max(filter(_is_other_tokenizer, there), default="")
    if other.startswith("tokenizer.model"):
        return f"{lacks}; copy its {other} to tokenizer.model"
    if other:
        return f"{lacks}, and qmix does not read its {other}; copy the model's own tokenizer.json there"
    return f"{lacks}; copy the model's own there"


def _is_other_tokenizer(name: str) -> bool:
    """Return whether a file is a tokenizer in a form that qmix does not read."""
    return name == "tekken.json" or re.fullmatch(r"tokenizer\.model\.v\d+\w*", name) is not None


class _Index(msgspec.Struct):
    """The index file of a checkpoint: the shard of each tensor."""

    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]


def read_config(source: Source) -> tuple[dict[str, Any], str]:
    """Return the model's config in Hugging Face form, from config.json or params.json, and that file's path."""
    path = source.small_file("config.json")
    if path is not None:
        return read_json(path, dict[str, Any], CheckpointError, AGAIN), str(path)
    path = source.small_file("params.json")
    if path is not None:
        return config_from_params(read_json(path, dict[str, Any], CheckpointError, AGAIN), str(path)), str(path)
    raise CheckpointError(f"{source.name}: has no config.json or params.json; is it a Mixtral checkpoint?")


def open_checkpoint(source: Source) -> Checkpoint:
    """Index a checkpoint and check every tensor's name, type and shape, reading headers only."""
    check_files(source)
    config, where = read_config(source)
    geometry = Geometry.from_config(config, where)
    names = _weight_files(source)
    if names[0].endswith(".safetensors"):
        tensors = [(name, info) for name, header in source.headers(names).items() for info in header.values()]
    else:
        tensors = _pickle_tensors(source, names)
    check_not_quantised(source.name, config, ((info.name, info.dtype) for _, info in tensors))
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, tuple[str, TensorInfo]] = {}
    for file, info in tensors:
        if info.name in places:
            first = places[info.name][0]
            raise CheckpointError(f"{source.name}: tensor {info.name!r} is both in {first} and in {file}")
        shapes[info.name], places[info.name] = info.shape, (file, info)
    if geometry.tie_embeddings and HEADS.intersection(shapes):  # a head in the files is used, whatever the flag says
        config, geometry = config | {"tie_word_embeddings": False}, replace(geometry, tie_embeddings=False)
    pieces = resolve(shapes, geometry, source.name)
    weights = {key: _weight(piece, *places[piece.tensor], source.name) for key, piece in pieces.items()}
    return Checkpoint(source, config, where, geometry, weights)


def _weight_files(source: Source) -> list[str]:
    there = [name for name in source.files() if "/" not in name]
    lost = ""  # the message for shards that an index names and that are missing
    for single, pattern in (
        ("model.safetensors", r"model-\d+-of-\d+\.safetensors"),
        ("consolidated.safetensors", r"consolidated[-.]\d+.*\.safetensors"),
        ("pytorch_model.bin", r"pytorch_model-\d+-of-\d+\.bin"),
        ("consolidated.pth", r"consolidated\.\d+\.(pth|pt)"),
    ):
        if single in there:  # before an index, like transformers
            return [single]
        index = source.small_file(single + ".index.json")
        if index is not None:
            named = sorted(set(read_json(index, _Index, CheckpointError, AGAIN).weight_map.values()))
            missing = [name for name in named if name not in there]
            if not missing:
                return named
            lost = f"{source.name}: the shard {missing[0]} named by {index.name} is missing; fetch it"
            if len(missing) < len(named) or not all(re.fullmatch(pattern, name) for name in named):
                raise CheckpointError(lost)
        files = sorted(name for name in there if re.fullmatch(pattern, name))
        if files:  # an index of other shards is a leftover
            return files
    raise CheckpointError(
        lost or f"{source.name}: no weights found (model*.safetensors, consolidated*.safetensors, pytorch_model*.bin)"
    )


def _weight(piece: Piece, file: str, info: TensorInfo, where: str) -> Weight:
    if info.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{where}: tensor {info.name!r} is of type {info.dtype}; qmix reads {', '.join(WEIGHT_DTYPES)}"
        )
    *rows, cols = piece.shape
    count = rows[0] if rows else 1
    item = info.nbytes // max(1, _count(info.shape))
    width = count if piece.transposed else cols
    offset = None if info.offset < 0 else info.offset + piece.first_row * width * item
    return Weight(piece.key, file, info.dtype, count, cols, offset, piece)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _pickle_tensors(source: Source, names: list[str]) -> list[tuple[str, TensorInfo]]:
    """Return names, types and shapes in pickle files; `weights_only` leaves the payload on disk."""
    if not isinstance(source, LocalSource):
        raise CheckpointError(f"{source.name}: only safetensors files are read from the Hub, and it has {names[0]}")
    dtypes = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}
    found = []
    for name in names:
        for key, tensor in load_pickle(source.fetch(name)).items():
            if tensor.untyped_storage().nbytes() < tensor.nbytes:
                raise CheckpointError(f"{source.name}: tensor {key!r} in {name} is smaller than its shape; {AGAIN}")
            dtype = dtypes.get(str(tensor.dtype), str(tensor.dtype))
            found.append((name, TensorInfo(key, dtype, tuple(tensor.shape), -1, tensor.nbytes)))
    return found


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .pt, .pth or .bin file, mapped from disk; code in it is never run."""
    import torch

    check_no_pointer(path)
    try:
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; {disk_advice(error)}") from None
    except Exception:
        raise CheckpointError(
            f"{path}: damaged, or a pickle with code, which qmix never runs; fetch it again, or use safetensors files"
        ) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise CheckpointError(f"{path}: does not hold named tensors; use the safetensors files")
    return {name: value.detach() for name, value in loaded.items()}
