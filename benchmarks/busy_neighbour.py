"""Time decode beside programs that keep every core busy, with everything in memory.

    python benchmarks/busy_neighbour.py STORE --neighbours 2

Rounds alternate between a quiet machine and one with as many busy loops as cores (or --neighbours). Variants, each a
process of its own that waits while the others are measured:

as started    as the commands run: torch's OpenMP threads sleep after a short spin
spinning      with OpenMP's default, as in a program that imports torch itself
one thread    what is left without a team: the least that several threads must reach

STORE is of a model whose experts have half a million weights a matrix or more (smaller ones use one thread anyway),
such as `synthetic_store.py OUT --layers 4 --hidden 2048 --intermediate 7168 --heads 16 --kv-heads 8`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

VARIANTS = {
    "as started": {"GOMP_SPINCOUNT": "1000"},
    "spinning": {},
    "one thread": {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"},
}
BUSY = "while True: pass"


def decode(store: str, ram: str, tokens: int) -> None:
    """Answer each line on stdin with the speed of one generation, tokens/s."""
    from qmix.commands.shared import load_libraries
    from qmix.engine.load import load

    prompt = list(range(5, 37))
    with load(store, ram=ram, context=len(prompt) + tokens, import_libraries=load_libraries) as runner:
        runner.complete(prompt, max_new_tokens=4, temperature=0, ignore_eos=True)
        print("ready", flush=True)
        for _ in sys.stdin:
            done = runner.complete(prompt, max_new_tokens=tokens, temperature=0, ignore_eos=True)
            print(json.dumps(done.rate), flush=True)


class Variant:
    """A process that decodes when asked."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        command = [sys.executable, __file__, "--decode", *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=kept | environment)
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def measure(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(json.loads(self._line()))

    def close(self) -> None:
        self._process.communicate()


@click.command()
@click.argument("store", type=click.Path(exists=True, file_okay=False))
@click.option("--ram", default="3GiB", show_default=True, help="enough for all experts")
@click.option("--tokens", default=24, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--neighbours", default=os.cpu_count(), show_default=True, help="busy loops")
@click.option("--decode", "decodes", is_flag=True, hidden=True)
def main(store: str, ram: str, tokens: int, rounds: int, neighbours: int, decodes: bool) -> None:
    """Print tokens/s quiet and busy, and the share that is kept."""
    if decodes:
        decode(store, ram, tokens)
        return
    arguments = (str(Path(store)), "--ram", ram, "--tokens", str(tokens))
    variants = {name: Variant(environment, *arguments) for name, environment in VARIANTS.items()}
    found: dict[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in variants}
    for _ in range(rounds):
        for busy in (False, True):
            loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(neighbours * busy)]
            time.sleep(0.5)
            for name, variant in variants.items():
                found[name][busy].append(variant.measure())
            for loop in loops:
                loop.kill()
                loop.wait()
    for variant in variants.values():
        variant.close()
    table = Table(title=f"decode, tok/s, median of {rounds} rounds; {neighbours} busy loops on {os.cpu_count()} cores")
    for column in ("", "quiet", "busy", "kept", "of the best quiet"):
        table.add_column(column, justify="right" if column else "left")
    medians = {name: {busy: statistics.median(rates) for busy, rates in both.items()} for name, both in found.items()}
    best = max(both[False] for both in medians.values())
    for name, both in medians.items():
        kept = f"{both[True] / both[False]:.0%}", f"{both[True] / best:.0%}"
        table.add_row(name, f"{both[False]:.1f}", f"{both[True]:.1f}", *kept)
    Console().print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
