"""Quantise a whole checkpoint, in alternation with the limits of the disk and the cores, for several rounds.

    python benchmarks/synthetic.py CHECKPOINT --layers 3
    python benchmarks/quantize_full.py CHECKPOINT --rounds 3

The ceilings are: reading the shards and nothing else; writing and syncing as many bytes as the store has; both at once,
because they share one disk if scratch is beside the checkpoint; quantising every weight from memory with one thread per
core. qmix runs as its command does, in its own process; its time excludes the interpreter's start and imports.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from qmix.checkpoint import Checkpoint, open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.disk.direct import DirectMemory
from qmix.precision.formats import chunk_rows
from qmix.precision.quantizer import MatrixQuantizer
from qmix.store.layout import StoreLayout
from qmix.store.places import places
from qmix.store.sources import layout_for
from qmix.store.weight_run import CHUNK_WEIGHTS

READ_BYTES, WRITE_BYTES = 16 * 2**20, 8 * 2**20  # of one request; what this was fastest with, of 4 to 32 MiB
THREADS = 4  # that read or write; 8 were no faster
MEMORY_CHUNKS = 32  # different chunks that the quantiser is given in turn: 256 MiB of bf16, beyond any cache
LOOK_SECONDS = 0.01
CEILINGS = ("read", "write", "quantise")

CHILD = """
import json, sys, time
from pathlib import Path
import cli, numba, torch, qmix.checkpoint, qmix.engine.resolve, qmix.store.quantize, qmix.terminal.progress
anonymous = int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
times, started = time.process_time(), time.perf_counter()
cli.qmix.main(["quantize", *sys.argv[1:]], standalone_mode=False)
seconds, cores = time.perf_counter() - started, time.process_time() - times
print(json.dumps({"seconds": seconds, "core_seconds": cores, "imports": anonymous}))
"""


def drop_caches() -> bool:
    """Write back and forget the page cache; says whether this user may."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    return False


def _open(path: Path, flags: int) -> int:
    with suppress(OSError):
        return os.open(path, flags | os.O_DIRECT, 0o644)
    return os.open(path, flags, 0o644)


def _in_threads(requests: Iterator[tuple[Any, ...]], call: Callable[..., Any], nbytes: int) -> None:
    """Threads that take turns at the requests, each with a buffer of its own."""
    lock = threading.Lock()

    def work(_: int) -> None:
        buffer = DirectMemory(nbytes).view[:nbytes]
        buffer[:] = os.urandom(nbytes)
        while True:
            with lock:
                request = next(requests, None)
            if request is None:
                return
            call(buffer, *request)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


def read_shards(shards: list[Path]) -> None:
    fds = [_open(path, os.O_RDONLY) for path in shards]
    sizes = [path.stat().st_size for path in shards]
    requests = ((fd, start) for fd, size in zip(fds, sizes, strict=True) for start in range(0, size, READ_BYTES))
    _in_threads(requests, lambda buffer, fd, start: os.preadv(fd, [buffer], start), READ_BYTES)
    for fd in fds:
        os.close(fd)


def write_bytes(path: Path, nbytes: int) -> None:
    fd = _open(path, os.O_RDWR | os.O_CREAT)
    requests = ((start,) for start in range(0, nbytes, WRITE_BYTES))
    _in_threads(requests, lambda buffer, start: os.pwrite(fd, buffer, start), WRITE_BYTES)
    os.fsync(fd)
    os.close(fd)


def quantise_in_memory(checkpoint: Checkpoint, layout: StoreLayout, memory: torch.Tensor) -> None:
    """Every weight in its precision and in chunks as qmix has them, of numbers that lie in memory."""
    threads = torch.get_num_threads()

    def chunks() -> Iterator[Callable[[], Any]]:
        turn = itertools.cycle(memory)
        for key, place in places(layout).items():
            weight = checkpoint.weights[key]
            quantizer = MatrixQuantizer(place.precision, layout.dtype, weight.rows, weight.cols, key)
            step = chunk_rows(place.precision, weight.rows, weight.cols, CHUNK_WEIGHTS)
            for start in range(0, weight.rows, step):
                rows = min(step, weight.rows - start)
                data = next(turn)[: rows * weight.cols].view(rows, weight.cols)
                yield partial(quantizer.quantize, data, start)

    def call(chunk: Callable[[], Any]) -> None:
        chunk()  # and nothing kept

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, chunks()))


def quantise(checkpoint: Path, store: Path, precision: str) -> dict[str, float]:
    """qmix itself: seconds, core seconds, and the most anonymous memory above the imports, looked at all the time."""
    command = [sys.executable, "-c", CHILD, str(checkpoint), str(store), "--precision", precision]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            if "RssAnon:" in status:
                peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(LOOK_SECONDS)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise click.ClickException(f"qmix quantize ended with status {process.returncode}")
    figures = json.loads(output)
    return {name: figures[name] for name in ("seconds", "core_seconds")} | {"peak": peak - figures["imports"]}


