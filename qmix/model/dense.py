"""Dense weights read from a store to where a plan puts them: checked, and none twice in main memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import cached_property

import torch
import xxhash

from qmix.checkpoint.safetensors_header import aligned
from qmix.checkpoint.torch_dtypes import HALF
from qmix.disk import PAGE
from qmix.disk.direct import DirectFile
from qmix.disk.reads import PIECE_BYTES, READ_THREADS, Read, Reader
from qmix.errors import StoreError, mending
from qmix.model.gpu.devices import Allocator, Device, take_memory
from qmix.plan.device_memory import ALIGNMENT
from qmix.precision.memory import anonymous_memory
from qmix.store.file import StoreFile
from qmix.store.opened import Store

STAGING_BYTES = READ_THREADS * PIECE_BYTES  # of main memory, on the way to devices


def read_dense(store: Store, where: Callable[[str], Device] | None = None) -> dict[str, torch.Tensor]:
    """Return all dense weights by published name, each on the device that `where` names for it.

    Without `where` they land in main memory as they lie in the file, without a copy. A weight with a wrong checksum is
    read once more. Raises StoreError where it is still wrong then.
    """
    layout = store.layout.dense
    with StoreFile(store.path(layout)) as file, closing(Reader()) as reader:
        stream = _Stream(file, reader)
        if where is None:
            start = len(layout.header)
            whole = anonymous_memory(layout.size - start)
            reader.submit(Read(file, whole.numpy().data, start)).done.result()
            memory = {name: whole[info.offset - start :][: info.nbytes] for name, info in layout.tensors.items()}
        else:
            memory = dense_memory(store, where)
        for name, target in memory.items():
            offset = layout.tensors[name].offset
            found = xxhash.xxh3_64_hexdigest(target.numpy().data) if where is None else stream.read(target, offset)
            stream.check(store, name, target, found)
    return typed(store, memory)


class DenseWeights(Mapping[str, torch.Tensor]):
    """The dense weights of a store by published name, each read and checked at its first use; close it.

    Raises StoreError as `read_dense` does.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._tensors = store, store.layout.dense.tensors
        self._file, self._reader = StoreFile(store.path(store.layout.dense)), Reader()
        self._stream = _Stream(self._file, self._reader)

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self._tensors[name]
        target = torch.empty(info.nbytes, dtype=torch.uint8)
        self._stream.check(self._store, name, target, self._stream.read(target, info.offset))
        return typed(self._store, {name: target})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
        self._file.close()


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


def typed(store: Store, memory: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights that lie in this memory, uint8 by name, with their dtype and shapes."""
    tensors, dtype = store.layout.dense.tensors, HALF[store.layout.dtype]
    return {name: raw.view(dtype).view(tensors[name].shape) for name, raw in memory.items()}


class _Stream:
    """Reads of a file to memory anywhere, by way of a buffer in main memory."""

    def __init__(self, file: DirectFile, reader: Reader) -> None:
        self.file, self.reader = file, reader

    @cached_property
    def staging(self) -> torch.Tensor:
        return anonymous_memory(STAGING_BYTES)

    def read(self, target: torch.Tensor, begin: int) -> str:
        """Fill uint8 `target` from offset `begin`, and return the checksum of its bytes."""
        digest = xxhash.xxh3_64()
        position, end = begin, begin + len(target)
        while position < end:
            window = position // PAGE * PAGE  # reads begin and end at pages, tensors anywhere
            length = min(len(self.staging), aligned(end - window, PAGE))
            self.reader.submit(Read(self.file, self.staging.numpy().data[:length], window)).done.result()
            stop = min(end, window + length)
            piece = self.staging[position - window : stop - window]
            digest.update(piece.numpy().data)
            target[position - begin : stop - begin].copy_(piece)
            position = stop
        return digest.hexdigest()

    def check(self, store: Store, name: str, target: torch.Tensor, found: str) -> None:
        """Read a weight once more if its checksum `found` is wrong. Raises StoreError where it still is."""
        if found == (want := store.dense_checksums.get(name)):
            return
        offset = store.layout.dense.tensors[name].offset
        self.file.forget(offset, len(target))
        if self.read(target, offset) != want:
            place = f"bytes {offset} to {offset + len(target) - 1}"
            raise StoreError(f"{self.file.path}: the tensor {name} ({place}) is damaged; {mending(store.directory)}")
