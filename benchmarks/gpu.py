"""Measure qmix on this machine's GPU within ten minutes: one table, with the plan's prediction and the bound beside it.

    python benchmarks/gpu.py
    python benchmarks/gpu.py /scratch/qmix-gpu --budget 24GiB --budget 12GiB --no-large

Writes a synthetic store of 8x7B's size to DIRECTORY, by default ./qmix-gpu (27 GB), and one of 8x22B's where RAM holds
it (29 GB: only 14 layers' experts differ). Runs `qmix doctor`, the self-test, and `qmix bench` in each budget, one
process after the other, while nvidia-smi's memory is watched. The text is compared with the known continuation, which
is also the CPU's.
Needs nothing but qmix, torch for CUDA and the driver. What is left at the time limit is not run and is named.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table
from synthetic_store import write_store
from synthetic_weights import PRESETS, SyntheticModel

from qmix.machine.found import gpu_driver
from qmix.units import format_bytes, parse_bytes

GIB = 2**30
BUDGETS = ("40GiB", "24GiB", "12GiB")  # for 8x7B
LARGE = "24GiB"  # for 8x22B
LARGE_RAM = 80 * GIB  # all of its experts that are not on the GPU, and the rest
LARGE_LAYERS = 14  # whose experts differ
PROMPT, NEW, TEXT = 512, 64, 48  # tokens
TOGETHER = 64  # prompts of a batch
LIMIT = 600.0  # seconds
WATCH_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """A store in a GPU's budget; None is the CPU alone."""

    model: str
    budget: str | None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.budget or 'CPU alone'}"

    @property
    def options(self) -> list[str]:
        return ["--gpu", self.budget or "none"]


class Peak:
    """The most memory in use on a GPU, in bytes, as nvidia-smi counts it, less what was in use before."""

    def __init__(self) -> None:
        self.before = used_memory()
        self.most = self.before

    def __enter__(self) -> Peak:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            self.most = max(self.most, used_memory())

    @property
    def nbytes(self) -> int:
        return self.most - self.before


def used_memory() -> int:
    """Return the bytes in use on the first GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[0]) * 2**20


def cases(budgets: Sequence[str], memory: int, ram: int, large: bool) -> list[Case]:
    """Return what is run on a GPU with `memory` bytes beside `ram` bytes: budgets that it has not are left out."""
    found = [Case("8x7b", budget) for budget in budgets if parse_bytes(budget) <= memory]
    found += [Case("8x22b", LARGE)] if large and ram >= LARGE_RAM and parse_bytes(LARGE) <= memory else []
    return [*found, Case("8x7b", None)]


def qmix(*arguments: str, state: Path, limit: float) -> str:
    """Return the stdout of a qmix command. Raises RuntimeError with its last line where it fails."""
    environment = os.environ | {"XDG_STATE_HOME": str(state)}
    command = [sys.executable, "-m", "cli", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=limit)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or done.stdout.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"qmix {' '.join(arguments)}: {last[0]}")
    return done.stdout


def made_store(directory: Path, name: str) -> Path:
    """Write the store of a model unless it is there."""
    path = directory / name
    if not path.exists():
        distinct = LARGE_LAYERS if name == "8x22b" else 0
        part = path.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        write_store(part, SyntheticModel(PRESETS[name], 0, distinct))
        part.rename(path)
    return path


def measured(case: Case, store: Path, state: Path, limit: float) -> dict[str, Any]:
    """Return the figures of a case: bench's report, the plan's prediction, the peak of GPU memory, and the text."""
    context = ["--context", str(PROMPT + TEXT + 1)]
    planned = json.loads(qmix("plan", str(store), *case.options, *context, "--json", state=state, limit=limit))
    tests = ["-p", str(PROMPT), "-n", str(NEW), "-r", "2"]
    with watched(case) as peak:
        report = json.loads(
            qmix("bench", str(store), *case.options, *context, *tests, "--json", state=state, limit=limit)
        )
    command = [sys.executable, __file__, "--text", str(store), *(["--budget", case.budget] if case.budget else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit)
    right = json.loads(done.stdout)["right"]
    found = {"report": report, "planned": planned, "peak": peak.nbytes if peak else None, "right": right, "batch": None}
    if case.budget:
        try:
            found["batch"] = batched(case, store, state, limit)
        except RuntimeError as error:  # the other figures are worth having
            found["batch_error"] = str(error)
    return found


def batched(case: Case, store: Path, state: Path, limit: float) -> dict[str, Any]:
    """Return the summary of many short prompts answered together."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answers = Path(scratch) / "in.jsonl", Path(scratch) / "out.jsonl"
        lines = [{"id": str(index), "prompt": f"To print page {index}, click"} for index in range(TOGETHER)]
        asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
        greedy = ["--temperature", "0", "--ignore-eos", "--max-new-tokens", str(NEW), "--json"]
        command = ["batch", str(asked), "-o", str(answers), "-m", str(store), *case.options, *greedy]
        found: dict[str, Any] = json.loads(qmix(*command, state=state, limit=limit))
    return found


