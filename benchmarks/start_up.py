"""Time whole commands on the embedded model, beside the imports that they cannot do without.

    python benchmarks/start_up.py --rounds 7

Each command is a process of its own; rounds alternate between them. The first round fills the caches and is not
counted. `library` does the same as `generate` from Python, where transformers is imported whole.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import click
from rich.console import Console
from rich.table import Table

LIBRARY = """
import qmix
with qmix.load("tiny", ram="2GiB") as runner:
    print(runner.complete("Hello", max_new_tokens=8).text)
"""
QMIX = [sys.executable, "-m", "cli"]
COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "qmix --help": [*QMIX, "--help"],
    "refusal: unknown model": [*QMIX, "generate", "Hello", "-m", "none/such/model"],
    "refusal: --ram 1MB": [*QMIX, "generate", "Hello", "--ram", "1MB"],
    "refusal: --context 9999999": [*QMIX, "generate", "Hello", "--context", "9999999"],
    "plan tiny": [*QMIX, "plan", "tiny"],
    "generate, 8 tokens": [*QMIX, "generate", "Hello", "--max-new-tokens", "8"],
    "library, 8 tokens": [sys.executable, "-c", LIBRARY],
}


def seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - started


@click.command()
@click.option("--rounds", default=7, show_default=True)
def main(rounds: int) -> None:
    """Print the fastest and the median time of each command."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for index in range(rounds + 1):
        for name, command in COMMANDS.items():
            seconds = seconds_of(command)
            if index:
                found[name].append(seconds)
    table = Table(title="whole processes, seconds")
    for name in ("", "fastest", "median"):
        table.add_column(name, justify="right" if name else "left")
    for name, times in found.items():
        table.add_row(name, f"{min(times):.2f}", f"{statistics.median(times):.2f}")
    Console().print(table)
    print(
        json.dumps({name: {"fastest": min(times), "median": statistics.median(times)} for name, times in found.items()})
    )


if __name__ == "__main__":
    main()
