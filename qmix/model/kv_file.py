"""A KV cache in a safetensors file, written and read a head at a time without a copy in between.

    token_ids         [T] the token at each position
    layers.N.keys     [kv_heads, T, head_dim] in the cache's half precision
    layers.N.values

The metadata names the format and the store, and holds the XXH3 (64 bits) of all tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from qmix.checkpoint.safetensors_header import ITEM_BYTES, build_header, read_header
from qmix.checkpoint.torch_dtypes import HALF
from qmix.disk.faults import read_fully
from qmix.errors import CheckpointError, SessionError
from qmix.files import written_whole
from qmix.model.kv import KVCache
from qmix.store.opened import Store

FORMAT = "qmix-kv-1"
ALIGNMENT = 8
NAMES = {dtype: name for name, dtype in (("BF16", HALF["bf16"]), ("F16", HALF["fp16"]))}


def kv_identity(store: Store) -> str:
    """Return a digest of all that keys and values depend on besides the tokens: the weights and their precisions."""
    known = [store.fingerprint, store.layout.dtype, store.layout.precisions, *(["clip"] if store.layout.clip else [])]
    return xxhash.xxh3_64_hexdigest(json.dumps(known).encode())


def write_kv(path: Path, cache: KVCache, ids: Sequence[int], identity: str) -> None:
    """Write the first `len(ids)` positions of the cache's first sequence. Raises OSError."""
    tokens = torch.tensor(ids, dtype=torch.int64).view(torch.uint8).numpy().data
    digest = xxhash.xxh3_64()
    with written_whole(path) as file:
        file.write(_header(cache, len(ids), identity, digest.hexdigest()))
        for part in (tokens, *_parts(cache, len(ids))):
            digest.update(part)
            file.write(part)
        file.seek(0)
        file.write(_header(cache, len(ids), identity, digest.hexdigest()))  # as long as the first


def read_kv(path: Path, cache: KVCache, identity: str) -> list[int]:
    """Fill the cache and return the token ids that it holds.

    Raises SessionError where the file is damaged, belongs to another store, or is too long. The cache is then empty.
    """
    cache.keep(0)
    ids_bytes, start = _checked(path, cache, identity)
    digest, ids_memory = xxhash.xxh3_64(), bytearray(ids_bytes)
    length = ids_bytes // ITEM_BYTES["I64"]
    with path.open("rb") as file:
        for part in (memoryview(ids_memory), *_parts(cache, length)):
            read_fully(lambda view, at: os.preadv(file.fileno(), [view], at), part, start)
            digest.update(part)
            start += part.nbytes
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if digest.hexdigest() != _metadata(path).get("checksum"):
        raise SessionError(f"{path}: damaged")
    for layer in cache.layers:
        layer.length = length
    return torch.frombuffer(ids_memory, dtype=torch.int64).tolist() if length else []


def _checked(path: Path, cache: KVCache, identity: str) -> tuple[int, int]:
    """Return the bytes of the token ids and their offset, once the header fits the cache. Raises SessionError."""
    try:
        found, metadata = read_header(path), _metadata(path)
    except (CheckpointError, SafetensorError) as error:
        raise SessionError(str(error).split(";")[0]) from None
    if metadata.get("format") != FORMAT or "token_ids" not in found:
        raise SessionError(f"{path}: not a KV cache that this qmix writes")
    if metadata.get("store") != identity:
        raise SessionError(f"{path}: of another model, or of other precisions")
    length = found["token_ids"].nbytes // ITEM_BYTES["I64"]
    if length > cache.capacity:
        raise SessionError(f"{path}: holds {length} tokens, more than the context of {cache.capacity}")
    expected = build_header(*_shape(cache, length), ALIGNMENT)[1]
    if {name: (info.dtype, info.shape) for name, info in found.items()} != {
        name: (info.dtype, info.shape) for name, info in expected.items()
    }:
        raise SessionError(f"{path}: damaged")
    return found["token_ids"].nbytes, found["token_ids"].offset


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _header(cache: KVCache, length: int, identity: str, checksum: str) -> bytes:
    metadata = {"format": FORMAT, "store": identity, "checksum": checksum}
    return build_header(*_shape(cache, length), ALIGNMENT, metadata)[0]


def _shape(cache: KVCache, length: int) -> tuple[list[tuple[str, str, tuple[int, ...], int]], int]:
    """Return the name, dtype, shape and offset of every tensor, and the bytes of all of them."""
    offset = length * ITEM_BYTES["I64"]
    tensors: list[tuple[str, str, tuple[int, ...], int]] = [("token_ids", "I64", (length,), 0)]
    for index, layer in enumerate(cache.layers):
        for name, memory in (("keys", layer.keys), ("values", layer.values)):
            _, heads, _, head_dim = memory.shape
            tensors.append((f"layers.{index}.{name}", NAMES[memory.dtype], (heads, length, head_dim), offset))
            offset += heads * length * head_dim * memory.itemsize
    return tensors, offset


def _parts(cache: KVCache, length: int) -> Iterator[memoryview]:
    """Yield the memory of the first `length` positions, a head at a time, in the order of the file."""
    for layer in cache.layers:
        for memory in (layer.keys, layer.values):
            for head in memory[0, :, :length]:
                yield head.reshape(-1).view(torch.uint8).numpy().data