@contextmanager
def watched(case: Case) -> Iterator[Peak | None]:
    """Watch the GPU's memory while a case runs on it."""
    if case.budget is None:
        yield None
        return
    with Peak() as peak:
        yield peak


def text(store: Path, budget: str | None) -> dict[str, Any]:
    """Return how many greedy tokens are the known ones, of those of a prompt."""
    import qmix as library

    model = SyntheticModel.of(store)
    ids = model.prompt(700, PROMPT)
    with library.load(store, gpu=[budget] if budget else [], context=PROMPT + TEXT + 1) as runner:
        found = runner.complete(ids, temperature=0, max_new_tokens=TEXT, ignore_eos=True).token_ids
    want = model.continuation(ids, TEXT)
    return {"right": sum(one == other for one, other in zip(found, want, strict=True))}


def row(case: Case, found: dict[str, Any]) -> list[str]:
    """Return the cells of a case: decode and prefill with prediction and share of the bound, memory, text."""
    rows = {each["test"]: each for each in found["report"]["rows"]}
    cells = [case.name]
    for kind, test in (("decode", f"tg{NEW}"), ("prefill", f"pp{PROMPT}")):
        each, predicted = rows[test], found["planned"]["predicted"][kind]["tokens_per_s"]
        cells += [f"{each['rate']:.4g}", f"{predicted:.4g}", f"{each['bound_rate']:.4g}"]
        cells += [f"{100 * each['share_of_bound']:.0f}%"]
    peak = "" if found["peak"] is None else f"{found['peak'] / 2**20:.0f} MiB"
    placed = found["planned"]
    on_gpu = f"{placed['num_records'] - placed['host_records']} of {placed['num_records']}"
    batch = f"{found['batch']['tok_s']:.4g}" if found["batch"] else ""
    return [*cells, batch, on_gpu if placed["devices"] else "", peak, f"{found['right']} of {TEXT}"]


def table(rows: Sequence[Sequence[str]]) -> Table:
    """Return the table of all cases."""
    made = Table()
    made.add_column("case", no_wrap=True)
    for kind in ("decode", "prefill"):
        for what in (f"{kind}\ntok/s", "predicted", "bound", "of bound"):
            made.add_column(what, justify="right")
    for what in (f"{TOGETHER} prompts\ntok/s", "experts\non the GPU", "nvidia-smi's\npeak", "tokens\nas known"):
        made.add_column(what, justify="right")
    for cells in rows:
        made.add_row(*cells)
    return made


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("qmix-gpu"))
@click.option("--budget", "budgets", multiple=True, metavar="SIZE", help=f"of the GPU [{', '.join(BUDGETS)}]")
@click.option("--no-large", is_flag=True, help="leave 8x22B out")
@click.option("--no-self-test", is_flag=True, help="leave the self-test out")
@click.option("--text", "text_only", is_flag=True, hidden=True)
def main(directory: Path, budgets: tuple[str, ...], no_large: bool, no_self_test: bool, text_only: bool) -> None:
    """Print the table, then one JSON line."""
    if text_only:
        click.echo(json.dumps(text(directory, budgets[0] if budgets else None)))
        return
    memory = gpu_memory()
    if memory is None:
        raise click.ClickException("needs an NVIDIA GPU with its driver, and torch for CUDA; there is none here")
    started, console = time.monotonic(), Console()
    say = Console(stderr=True).print
    state = directory / "state"
    found, left = {}, []
    say("qmix doctor ...")
    qmix("doctor", "--directory", str(directory), state=state, limit=LIMIT)
    if not no_self_test:
        say(qmix("doctor", "--self-test", state=state, limit=LIMIT))
    for case in cases(budgets or BUDGETS, memory, psutil.virtual_memory().total, not no_large):
        limit = LIMIT - (time.monotonic() - started)
        if limit < 0:
            left.append(case.name)
            continue
        say(f"{case.name} ...")
        try:
            found[case] = measured(case, made_store(directory, case.model), state, limit)
        except (RuntimeError, subprocess.SubprocessError) as error:
            say(f"{case.name}: {error}")
            left.append(case.name)
    console.print(table([row(case, each) for case, each in found.items()]))
    for case, each in found.items():
        if "batch_error" in each:
            console.print(f"{case.name}: no batch: {each['batch_error']}")
    if left:
        console.print(f"not run, or failed: {'; '.join(left)}")
    console.print(f"{gpu_name()}, {format_bytes(memory)}; {time.strftime('%Y-%m-%d')}")
    click.echo(json.dumps({case.name: each for case, each in found.items()}))


def gpu_memory() -> int | None:
    """Return the bytes that a program can take on the first GPU; None without one that torch can use."""
    if not gpu_driver() or shutil.which("nvidia-smi") is None:
        return None
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def gpu_name() -> str:
    """Return the name of the first GPU."""
    import torch

    return str(torch.cuda.get_device_name(0))


if __name__ == "__main__":
    main()
