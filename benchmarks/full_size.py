"""qmix beside llama.cpp at the geometry of 8x7B and 8x22B: the whole comparison, with the ceilings of the same run.

    python benchmarks/full_size.py DIRECTORY --peer PEER/bin/python
    python benchmarks/full_size.py DIRECTORY --peer PEER/bin/python --stage disk --layers 12 --rounds 3

Models that DIRECTORY lacks are written there first. PEER is an environment with llama-cpp-python, gguf and numpy.
Engines take turns, each in a process and a cgroup of its own with the page cache counted (this takes root), and
ceilings are measured between them. Stages:

resident   everything in memory: a prompt of 512 tokens, then decode
disk       memory for half of the store: a prompt of 128 tokens, then 100 tokens
batch      the same budget, 32 prompts decoded together
real       8x22B, 56 layers, context 4096, 20 GiB; expert files are hard links to a few distinct ones
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click
from memory_cap import memory_group
from rich.console import Console
from rich.table import Table
from synthetic_weights import SyntheticModel

from calibration.probes import DiskProbe, probe_in_child
from qmix.bound import dense_read
from qmix.prepare import plan_for
from qmix.store import Store, open_store
from qmix.units import format_bytes

HERE = Path(__file__).parent
SLICE = 2 * 10**9  # bytes of disk reads between two runs
REAL_RAM = 20 * 2**30

Result = dict[str, Any]


class Bench:
    """Models in a directory, and runs of engines on them."""

    def __init__(self, directory: Path, peer: Path | None, layers: int, distinct: int) -> None:
        self.directory, self.peer, self.layers, self.distinct = directory, peer, layers, distinct
        directory.mkdir(exist_ok=True, parents=True)
        self.machine = probe_in_child()
        self.disk: list[float] = []

    def store(self) -> Store:
        return self._store(f"8x7b-{self.layers}.store", "--layers", str(self.layers))

    def real_store(self) -> Store:
        sizes = ("--model", "8x22b", "--layers", "56", "--distinct-layers", str(self.distinct))
        return self._store(f"8x22b-56-{self.distinct}.store", *sizes)

    def _store(self, name: str, *sizes: str) -> Store:
        path = self.directory / name
        if not path.is_dir():
            subprocess.run([sys.executable, HERE / "synthetic_store.py", path, *sizes], check=True, stdout=sys.stderr)
        return open_store(path)

    def gguf(self, store: Store, dense: str) -> Path:
        assert self.peer is not None
        path = store.directory.with_suffix(f".{dense}.gguf")
        if not path.is_file():
            subprocess.run(
                [self.peer, HERE / "gguf_writer.py", store.directory, path, "--dense", dense],
                check=True,
                stdout=sys.stderr,
                env={"PYTHONPATH": str(HERE.parent)},
            )
        return path

    def qmix(self, store: Store, ram: int, limit: int | None, **options: object) -> Result:
        command = [sys.executable, HERE / "qmix_peer.py", store.directory, "--ram", str(ram), *_flags(options)]
        found = self._run(command, limit)
        found["active_bytes"] = _active_bytes(store, found["asked"] / len(found["decode_s"]))
        return found

    def llama(self, path: Path, prompt: list[int], limit: int | None, *more: str, **options: object) -> Result:
        command = [self.peer, HERE / "llamacpp_peer.py", path, "--prompt", json.dumps(prompt), *_flags(options), *more]
        return self._run(command, limit)

    def _run(self, command: list[Any], limit: int | None) -> Result:
        with memory_group(limit) as group:
            done = group.run(list(map(str, command)), capture_output=True)
            if done.returncode:
                raise click.ClickException(f"{command[1]} ended with {done.returncode}: {done.stderr[-500:]}")
            found: Result = json.loads(done.stdout)
            return found | {"limit": limit, "group_peak": group.peak}

    def slice(self, store: Store) -> float:
        """One more measurement of the disk's rate."""
        with DiskProbe.of_store(store) as probe:
            self.disk.append(probe.slice(SLICE))
        return self.disk[-1]


