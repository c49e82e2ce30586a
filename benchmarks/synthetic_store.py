"""Write the store of a synthetic model without its checkpoint, with the same bytes as `qmix quantize` would write.

    python benchmarks/synthetic_store.py OUT --layers 24
    python benchmarks/synthetic_store.py OUT --model 8x22b --layers 56 --distinct-layers 28 --precision nf4

With --distinct-layers D, layer l has the expert weights of layer l mod D, and its file is a hard link to that layer's
file: all layers exist, on the disk space of D. Each layer has its own gate and attention. Only the source's name and
fingerprint differ from what `qmix quantize` writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import xxhash
from synthetic import copy_tokenizer, describe_routing, model_from, model_options
from synthetic_weights import SyntheticModel

from qmix.checkpoint.naming import expert_key
from qmix.checkpoint.reader import TOKENIZER_FILES
from qmix.checkpoint.safetensors_header import DTYPES
from qmix.disk.space import require_space
from qmix.precision.formats import chunk_rows
from qmix.precision.quantizer import MatrixQuantizer
from qmix.store.layout import FileLayout, StoreLayout, parse_precisions
from qmix.store.manifest import CONFIG, file_digest, manifest, write_manifest
from qmix.store.opened import Store, open_store
from qmix.store.small_files import small_files

CHUNK_WEIGHTS = 4 * 2**20


def write_store(directory: Path, model: SyntheticModel, precision: str = "nf4", dtype: str = "bf16") -> Store:
    """Write and open the store. `precision` as `qmix quantize` takes it. Raises QmixError."""
    layout = StoreLayout(model.geometry, parse_precisions(precision, model.geometry), dtype)
    linked = _linked_layers(model, layout)
    written = [layer for layer in range(model.geometry.num_layers) if layer not in linked]
    require_space([(directory, layout.dense.size + sum(layout.layer(layer).size for layer in written))])
    directory.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        dense = _write_file(pool, directory, layout.dense, partial(_dense_tensors, model, layout))
        records = {}
        for layer in written:
            jobs = partial(_records, model, layout, layer)
            records[layer] = _write_file(pool, directory, layout.layer(layer), jobs)
    for layer, source in linked.items():
        (directory / layout.layer(layer).name).hardlink_to(directory / layout.layer(source).name)
        records[layer] = records[source]
    copy_tokenizer(directory)
    there = (directory / name for name in TOKENIZER_FILES)
    files = small_files(model.config, [path for path in there if path.is_file()])
    (directory / CONFIG).write_bytes(files[CONFIG])
    by_layer = [list(records[layer].values()) for layer in range(model.geometry.num_layers)]
    known = {name: file_digest(data) for name, data in files.items()}
    checksums = {"dense": dense, "records": by_layer, "files": known}
    fingerprint = hashlib.sha256(b"synthetic " + files[CONFIG]).hexdigest()
    write_manifest(directory, manifest(layout, directory.absolute().name, fingerprint, checksums))
    return open_store(directory)


def _linked_layers(model: SyntheticModel, layout: StoreLayout) -> dict[int, int]:
    """Layers with the same bytes as an earlier one, and which."""
    sources = {layer: model.source_layer(layer) for layer in range(model.geometry.num_layers)}
    return {
        layer: source
        for layer, source in sources.items()
        if source != layer and layout.precisions[source] == layout.precisions[layer]
    }


def _write_file(pool: ThreadPoolExecutor, directory: Path, file: FileLayout, jobs: Any) -> dict[str, str]:
    """Header and parts, each made by a thread and written where it belongs; the checksum of each part."""
    fd = os.open(directory / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.ftruncate(fd, file.size)
        os.pwrite(fd, file.header, 0)

        def write(job: tuple[str, int, Any]) -> tuple[str, str]:
            name, offset, make = job
            view = memoryview(make())
            digest = xxhash.xxh3_64_hexdigest(view)
            while view.nbytes:
                count = os.pwrite(fd, view, offset)
                view, offset = view[count:], offset + count
            return name, digest

        digests = dict(pool.map(write, jobs()))
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return digests


def _dense_tensors(model: SyntheticModel, layout: StoreLayout) -> list[tuple[str, int, Any]]:
    """Name, offset, and what makes the bytes, of every dense tensor."""

    def tensor(name: str) -> np.ndarray:
        out = np.empty(layout.dense.tensors[name].nbytes, np.uint8)
        _quantize(model, name, "half", layout.dtype, [out])
        return out

    return [(name, info.offset, partial(tensor, name)) for name, info in layout.dense.tensors.items()]


def _records(model: SyntheticModel, layout: StoreLayout, layer: int) -> list[tuple[str, int, Any]]:
    """Number, offset, and what makes the bytes, of every expert record of a layer."""

    def record(expert: int) -> np.ndarray:
        placed = layout.record(layer, expert)
        out = np.zeros(placed.nbytes, np.uint8)
        for matrix in model.geometry.expert_matrices:
            mine = [part for part in placed.parts if part.matrix == matrix]
            parts = [out[part.offset : part.offset + part.part.nbytes] for part in mine]
            _quantize(model, expert_key(layer, expert, matrix), placed.precision, layout.dtype, parts)
        return out

    experts = range(model.geometry.num_experts)
    return [(str(expert), layout.record_offset(layer, expert), partial(record, expert)) for expert in experts]


def _quantize(model: SyntheticModel, name: str, precision: str, dtype: str, parts: list[np.ndarray]) -> None:
    """Fill a weight's parts, as views of bytes."""
    shape = model.shapes[name]
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    quantizer = MatrixQuantizer(precision, dtype, rows, columns, name)
    step = chunk_rows(precision, rows, columns, CHUNK_WEIGHTS)
    for start in range(0, rows, step):
        bits = model.rows(name, start, min(start + step, rows))
        offset, data = quantizer.quantize(torch.from_numpy(bits).view(torch.bfloat16), start)
        parts[0][offset : offset + len(data)] = data
    scales = quantizer.scales()
    if scales is not None:
        parts[1][:] = scales


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@model_options
@click.option("--precision", default="nf4", show_default=True, help="As for `qmix quantize`.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
def main(directory: Path, precision: str, dtype: str, **options: Any) -> None:
    """Write a store to DIRECTORY; print sizes in bytes, seconds and measured routing, one JSON line."""
    torch.set_num_threads(1)  # a thread for each record
    model = model_from(**options)
    started = time.perf_counter()
    layout = write_store(directory, model, precision, dtype).layout
    seconds = time.perf_counter() - started
    on_disk = {stat.st_ino: 512 * stat.st_blocks for stat in ((directory / file.name).stat() for file in layout.files)}
    linked = len(_linked_layers(model, layout))
    if linked:
        message = f"{linked} of {model.geometry.num_layers} layers are hard links to the files of earlier ones"
        click.echo(message, err=True)
    figures = {"bytes": layout.total_bytes, "on_disk": sum(on_disk.values()), "linked_layers": linked}
    print(json.dumps({"store": str(directory), **figures, "seconds": round(seconds, 1), **describe_routing(model)}))


if __name__ == "__main__":
    main()
