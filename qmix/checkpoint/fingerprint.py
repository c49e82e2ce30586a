"""A digest of all weights of a checkpoint, the same for copies and for other published forms.

It is made from the XXH3 (128 bits) of each weight's numbers, row by row, in the order of quantising.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import xxhash

from qmix.checkpoint.reader import Checkpoint, Weight
from qmix.checkpoint.rows import WeightFile
from qmix.checkpoint.safetensors_header import ITEM_BYTES
from qmix.disk.direct import DirectMemory

CHUNK_BYTES = 8 * 2**20


class WeightDigest:
    """The digest of one weight, updated with its rows in order."""

    def __init__(self, weight: Weight) -> None:
        self._digest = xxhash.xxh3_128(f"{weight.dtype} {weight.rows} {weight.cols} ".encode())

    def update(self, rows: torch.Tensor) -> None:
        self._digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def fingerprint_of(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Return the fingerprint of a checkpoint, from the digests of all its weights by key."""
    return hashlib.sha256(json.dumps([config, sorted(digests.items())], sort_keys=True).encode()).hexdigest()


def checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """Return a checkpoint's fingerprint; the whole checkpoint is read where it is not known."""
    return checkpoint.known_fingerprint or read_fingerprint(checkpoint)


def read_fingerprint(
    checkpoint: Checkpoint, on_read: Callable[[int], None] = lambda nbytes: None, read: Mapping[str, str] | None = None
) -> str:
    """Return a checkpoint's fingerprint, and remember it. Weights whose digest is in `read` are not read.

    Raises CheckpointError where a file changes meanwhile.
    """
    known = dict(read or {})
    known |= weight_digests(checkpoint, checkpoint.weights.keys() - known.keys(), on_read)
    found = fingerprint_of(checkpoint.config, known)
    checkpoint.source.remember(checkpoint.identity, found)
    return found


def weight_digests(
    checkpoint: Checkpoint, keys: Iterable[str], on_read: Callable[[int], None] = lambda nbytes: None
) -> dict[str, str]:
    """Read some weights and return their digests by key; `on_read` is called with the bytes read."""
    wanted, found = set(keys), {}
    checkpoint.check_unchanged()  # also before the first byte is read
    memory = DirectMemory(CHUNK_BYTES)
    for file in checkpoint.files:
        todo = [weight for weight in checkpoint.of_file(file) if weight.key in wanted]
        if not todo:
            continue
        with WeightFile(checkpoint.source.fetch(file)) as source:
            for weight in todo:
                found[weight.key] = _digest(source, weight, checkpoint.geometry.head_dim, memory, on_read)
    checkpoint.check_unchanged()
    return found


def _digest(
    source: WeightFile, weight: Weight, head_dim: int, memory: DirectMemory, on_read: Callable[[int], None]
) -> str:
    digest, row = WeightDigest(weight), weight.cols * ITEM_BYTES[weight.dtype]
    step = max(1, memory.nbytes // row)
    if weight.piece.interleaved:
        step = max(1, step // head_dim) * head_dim
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        fits = (stop - start) * row <= memory.nbytes
        digest.update(source.rows(weight, start, stop, head_dim, memory if fits else None))
        on_read((stop - start) * row)
    return digest.hexdigest()
