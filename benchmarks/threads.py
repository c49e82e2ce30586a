"""Time a model in memory by number of threads, each beside its ceiling and beside a model of a token's cost.

    python benchmarks/threads.py
    python benchmarks/threads.py --store STORE --threads 1,2,4 --more-than-cores

Makes a synthetic store of 4 layers of 8x7B, unless one is given: 3.9 GB of disk and, for a run, 5 GB of memory. Each
number of threads runs in a process of its own, all take turns, and medians are printed. Numbers above the cores that
this process may use are left out without --more-than-cores.

decode      one prompt, all layers of a token in one call, and beside it a layer at a time; the ceiling is reading every
            active byte once at the rate measured in the same process
prefill     512 tokens, beside torch's bf16 product with the same threads
batch       48 prompts, a pass of one token for each; beside the same product
predicted   decode, from bytes / rate of products + calls and stages of the thread team + Python of a token

All are measured apart from decode: products with one token over more weights than caches hold, dense and 4-bit ones; a
call and a stage with kernels that do nothing; Python with the first number of threads, as the time of a token outside
the team.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from numba import carray
from rich.console import Console
from rich.table import Table
from synthetic import model_from
from synthetic_store import write_store

from qmix.bench.machine_rates import four_bit_read, half_read
from qmix.bench.roofline import dense_read, prefill_flops
from qmix.engine.batch import BatchRunner
from qmix.engine.completion import Result
from qmix.engine.running import BatchRequest
from qmix.engine.sampling import Sampling
from qmix.engine.stream import Runner
from qmix.kernels.cpu import team
from qmix.kernels.cpu.addresses import next_piece
from qmix.kernels.cpu.compiled import compiled_address
from qmix.kernels.cpu.stages import finish, wait_for
from qmix.machine.probes import matmul, memory_read
from qmix.plan.here import plan_for
from qmix.store.opened import Store, open_store

PROMPT, NEW, CHUNK, BATCH, ANSWER = 16, 24, 512, 48, 6  # tokens, and sequences
CALLS = 2  # of the team a token: all layers, and the head
STAGES = 11  # a layer: seven before the experts, the experts' addresses, three of the experts
EMPTY = 1000  # stages and calls timed that do nothing


@cache
def empty_stages(threads: int) -> int:
    """Return a kernel of EMPTY stages with a piece for each thread."""

    def kernel(block: Any) -> None:
        done = carray(block, 2)[1:].ctypes.data
        piece = next_piece(block)
        while piece < EMPTY * threads:
            stage = piece // threads
            wait_for(done, stage * threads)
            finish(done, (stage + 1) * threads)
            piece = next_piece(block)

    return compiled_address(kernel)


@cache
def empty_kernel() -> int:
    def kernel(block: Any) -> None:
        next_piece(block)

    return compiled_address(kernel)


def team_seconds() -> tuple[float, float]:
    """Return the seconds of a call of the team, and of a stage in one: medians of kernels that do nothing."""
    kernel, calls = empty_kernel(), []
    for _ in range(EMPTY):
        started = time.perf_counter()
        team.run(kernel)
        calls.append(time.perf_counter() - started)
    stages, kernel = [], empty_stages(torch.get_num_threads())
    for _ in range(5):
        started = time.perf_counter()
        team.run(kernel, 0)
        stages.append((time.perf_counter() - started) / EMPTY)
    return statistics.median(calls), statistics.median(stages)


def active_bytes(store: Store) -> tuple[float, float]:
    """Return the bytes that one token reads of dense weights, and of its experts."""
    layout, geometry = store.layout, store.geometry
    record = statistics.mean(layout.record(*key).nbytes for key in layout.experts)
    return dense_read(layout), geometry.num_layers * geometry.experts_per_token * record


def measure_stream(store: Store, found: dict[str, float]) -> None:
    """Time decode and prefill of one prompt, and the part of decode that is spent in the team."""
    plan = plan_for(store.layout, store.layout.total_bytes + 2 * 2**30, CHUNK + NEW)
    spent, calls, run = 0.0, 0, team.run

    def counted(*arguments: int) -> None:
        nonlocal spent, calls
        started = time.perf_counter()
        run(*arguments)
        spent, calls = spent + time.perf_counter() - started, calls + 1

    with Runner(store, plan) as runner:
        ids = [5 + 7 * i % 900 for i in range(CHUNK)]

        def complete(prompt: list[int], new: int) -> Result:
            return runner.complete(prompt, temperature=0, ignore_eos=True, max_new_tokens=new)

        complete(ids[:PROMPT], 2)
        steps, tokens = runner.model.steps, dict[str, list[float]](token=[], apart=[])
        for _ in range(3):  # in one call, and a layer at a time
            for name, way in (("token", steps), ("apart", None)):
                runner.model.steps = way
                tokens[name].append(complete(ids[:PROMPT], NEW).tpot_s)
        runner.model.steps = steps
        found |= {name: statistics.median(seconds) for name, seconds in tokens.items()}
        found["prompt"] = min(complete(ids[i:], 1).ttft_s for i in range(2))
        team.run = counted  # type: ignore[assignment]
        try:
            result = complete(ids[:1], NEW)
        finally:
            team.run = run
        found["outside"] = max(0.0, result.tpot_s - spent / NEW)
        found["calls"] = calls / NEW


def measure_batch(store: Store, found: dict[str, float]) -> None:
    """Time passes of one token for each of many prompts."""
    plan = plan_for(store.layout, store.layout.total_bytes + 3 * 2**30, 2 * (PROMPT + ANSWER), batch=BATCH)
    sampling = Sampling(temperature=0, max_new_tokens=ANSWER, ignore_eos=True)
    requests = [BatchRequest(str(i), list(range(5 + i, 5 + i + PROMPT)), sampling) for i in range(BATCH)]
    seconds, started, tokens = [], time.perf_counter(), 0
    with BatchRunner(store, plan) as runner:
        for _ in runner.answer(requests):
            now = time.perf_counter()
            if runner.work.tokens - tokens == BATCH:
                seconds.append(now - started)
            started, tokens = now, runner.work.tokens
    found["pass"] = statistics.median(seconds)


def measure(directory: Path, threads: int) -> dict[str, float]:
    """Return all figures of one number of threads, in bytes and FLOP a second, and in seconds."""
    torch.set_num_threads(threads)
    store = open_store(directory)
    found = {"read": memory_read(rounds=3).median, "matmul": matmul(rounds=2, sizes=(1024, 2048)).median}
    found["half"], found["four_bit"] = half_read(), four_bit_read()
    found["call"], found["stage"] = team_seconds()
    measure_stream(store, found)
    measure_batch(store, found)
    return found


def in_a_process(directory: Path, threads: int) -> dict[str, float]:
    """Run `measure` in a process with so many threads."""
    command = [sys.executable, __file__, "--store", str(directory), "--child", str(threads)]
    held = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=held, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def predicted_token(row: dict[str, float], python: float, store: Store) -> float:
    """Return the seconds of a token: products, calls of the team, the stages of every layer, and Python."""
    layers, (dense, experts) = store.geometry.num_layers, active_bytes(store)
    products = dense / row["half"] + experts / row["four_bit"]
    return products + CALLS * row["call"] + layers * STAGES * row["stage"] + python


def table_of(store: Store, rows: dict[int, dict[str, float]]) -> tuple[Table, list[dict[str, float]]]:
    """Return the figures as a table and as numbers."""
    layers, python = store.geometry.num_layers, next(iter(rows.values()))["outside"]
    table = Table(title=f"{store.directory.name}, {layers} layers, {len(os.sched_getaffinity(0))} cores")
    columns = (
        "threads",
        "GB/s",
        "dense, 4-bit",
        "stage",
        "Python a token",
        "a layer at a time",
        "decode",
        "of reading",
        "predicted",
        "off",
        "prefill",
    )
    for name in (*columns, "of bf16", f"batch of {BATCH}", "of bf16"):
        table.add_column(name, justify="right")
    results = []
    for threads, row in rows.items():
        guess, ceiling = predicted_token(row, python, store), sum(active_bytes(store)) / row["read"]
        per_token = prefill_flops(store.geometry, 2) - prefill_flops(store.geometry, 1)
        head = 2 * store.geometry.vocab_size * store.geometry.hidden_size
        prompt = prefill_flops(store.geometry, CHUNK) / row["matmul"] / row["prompt"]
        batch = BATCH * (per_token + head) / row["matmul"] / row["pass"]
        result = {"threads": threads, "of_reading": ceiling / row["token"], "predicted": 1 / guess}
        result |= {"off": row["token"] / guess - 1, "prefill_of_bf16": prompt, "batch_of_bf16": batch}
        results.append(row | result)
        times = f"{row['stage'] * 1e6:.1f} µs", f"{row['outside'] * 1e3:.2f} ms", f"{1 / row['apart']:.1f}"
        decode = f"{1 / row['token']:.1f} tok/s", f"{ceiling / row['token']:.0%}", f"{1 / guess:.1f}"
        many = f"{CHUNK / row['prompt']:.0f} tok/s", f"{prompt:.0%}", f"{BATCH / row['pass']:.0f} tok/s", f"{batch:.0%}"
        rates = f"{row['read'] / 1e9:.1f}", f"{row['half'] / 1e9:.1f}, {row['four_bit'] / 1e9:.1f}"
        table.add_row(str(threads), *rates, *times, *decode, f"{result['off']:+.0%}", *many)
    return table, results


@click.command()
@click.option("--store", type=click.Path(path_type=Path, exists=True), help="in place of a synthetic one")
@click.option("--layers", default=4, show_default=True, help="of 8x7B, in the synthetic store")
@click.option("--threads", default="1,2,4,8,16", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="of all numbers of threads, taking turns")
@click.option("--more-than-cores", is_flag=True, help="also numbers of threads above this process's cores")
@click.option("--child", type=int, hidden=True)
def main(store: Path | None, layers: int, threads: str, rounds: int, more_than_cores: bool, child: int | None) -> None:
    """Print a table and a JSON line."""
    if store is not None and child is not None:
        print(json.dumps(measure(store, child)))
        return
    cores = len(os.sched_getaffinity(0))
    counts = [count for count in map(int, threads.split(",")) if count <= cores or more_than_cores]
    with tempfile.TemporaryDirectory() as scratch:
        made = store or write_store(Path(scratch) / "8x7b", model_from("8x7b", layers, 0, 0)).directory
        runs = [{count: in_a_process(made, count) for count in counts} for _ in range(rounds)]
        rows = {
            count: {name: statistics.median(run[count][name] for run in runs) for name in runs[0][count]}
            for count in counts
        }
        table, results = table_of(open_store(made), rows)
    Console(width=160).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
