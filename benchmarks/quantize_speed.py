"""Compare the speed of qmix's quantiser with bitsandbytes' quantize_4bit, in one process, in alternation.

    python benchmarks/quantize_speed.py --kind nf4 --layout packed

One bf16 matrix of normal numbers. qmix receives chunks of 512 rows from a pool of threads and produces the given
layout; bitsandbytes is timed without its own packing. The ceiling is the time that the same number of threads need to
read the matrix's bytes, measured on an array that no cache holds. The results must be identical. The cost of choosing
scales (--clip) is timed too.
"""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qmix.kernels.cpu.quantize import quantize_4bit_flat, quantize_4bit_packed
from qmix.kernels.packing import BLOCK
from qmix.precision.bitsandbytes import functional as bnb

CHUNK = 512  # rows
RUNS = {"bitsandbytes": 1, "qmix": 4, "qmix --clip": 2, "reading alone": 4}  # in a round


@click.command()
@click.option("--shape", nargs=2, type=int, default=(14336, 4096), show_default=True, help="Multiples of 32, 64.")
@click.option("--kind", type=click.Choice(["nf4", "fp4"]), default="nf4", show_default=True)
@click.option("--layout", type=click.Choice(["packed", "flat"]), default="packed", show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default="one a core")
@click.option("--rounds", default=3, show_default=True, help="In each, bitsandbytes runs once, qmix four times.")
def main(shape: tuple[int, int], kind: str, layout: str, threads: int, rounds: int) -> None:
    """Print the times and their ratios; last, one line of JSON."""
    torch.set_num_threads(threads)
    pool = ThreadPoolExecutor(threads)
    rows, cols = shape
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    codes = np.zeros((2, rows * cols // 2), np.uint8)  # without and with clip
    absmax = np.zeros((2, cols // BLOCK, rows) if layout == "packed" else (2, rows * cols // BLOCK), np.float32)
    large = torch.ones(2**28)  # 1 GiB

    def quantize_chunk(start: int, clip: bool) -> bool:
        end = min(start + CHUNK, rows)
        chunk = weights[start:end].view(torch.uint16).numpy()
        out = codes[int(clip), start * cols // 2 : end * cols // 2]
        if layout == "packed":
            return quantize_4bit_packed(chunk, kind, out, absmax[int(clip), :, start:end], clip)
        scales = absmax[int(clip), start * cols // BLOCK : end * cols // BLOCK]
        return quantize_4bit_flat(chunk.reshape(-1), kind, out, scales, end == rows, clip)

    def quantize_all(clip: bool) -> bool:
        return all(pool.map(partial(quantize_chunk, clip=clip), range(0, rows, CHUNK)))

    jobs: dict[str, Any] = {
        "bitsandbytes": lambda: bnb.quantize_4bit(weights, blocksize=BLOCK, quant_type=kind),
        "qmix": partial(quantize_all, clip=False),
        "qmix --clip": partial(quantize_all, clip=True),
        "reading alone": large.sum,
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for index in range(rounds + 1):  # the first compiles and warms up
        for name, job in jobs.items():
            for _ in range(RUNS[name]):
                start = time.perf_counter()
                job()
                if index:
                    times[name].append(time.perf_counter() - start)
    times["reading alone"] = [t * weights.nbytes / large.nbytes for t in times["reading alone"]]

    expected, state = jobs["bitsandbytes"]()
    scales = state.absmax
    if layout == "packed":
        scales = scales.reshape(rows, -1).T
        expected, _ = bnb._convert_weight_packed_for_cpu(expected, state)
    identical = np.array_equal(expected.numpy().ravel(), codes[0]) and np.array_equal(scales.numpy(), absmax[0])

    vectors = torch.backends.cpu.get_cpu_capability()
    table = Table(title=f"{kind} {layout}, bf16 {rows} x {cols}, {threads} threads, {vectors}, {rounds} rounds")
    for column in ("", "median ms", "min", "max", "GB/s read", "speed"):
        table.add_column(column, justify="right")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        figures = [f"{1e3 * t:.1f}" for t in (medians[name], min(values), max(values))]
        speed = f"{medians['bitsandbytes'] / medians[name]:.1f}x"
        table.add_row(name, *figures, f"{weights.nbytes / medians[name] / 1e9:.2f}", speed)
    Console().print(table, f"results identical: {identical}")
    ratio, ceiling = medians["bitsandbytes"] / medians["qmix"], medians["reading alone"] / medians["qmix"]
    clipping = medians["qmix --clip"] / medians["qmix"]
    report = {"kind": kind, "layout": layout, "shape": shape, "threads": threads, "identical": identical}
    print(json.dumps(report | {"ratio": ratio, "of_ceiling": ceiling, "clip": clipping, "seconds": times}))


if __name__ == "__main__":
    main()
