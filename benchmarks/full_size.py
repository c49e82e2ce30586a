"""Compare qmix with llama.cpp and transformers at the geometry of 8x7B and 8x22B, with the ceilings of the same run.

    python benchmarks/full_size.py DIRECTORY --peer PEER/bin/python
    python benchmarks/full_size.py DIRECTORY --peer PEER/bin/python --stage disk --layers 12 --rounds 3

Models that DIRECTORY lacks are written there first. With --discard, each is deleted when no later stage needs it. PEER
is an environment with llama-cpp-python, gguf and numpy. Engines alternate, each in its own process and cgroup with the
page cache counted (this needs root). Ceilings are measured between the runs. Stages:

resident   everything in memory: a prompt of 512 tokens, then decode; llama.cpp
disk       memory for half of the store: a prompt of 128 tokens, then 100 tokens; llama.cpp's mapping
batch      the same budget, 32 prompts decoded together
mapping    records of the store through a mapping of their file, and through a pool's slots
offload    memory for half of a bf16 checkpoint: transformers with accelerate's disk offload
quantize   that checkpoint into a store, beside the disk and the quantiser by themselves
real       8x22B, 56 layers, context 4096, 20 GiB; expert files are hard links to a few distinct ones
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import mmap_or_pool
import quantize_full
from full_size_report import Result, show, summary
from memory_cap import memory_group
from synthetic_weights import SyntheticModel

from qmix.bench.roofline import dense_read
from qmix.machine.ceilings import probe_in_child
from qmix.machine.probes import DiskProbe
from qmix.plan.here import plan_for
from qmix.store.opened import Store, open_store

HERE = Path(__file__).parent
SLICE = 2 * 10**9  # bytes of disk reads between two runs
REAL_RAM = 20 * 2**30
BESIDES_WEIGHTS = 1.2e9  # of transformers' memory: its imports, its cache, and one expert on its way from disk


class Bench:
    """Models in a directory, and runs of engines on them."""

    def __init__(self, directory: Path, peer: Path | None, layers: int, distinct: int, checkpoint_layers: int) -> None:
        self.directory, self.peer = directory.absolute(), peer
        self.layers, self.distinct, self.checkpoint_layers = layers, distinct, checkpoint_layers
        directory.mkdir(exist_ok=True, parents=True)
        self.machine = probe_in_child()
        self.disk: list[float] = []

    @property
    def paths(self) -> dict[str, Path]:
        """Return the path of each kind of model."""
        store, checkpoint = f"8x7b-{self.layers}", f"8x7b-{self.checkpoint_layers}"
        return {
            "store": self.directory / f"{store}.store",
            "gguf": self.directory / f"{store}.bf16.gguf",
            "checkpoint": self.directory / f"{checkpoint}.checkpoint",
            "quantized": self.directory / f"{checkpoint}.quantized",
            "real": self.directory / f"8x22b-56-{self.distinct}.store",
        }

    def discard(self, kinds: Iterable[str]) -> None:
        for kind in kinds:
            path = self.paths[kind]
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def store(self) -> Store:
        return open_store(self._written("store", "synthetic_store.py", "--layers", self.layers))

    def real_store(self) -> Store:
        sizes = ("--model", "8x22b", "--layers", 56, "--distinct-layers", self.distinct)
        return open_store(self._written("real", "synthetic_store.py", *sizes))

    def checkpoint(self) -> Path:
        return self._written("checkpoint", "synthetic.py", "--layers", self.checkpoint_layers)

    def quantized(self) -> Store:
        """Return the checkpoint's store, as the command makes it."""
        path, checkpoint = self.paths["quantized"], self.checkpoint()
        if not path.is_dir():
            command = [sys.executable, "-m", "cli", "quantize", str(checkpoint), str(path)]
            subprocess.run(command, check=True, stdout=sys.stderr, cwd=HERE.parent)
        return open_store(path)

    def _written(self, kind: str, program: str, *options: object) -> Path:
        path = self.paths[kind]
        if not path.is_dir():
            command = [sys.executable, *map(str, (HERE / program, path, *options))]
            subprocess.run(command, check=True, stdout=sys.stderr)
        return path

    def gguf(self, store: Store) -> Path:
        assert self.peer is not None
        path = self.paths["gguf"]
        if not path.is_file():
            subprocess.run(
                [self.peer, HERE / "gguf_writer.py", store.directory, path, "--dense", "bf16"],
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

    def transformers(self, checkpoint: Path, prompt: list[int], limit: int, tokens: int) -> Result:
        command = [sys.executable, HERE / "transformers_peer.py", checkpoint, "--prompt", json.dumps(prompt)]
        options = {"tokens": tokens, "ram": int(limit - BESIDES_WEIGHTS), "offload": self.directory}
        return self._run([*command, *_flags(options)], limit)

    def _run(self, command: list[Any], limit: int | None) -> Result:
        with memory_group(limit) as group:
            done = group.run(list(map(str, command)), capture_output=True)
            if done.returncode:
                raise click.ClickException(f"{command[1]} ended with {done.returncode}: {done.stderr[-500:]}")
            found: Result = json.loads(done.stdout)
            return found | {"limit": limit, "group_peak": group.peak}

    def slice(self, store: Store) -> float:
        """Measure the disk's rate once more."""
        with DiskProbe.of_store(store) as probe:
            self.disk.append(probe.slice(SLICE))
        return self.disk[-1]

    def between_slices(self, store: Store, ram: int, limit: int, **options: object) -> Result:
        """Run qmix, with the disk's rate measured just before and just after it."""
        before = self.slice(store)
        mine = self.qmix(store, ram, limit, **options)
        return mine | {"disk_read": statistics.mean((before, self.slice(store)))}


def _flags(options: dict[str, object]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def _active_bytes(store: Store, experts: float) -> float:
    """Return the bytes of weights that a step with so many expert requests reads from memory."""
    return experts * store.layout.record(0, 0).nbytes + dense_read(store.layout)


def resident(bench: Bench, rounds: int, tokens: int) -> list[Result]:
    store = bench.store()
    path = bench.gguf(store)
    ram = int(plan_for(store.layout, 2**50, 1024).total * 1.02) + 2**26
    prompt = SyntheticModel.of(store.directory).prompt(0, 512)
    runs = []
    for _ in range(rounds):
        bench.machine = probe_in_child()
        mine = bench.qmix(store, ram, None, prompt_tokens=512, tokens=tokens)
        runs.append(mine | {"memory_read": bench.machine.memory_read.median, "matmul": bench.machine.matmul.median})
        runs.append(bench.llama(path, prompt, None, "--warm-up", tokens=tokens))
    return runs


def disk(bench: Bench, rounds: int, tokens: int) -> list[Result]:
    store = bench.store()
    path = bench.gguf(store)
    limit = store.layout.total_bytes // 2
    prompt = SyntheticModel.of(store.directory).prompt(0, 128)
    runs = []
    for _ in range(rounds):
        runs.append(bench.between_slices(store, limit, limit, prompt_tokens=128, tokens=tokens))
        runs.append(bench.llama(path, prompt, limit, tokens=tokens) | {"disk_read": bench.disk[-1]})
    return runs


def batch(bench: Bench, rounds: int, tokens: int) -> list[Result]:
    store = bench.store()
    limit = store.layout.total_bytes // 2
    runs = []
    for _ in range(rounds):
        for count, steps in ((1, tokens), (32, max(2, tokens // 4))):
            options = {"prompt_tokens": 32, "context": 192, "batch": count, "tokens": steps}
            runs.append(bench.between_slices(store, limit, limit, **options))
    return runs


def offload(bench: Bench, rounds: int, tokens: int) -> list[Result]:
    checkpoint, store = bench.checkpoint(), bench.quantized()
    half = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) // 2
    steps = max(2, tokens // 10)
    prompt = SyntheticModel.of(checkpoint).prompt(0, 128)
    runs = []
    for _ in range(rounds):
        runs.append(bench.between_slices(store, half, half, prompt_tokens=128, tokens=steps))
        runs.append(bench.transformers(checkpoint, prompt, half, steps))
    return runs


def real(bench: Bench, rounds: int, tokens: int) -> list[Result]:
    store = bench.real_store()
    options = {"prompt_tokens": 64, "context": 4096, "tokens": max(2, tokens // 4)}
    return [bench.between_slices(store, REAL_RAM, REAL_RAM, **options) for _ in range(rounds)]


def mapping(bench: Bench, rounds: int, tokens: int) -> Result:
    return mmap_or_pool.report(bench.store(), 8 * rounds)


def quantize(bench: Bench, rounds: int, tokens: int) -> Result:
    with tempfile.TemporaryDirectory(dir=bench.directory) as scratch:
        return quantize_full.report(*quantize_full.measure(bench.checkpoint(), Path(scratch), "nf4", rounds))


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the comparison, and the models that it takes. `run` gives runs to be shown, or shows them itself."""

    run: Callable[[Bench, int, int], list[Result] | Result]
    models: tuple[str, ...]


STAGES = {
    "resident": Stage(resident, ("store", "gguf")),
    "disk": Stage(disk, ("store", "gguf")),
    "batch": Stage(batch, ("store",)),
    "mapping": Stage(mapping, ("store",)),
    "offload": Stage(offload, ("checkpoint", "quantized")),
    "quantize": Stage(quantize, ("checkpoint",)),
    "real": Stage(real, ("real",)),
}


def run_stage(bench: Bench, name: str, rounds: int, tokens: int) -> Result:
    """Runs a stage and shows its table; its rows, and the ceilings of the same minutes."""
    bench.disk.clear()
    found = STAGES[name].run(bench, rounds, tokens)
    if isinstance(found, dict):
        return {name: found}
    rows = [summary(run, bench.machine.memory_read.median) for run in found]
    show(f"{name}, {max(run.get('layers', 0) for run in found)} layers", rows)
    ceilings = {
        "memory_gb_s": bench.machine.memory_read.median / 1e9,
        "matmul_gflop_s": bench.machine.matmul.median / 1e9,
        "disk_gb_s": statistics.median(bench.disk) / 1e9 if bench.disk else 0.0,
        "disk_slices_gb_s": [rate / 1e9 for rate in bench.disk],
    }
    click.echo(f"ceilings: {json.dumps(ceilings)}")
    return {name: rows, f"{name} ceilings": ceilings}


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--peer", type=click.Path(path_type=Path), help="Python of an environment with llama-cpp-python")
@click.option("--stage", "stages", multiple=True, type=click.Choice(list(STAGES)), help="[all]")
@click.option("--layers", default=24, show_default=True, help="of the 8x7B geometry")
@click.option("--distinct", default=8, show_default=True, help="layers of 8x22B whose experts are on disk")
@click.option("--checkpoint-layers", default=3, show_default=True, help="of the bf16 checkpoint, in 8x7B's geometry")
@click.option("--rounds", default=3, show_default=True)
@click.option("--tokens", default=100, show_default=True)
@click.option("--discard", is_flag=True, help="delete each model when no later stage needs it")
def main(
    directory: Path, peer: Path | None, stages: tuple[str, ...], rounds: int, tokens: int, discard: bool, **sizes: int
) -> None:
    """Print conditions, a table for each stage, and last one JSON line."""
    bench = Bench(directory, peer, **sizes)
    found: Result = {"date": date.today().isoformat(), "rounds": rounds, **sizes}
    left = list(stages or STAGES)
    while left:
        name = left.pop(0)
        found |= run_stage(bench, name, rounds, tokens)
        if discard:
            bench.discard(set(STAGES[name].models).difference(*(STAGES[later].models for later in left)))
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