def _flags(options: dict[str, object]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def _active_bytes(store: Store, experts: float) -> float:
    """Bytes of weights that a step with so many expert requests reads from memory."""
    return experts * store.layout.slot_bytes + dense_read(store.layout)


def resident(bench: Bench, rounds: int, tokens: int) -> list[Result]:
    store = bench.store()
    ram = int(plan_for(store.layout, 2**50, 1024).total * 1.02) + 2**26
    prompt = SyntheticModel.of(store.directory).prompt(0, 512)
    paths = {dense: bench.gguf(store, dense) for dense in ("bf16",)}
    runs = []
    for _ in range(rounds):
        bench.machine = probe_in_child()
        mine = bench.qmix(store, ram, None, prompt_tokens=512, tokens=tokens)
        runs.append(mine | {"memory_read": bench.machine.memory_read.median, "matmul": bench.machine.matmul.median})
        for path in paths.values():
            runs.append(bench.llama(path, prompt, None, "--warm-up", tokens=tokens))
    return runs


def disk(bench: Bench, rounds: int, tokens: int) -> list[Result]:
    store = bench.store()
    limit = store.layout.total_bytes // 2
    prompt = SyntheticModel.of(store.directory).prompt(0, 128)
    path = bench.gguf(store, "bf16")
    runs = []
    for _ in range(rounds):
        before = bench.slice(store)
        mine = bench.qmix(store, limit, limit, prompt_tokens=128, tokens=tokens)
        runs.append(mine | {"disk_read": statistics.mean((before, bench.slice(store)))})
        runs.append(bench.llama(path, prompt, limit, tokens=tokens) | {"disk_read": bench.disk[-1]})
    return runs


def batch(bench: Bench, rounds: int, tokens: int) -> list[Result]:
    store = bench.store()
    limit = store.layout.total_bytes // 2
    runs = []
    for _ in range(rounds):
        for count, steps in ((1, tokens), (32, max(2, tokens // 4))):
            before = bench.slice(store)
            options = {"prompt_tokens": 32, "context": 192, "batch": count, "tokens": steps}
            mine = bench.qmix(store, limit, limit, **options)
            runs.append(mine | {"disk_read": statistics.mean((before, bench.slice(store)))})
    return runs


def real(bench: Bench, rounds: int, tokens: int) -> list[Result]:
    store = bench.real_store()
    runs = []
    for _ in range(rounds):
        before = bench.slice(store)
        options = {"prompt_tokens": 64, "context": 4096, "tokens": max(2, tokens // 4)}
        mine = bench.qmix(store, REAL_RAM, REAL_RAM, **options)
        runs.append(mine | {"disk_read": statistics.mean((before, bench.slice(store)))})
    return runs


STAGES: dict[str, Callable[[Bench, int, int], list[Result]]] = {
    "resident": resident,
    "disk": disk,
    "batch": batch,
    "real": real,
}


def summary(bench: Bench, run: Result) -> Result:
    """What the table shows of one run; the bound is the longest of what disk and memory must at least take."""
    decode = statistics.median(run["decode_s"])
    row = {
        "engine": run["engine"],
        "batch": run.get("batch", 1),
        "prefill_tok_s": run["prompt_tokens"] * run.get("batch", 1) / run["prefill_s"],
        "decode_s": decode,
        "decode_mean_s": statistics.mean(run["decode_s"]),
        "decode_range_s": (min(run["decode_s"]), max(run["decode_s"])),
        "tok_s": run.get("batch", 1) / statistics.mean(run["decode_s"]),
        "limit": run["limit"],
        "group_peak": run["group_peak"],
    }
    if run["engine"] != "qmix":
        return row
    steps = len(run["decode_s"])
    memory = run["active_bytes"] / bench.machine.memory_read.median
    least = own = 0.0
    if "disk_read" in run:
        least, own = (run[name] / steps / run["disk_read"] for name in ("belady_bytes", "bytes_read"))
    names = ("hit_rate", "misses", "ahead", "hidden", "unused", "precision_ahead", "slots", "experts", "planned")
    return row | {
        "bytes_per_step": run["bytes_read"] / steps,
        "belady_bytes_per_step": run["belady_bytes"] / steps,
        "disk_gb_s": run["bytes_read"] / sum(run["decode_s"]) / 1e9,
        "memory_gb_s": run["active_bytes"] / decode / 1e9,
        "disk_ceiling_gb_s": run.get("disk_read", 0) / 1e9,
        "of_bound": max(least, memory) / row["decode_mean_s"],
        "of_own_reads": max(own, memory) / row["decode_mean_s"],
        "as_expected": run["all_as_expected"],
        "peak_memory": run["peak_memory"],
        "prefill_bytes": run["prefill_bytes"],
        **{name: run[name] for name in names},
    }


def show(stage: str, rows: list[Result]) -> None:
    table = Table(title=stage)
    columns = ("engine", "prefill tok/s", "s a step, median (range)", "tok/s", "hits", "GB a step", "GB/s", "of bound")
    for column in (*columns, "of own reads", "peak"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["decode_range_s"]
        mine = ["", "", "", "", ""]
        if row["engine"] == "qmix":
            rate = row["disk_gb_s"] if row["bytes_per_step"] else row["memory_gb_s"]
            mine = [f"{row['hit_rate']:.0%}", f"{row['bytes_per_step'] / 1e9:.2f}", f"{rate:.2f}"]
            mine += [f"{row['of_bound']:.0%}", f"{row['of_own_reads']:.0%}"]
        name = row["engine"] + (f" x {row['batch']}" if row["batch"] > 1 else "")
        times = f"{row['decode_s']:.3f} ({low:.3f}-{high:.3f})"
        cells = (f"{row['prefill_tok_s']:.1f}", times, f"{row['tok_s']:.2f}", *mine)
        table.add_row(name, *cells, format_bytes(row["group_peak"] or 0))
    Console(width=150).print(table)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--peer", type=click.Path(path_type=Path), help="Python of an environment with llama-cpp-python")
@click.option("--stage", "stages", multiple=True, type=click.Choice(list(STAGES)), help="[all]")
@click.option("--layers", default=24, show_default=True, help="of the 8x7B geometry")
@click.option("--distinct", default=8, show_default=True, help="layers of 8x22B whose experts are on disk")
@click.option("--rounds", default=3, show_default=True)
@click.option("--tokens", default=100, show_default=True)
def main(
    directory: Path, peer: Path | None, stages: tuple[str, ...], layers: int, distinct: int, rounds: int, tokens: int
) -> None:
    """Print conditions, a table for each stage, and last one JSON line."""
    bench = Bench(directory, peer, layers, distinct)
    found: dict[str, Any] = {}
    for stage in stages or STAGES:
        runs = STAGES[stage](bench, rounds, tokens)
        found[stage] = [summary(bench, run) for run in runs]
        memory, product = bench.machine.memory_read, bench.machine.matmul
        ceilings = {"memory_gb_s": memory.median / 1e9, "matmul_gflop_s": product.median / 1e9}
        ceilings["disk_gb_s"] = statistics.median(bench.disk) / 1e9 if bench.disk else 0.0
        found[f"{stage} ceilings"] = ceilings | {"disk_slices_gb_s": [rate / 1e9 for rate in bench.disk]}
        show(f"{stage}, {layers if stage != 'real' else 56} layers", found[stage])
        click.echo(f"ceilings: {json.dumps(found[f'{stage} ceilings'])}")
        bench.disk.clear()
    click.echo(json.dumps({"date": date.today().isoformat(), "layers": layers, "rounds": rounds} | found))


if __name__ == "__main__":
    main()
