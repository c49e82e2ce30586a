"""Time passes of a few tokens of many sequences, in memory: all layers in one call, and a layer or a module at a time.

    python benchmarks/few_rows.py
    python benchmarks/few_rows.py --store STORE --sequences 1,4,16,32,64 --threads 2

Makes a synthetic store of 4 layers of 8x7B, unless one is given: 3.9 GB of disk and, for a run, 5 GB of memory. The
three ways take turns in one process, pass by pass, with the same sequences. Printed are medians: the time of a pass
with the choice of tokens, and of it the processor time of the thread outside the thread team. That part does not become
shorter with more cores.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands set it

import click
import torch
from rich.console import Console
from rich.table import Table
from synthetic import model_from
from synthetic_store import write_store
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from qmix.engine.batch import BatchRunner
from qmix.engine.running import BatchRequest
from qmix.engine.sampling import Sampling
from qmix.kernels.cpu import team
from qmix.plan.here import plan_for
from qmix.store.opened import Store, open_store

WARM, PASSES, CONTEXT = 2, 7, 64
RAM = 2**34


class TeamTime:
    """Counts calls of the thread team, and the calling thread's processor time in them."""

    def __init__(self) -> None:
        self.calls, self.seconds, self._run = 0, 0.0, team.run
        team.run = self._counted

    def _counted(self, kernel: int, *arguments: int) -> None:
        started = time.thread_time()
        self._run(kernel, *arguments)
        self.calls, self.seconds = self.calls + 1, self.seconds + time.thread_time() - started


WAYS = ("one call", "a layer at a time", "a module at a time")


def measure(store: Store, sequences: int, counted: TeamTime) -> dict[str, dict[str, float]]:
    """Return for each way the medians of a pass: milliseconds, those outside the team, and calls."""
    plan = plan_for(store.layout, RAM, context=CONTEXT, batch=sequences)
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in WAYS}
    sampling = Sampling(max_new_tokens=CONTEXT // 2, temperature=0, ignore_eos=True)
    with BatchRunner(store, plan) as runner:
        steps, layers = runner.model.steps, runner.model.model.layers
        short = type(layers[0])
        for index in range(sequences):
            runner.begin(BatchRequest(str(index), [100 + index, 7, 9 + index], sampling))
        for turn in range(WARM + PASSES):
            for name in WAYS:  # of the same model, whose numbers are the same in all of them
                runner.model.steps = steps if name == WAYS[0] else None
                for layer in layers:
                    layer.__class__ = MixtralDecoderLayer if name == WAYS[2] else short
                row = runner.thread.run(partial(timed, runner, counted))
                found[name] += [row] if turn >= WARM else []
    names = "milliseconds", "outside", "calls"
    return {
        name: dict(zip(names, map(statistics.median, zip(*rows, strict=True)), strict=True))
        for name, rows in found.items()
    }


def timed(runner: BatchRunner, counted: TeamTime) -> tuple[float, float, int]:
    """Return a pass's milliseconds, those of the thread's processor time outside the team, and calls of the team."""
    counted.calls, counted.seconds = 0, 0.0
    started, processor = time.perf_counter(), time.thread_time()
    runner._pass()
    outside = time.thread_time() - processor - counted.seconds
    return (time.perf_counter() - started) * 1e3, outside * 1e3, counted.calls


@click.command()
@click.option("--store", type=click.Path(path_type=Path, exists=True), help="in place of a synthetic one")
@click.option("--layers", default=4, show_default=True, help="of 8x7B, in the synthetic store")
@click.option("--sequences", default="1,4,16,32,64", show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
def main(store: Path | None, layers: int, sequences: str, threads: int) -> None:
    """Print a table and a JSON line."""
    torch.set_num_threads(threads)
    counted = TeamTime()
    with tempfile.TemporaryDirectory() as scratch:
        made = store or write_store(Path(scratch) / "8x7b", model_from("8x7b", layers, 0, 0)).directory
        opened = open_store(made)
        results = {count: measure(opened, count, counted) for count in map(int, sequences.split(","))}
    table = Table(title=f"{made.name}, {opened.geometry.num_layers} layers, {threads} threads: ms a pass, ms outside")
    for name in ("sequences", *WAYS):
        table.add_column(name, justify="right")
    for count, row in results.items():
        cells = [f"{way['milliseconds']:.1f}, {way['outside']:.1f} ({way['calls']:.0f} calls)" for way in row.values()]
        table.add_row(str(count), *cells)
    Console(width=120).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
