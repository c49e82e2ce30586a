"""Measure the rates that predictions use on this machine: see `qmix.machine.rates.Rates`.

Each is measured under the engine's conditions: memory reads with all cores, records with O_DIRECT, 4-bit products over
more weights than caches hold, and the overhead of a layer and of a read on the embedded model.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qmix.bench.roofline import dense_read
from qmix.disk import PAGE
from qmix.disk.direct import DirectFile, copied
from qmix.engine.resolve import prepare_store
from qmix.engine.stream import Runner
from qmix.files import scratch_file
from qmix.machine.ceilings import gpu_ceilings
from qmix.machine.doctor import product_fault
from qmix.machine.found import available_memory, free_disk
from qmix.machine.probes import MEMORY_BYTES, ROUNDS, DiskProbe, Place, matmul, memory_read
from qmix.machine.rates import Rates
from qmix.plan import Plan, make_plan
from qmix.precision.matmul import half_product
from qmix.precision.memory import anonymous_memory
from qmix.precision.quantised import FourBitMatrix
from qmix.store.opened import Store

SCRATCH_BYTES = 2**30  # in the scratch file: more than a disk's own cache
CHUNK = 16 * 2**20
ROWS, COLUMNS = 14336, 4096  # a matrix of 8x7B
POOL_BYTES = 600 * 2**20  # of 4-bit matrices: far more than caches hold
MANY = 128  # tokens
SLOW_MATRICES = 1  # without a kernel a product takes seconds
TOKENS = 48  # decoded by the embedded model, after as many to warm up
CONTEXT = 1024
PROMPT = list(range(5, 645))  # a layer's overhead grows a little with the context


def measure(directory: Path, tell: Callable[[str], None] = lambda line: None) -> dict[str, float]:
    """Return all rates of this machine, with the disk of `directory`. Raises QmixError."""
    tell("reading memory")
    room = min(MEMORY_BYTES, available_memory() // 4) // PAGE * PAGE
    found = {"memory_read": max(memory_read(room).rounds)}  # other processes only make a round slower
    tell("multiplying")
    found["matmul"] = max(*matmul().rounds, own_products())
    found["four_bit_read"], found["half_read"] = four_bit_read(), half_read()
    tell("reading the disk")
    found["disk_read"] = disk_read(directory)
    tell("decoding with the embedded model")
    found |= overheads(Rates().with_measured(found))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        tell(f"gpu:{index}")
        if product_fault(f"cuda:{index}"):  # doctor reports the reason
            continue
        rates = gpu_rates(torch.device("cuda", index))
        found |= {name: min(rate, found.get(name, rate)) for name, rate in rates.items()}  # of the slowest GPU
    return found


def four_bit_read() -> float:
    """Return bytes/s of packed nf4 matrices multiplied with one token, with or without a fast kernel."""
    per_matrix = ROWS * COLUMNS // 2 + ROWS * COLUMNS // 64 * 2
    fast = FourBitMatrix("nf4", *_parts(anonymous_memory(per_matrix)), ROWS, COLUMNS).kernel is not None
    count = max(1, min(POOL_BYTES, available_memory() // 4) // per_matrix) if fast else SLOW_MATRICES
    memory = anonymous_memory(count * per_matrix)
    memory.random_(0, 64)  # scales stay finite: the high byte of a bf16 below 64 is a number below 2**0
    matrices = [FourBitMatrix("nf4", *_parts(part), ROWS, COLUMNS) for part in memory.split(per_matrix)]
    x = torch.randn(1, COLUMNS).bfloat16()
    with torch.inference_mode():
        matrices[0].multiply(x)  # compiles the kernel and wakes the threads
        return max(_rate(count * per_matrix, [matrix.multiply for matrix in matrices], x))


def own_products() -> float:
    """Return FLOP/s of a packed nf4 matrix multiplied with many tokens, 0 without a kernel."""
    memory = anonymous_memory(ROWS * COLUMNS // 2 + ROWS * COLUMNS // 64 * 2)
    memory.random_(0, 64)
    matrix = FourBitMatrix("nf4", *_parts(memory), ROWS, COLUMNS)
    if matrix.kernel is None:
        return 0.0
    x = torch.randn(MANY, COLUMNS).bfloat16()
    with torch.inference_mode():
        matrix.multiply(x)
        return max(_rate(2 * MANY * ROWS * COLUMNS, [matrix.multiply], x))


def half_read() -> float:
    """Return bytes/s of bf16 matrices of the size of a projection multiplied with one token."""
    nbytes = 2 * COLUMNS**2
    memory = anonymous_memory(max(1, min(POOL_BYTES, available_memory() // 4) // nbytes) * nbytes)
    memory.random_(0, 64)
    weights = [part.view(torch.bfloat16).view(COLUMNS, COLUMNS) for part in memory.split(nbytes)]
    x = torch.randn(1, COLUMNS).bfloat16()
    with torch.inference_mode():
        half_product(x, weights[0])
        return max(_rate(memory.nbytes, [partial(half_product, weight=weight) for weight in weights], x))


def _parts(memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of the codes and the absmax of a packed matrix that fills `memory`."""
    codes = memory[: ROWS * COLUMNS // 2].view(ROWS, COLUMNS // 2)
    return codes, memory[ROWS * COLUMNS // 2 :].view(torch.bfloat16).view(COLUMNS // 64, ROWS)


def _rate(amount: int, products: list[Callable[[torch.Tensor], object]], x: torch.Tensor) -> Iterator[float]:
    """Yield bytes/s or FLOP/s of a few rounds of all products."""
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for product in products:
            product(x)
        yield amount / (time.perf_counter() - started)


def disk_read(directory: Path) -> float:
    """Return bytes/s of O_DIRECT reads at random places of a scratch file, which is deleted afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    size = min(SCRATCH_BYTES, free_disk(directory) // 4) // CHUNK * CHUNK
    with scratch_file(directory / ".qmix-doctor") as (path, _):
        _write_scratch(path, size)
        places = [Place(0, offset, CHUNK) for offset in range(0, size, CHUNK)]
        with DiskProbe([path], places) as probe:
            for _ in range(ROUNDS):
                probe.slice()
            return probe.rate().median


def _write_scratch(path: Path, size: int) -> None:
    """Write incompressible bytes past the page cache, and wait until they are on the disk."""
    file = DirectFile(path, os.O_RDWR)
    try:
        noise = torch.randint(0, 256, (CHUNK,), dtype=torch.uint8).numpy()
        for offset in range(0, size, CHUNK):
            file.write(copied(noise, offset), offset)
        os.fsync(file.fd)
    finally:
        file.close()


def overheads(rates: Rates) -> dict[str, float]:
    """Return the overhead of a layer and of a read in decode, measured on the embedded model.

    With all experts in memory, a token takes the layers' overhead and the time of reading weights; with a pool of a
    third of the experts, it also takes that of disk reads.
    """
    store = prepare_store("tiny")
    plan = make_plan(store.layout, 2**40, CONTEXT, 0)
    whole, _ = _decoded(store, plan)
    pooled, misses = _decoded(store, plan.with_slots(plan.num_records // 3))
    record = store.layout.record(0, 0).nbytes
    reading = dense_read(store.layout) / rates.memory_read
    reading += store.geometry.num_layers * store.geometry.experts_per_token * record / rates.four_bit_read
    layer = max(1e-6, (whole - reading) / store.geometry.num_layers)
    read = (pooled - whole) / misses - record / rates.disk_read if misses else 0.0
    return {"layer_seconds": layer, "read_seconds": max(1e-6, read)}


def _decoded(store: Store, plan: Plan) -> tuple[float, float]:
    """Return seconds per token and records missed per token: the median of several runs."""
    with Runner(store, plan) as runner:
        greedy: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_new_tokens": TOKENS, "seed": 0}
        runner.complete(PROMPT, **greedy)
        found = [runner.complete(PROMPT, **greedy) for _ in range(ROUNDS)]
    return statistics.median(result.tpot_s for result in found), found[-1].misses / TOKENS


def gpu_rates(device: torch.device) -> dict[str, float]:
    """Return a GPU's rates: copies from pinned memory, reads of its own memory, products in half precision."""
    return {name: rate.median for name, rate in gpu_ceilings(device).items()}
