"""Read dense weights to the devices of a plan: in pieces, checked, and none twice in main memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
import xxhash

from qmix.checkpoint.safetensors_header import aligned
from qmix.checkpoint.torch_dtypes import HALF
from qmix.disk import PAGE
from qmix.disk.files import DirectFile, anonymous_memory
from qmix.disk.reads import PIECE_BYTES, READ_THREADS, Read, Reader
from qmix.errors import StoreError, mending
from qmix.model.gpu.devices import Allocator, Device, take_memory
from qmix.plan.memory import ALIGNMENT
from qmix.store.opened import Store

STAGING_BYTES = READ_THREADS * PIECE_BYTES  # main memory that the weights pass through


def dense_memory(
    store: Store, where: Callable[[str], Device], allocate: Allocator = take_memory
) -> dict[str, torch.Tensor]:
    """Return memory for every dense weight by published name, uint8, in one block on each device."""
    tensors = store.layout.dense.tensors
    homes = {name: where(name) for name in tensors}
    found: dict[str, torch.Tensor] = {}
    for device in dict.fromkeys(homes.values()):
        mine = [name for name in tensors if homes[name] is device]
        total = sum(aligned(tensors[name].nbytes, ALIGNMENT) for name in mine)
        block = allocate(total, device.device)
        position = 0
        for name in mine:
            found[name] = block[position : position + tensors[name].nbytes]
            position += aligned(tensors[name].nbytes, ALIGNMENT)
    return found


def read_dense_to(store: Store, where: Callable[[str], Device]) -> dict[str, torch.Tensor]:
    """Return all dense weights by published name, each on its device. Raises StoreError where one is damaged."""
    memory = dense_memory(store, where)
    fill_from_disk(store, memory)
    return typed(store, memory)


def typed(store: Store, memory: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of bytes by published name."""
    tensors, dtype = store.layout.dense.tensors, HALF[store.layout.dtype]
    return {name: raw.view(dtype).view(tensors[name].shape) for name, raw in memory.items()}


def fill_from_disk(store: Store, memory: dict[str, torch.Tensor], attempts: int = 2) -> None:
    """Read each weight's bytes to its memory on any device, `attempts` times at most if its checksum is wrong.

    Raises StoreError where a checksum is still wrong then.
    """
    layout = store.layout.dense
    staging = anonymous_memory(STAGING_BYTES)
    with DirectFile(store.path(layout)) as file, closing(Reader()) as reader:
        for name, target in memory.items():
            offset = layout.tensors[name].offset
            for _ in range(attempts):
                if _fill(file, reader, staging, target, offset) == store.dense_checksums.get(name):
                    break
                file.forget(offset, len(target))
            else:
                place = f"bytes {offset} to {offset + len(target) - 1}"
                raise StoreError(f"{file.path}: the tensor {name} ({place}) is damaged; {mending(store.directory)}")


def _fill(file: DirectFile, reader: Reader, staging: torch.Tensor, target: torch.Tensor, begin: int) -> str:
    """Read a weight to its memory through `staging`, and return the checksum of its bytes."""
    digest = xxhash.xxh3_64()
    position, end = begin, begin + len(target)
    while position < end:
        window = position // PAGE * PAGE  # reads begin and end at pages, tensors where they may
        length = min(len(staging), aligned(end - window, PAGE))
        reader.submit(Read(file, staging[:length], window, lambda whole: None)).done.result()
        stop = min(end, window + length)
        piece = staging[position - window : stop - window]
        digest.update(piece.numpy().data)
        target[position - begin : stop - begin].copy_(piece)
        position = stop
    return digest.hexdigest()