def measure(path: Path, scratch: Path, precision: str, rounds: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Conditions, and for each round the seconds of each job."""
    checkpoint = open_checkpoint(LocalSource(path))
    layout = layout_for(checkpoint, precision, None)
    shards = [path / file for file in checkpoint.files]
    memory = torch.randn(MEMORY_CHUNKS, CHUNK_WEIGHTS).mul_(0.02).bfloat16()
    read, nbytes = sum(shard.stat().st_size for shard in shards), layout.total_bytes

    def both() -> None:
        with ThreadPoolExecutor(2) as pool:
            for job in (pool.submit(read_shards, shards), pool.submit(write_bytes, scratch / "bytes", nbytes)):
                job.result()

    jobs: dict[str, Callable[[], Any]] = {
        "read": partial(read_shards, shards),
        "write": partial(write_bytes, scratch / "bytes", nbytes),
        "read and write": both,
        "quantise": partial(quantise_in_memory, checkpoint, layout, memory),
        "qmix": partial(quantise, path, scratch / "store", precision),
    }
    dropped, found = drop_caches(), []
    for index in range(rounds):
        seconds: dict[str, float] = {}
        for name in (list(jobs) * 2)[index % len(jobs) :][: len(jobs)]:  # another first in each round
            drop_caches()
            started = time.perf_counter()
            figures = jobs[name]()
            seconds |= {name: time.perf_counter() - started}
            if figures:
                seconds |= {name: figures["seconds"], "core_seconds": figures["core_seconds"], "peak": figures["peak"]}
            (scratch / "bytes").unlink(missing_ok=True)
            shutil.rmtree(scratch / "store", ignore_errors=True)
        found.append(seconds)
    conditions = {"precision": precision, "checkpoint_bytes": read, "store_bytes": nbytes, "rounds": rounds}
    return conditions | {"cores": os.cpu_count(), "caches_dropped": dropped}, found


def report(conditions: dict[str, Any], rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Print the table; return what the JSON line says. Ratios are those within a round."""
    read, nbytes = conditions["checkpoint_bytes"], conditions["store_bytes"]
    moved = {"read": read, "write": nbytes, "read and write": read + nbytes, "quantise": read, "qmix": read}
    table = Table(title=f"{read / 1e9:.1f} GB of checkpoint, {nbytes / 1e9:.1f} GB of {conditions['precision']} store")
    for column in ("", "median s", "min", "max", "GB/s", "qmix runs at"):
        table.add_column(column, justify="right")

    def row(name: str, seconds: list[float], count: int | None = None) -> float:
        """Print one line; return the median of the seconds' shares of what qmix took."""
        share = statistics.median(s / each["qmix"] for s, each in zip(seconds, rounds, strict=True))
        median = statistics.median(seconds)
        rate = f"{count / median / 1e9:.2f}" if count else ""
        table.add_row(name, *(f"{s:.2f}" for s in (median, min(seconds), max(seconds))), rate, f"{100 * share:.0f}%")
        return share

    shares = {name: row(name, [each[name] for each in rounds], count) for name, count in moved.items()}
    slowest = row("the slowest of read, write, quantise", [max(each[c] for c in CEILINGS) for each in rounds])
    one_by_one = row("the sum of read, write, quantise", [sum(each[c] for c in CEILINGS) for each in rounds])
    Console(width=120).print(table)
    peak = max(each["peak"] for each in rounds)
    cores = statistics.median(each["core_seconds"] / each["qmix"] for each in rounds)
    dropped = "dropped before each" if conditions["caches_dropped"] else "not dropped: needs root"
    of_cores = f"{cores:.2f} of {conditions['cores']} cores busy in qmix"
    print(f"{of_cores}; its peak {peak / 1e6:.0f} MB above imports; caches {dropped}")
    figures = {"of_slowest": slowest, "of_sum": one_by_one, "of": shares, "peak": peak, "cores_busy": cores}
    return conditions | figures | {"seconds": rounds}


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--precision", default="nf4", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--scratch", type=click.Path(exists=True, path_type=Path), help="[beside the checkpoint]")
def main(checkpoint: Path, precision: str, rounds: int, scratch: Path | None) -> None:
    """Print times, rates and qmix's share of each ceiling; last, one line of JSON, in bytes and seconds."""
    with tempfile.TemporaryDirectory(dir=scratch or checkpoint.absolute().parent) as directory:
        conditions, rounds_found = measure(checkpoint, Path(directory), precision, rounds)
        print(json.dumps(report(conditions, rounds_found)))


if __name__ == "__main__":
    main()
