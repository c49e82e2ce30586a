"""Compare predicted with measured peak memory and decode speed of a store, over several budgets.

    python benchmarks/plan_accuracy.py STORE --context 1536 --budgets 8
    python benchmarks/plan_accuracy.py tiny --rounds 3
    python benchmarks/plan_accuracy.py STORE --paths avx2,portable --threads 1,2

The machine's rates are measured first, on the disk that holds the store, as `qmix doctor` does. With --kept, the rates
that `qmix doctor` kept are used. Each budget is a process of its own. With --paths, there is one budget, which holds
everything, and a row for each CPU path and number of threads, whose rates are measured with them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from qmix.units import format_bytes

PROMPT = "To install a package on this system, open a terminal and type the name. "
NO_LIMITS: Mapping[str, str] = MappingProxyType({})
MOST_MEMORY, MOST_SPEED = 0.03, 0.25  # that a prediction may be off


def qmix_json(
    *arguments: str, text: str = "", state: Path | None = None, cpu: Mapping[str, str] = NO_LIMITS
) -> dict[str, Any]:
    """Return the answer of a command with --json; `state` is in place of the user's directory of measurements.

    `cpu` are variables that choose path and threads.
    """
    command = [sys.executable, "-m", "cli", *arguments, "--json"]
    environment = os.environ | cpu | ({"XDG_STATE_HOME": str(state)} if state else {})
    done = subprocess.run(command, input=text, check=True, capture_output=True, text=True, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def measured(
    store: str,
    limits: tuple[str, ...],
    prompt: str,
    tokens: int,
    rounds: int,
    state: Path | None,
    cpu: Mapping[str, str],
) -> tuple[int, list[float]]:
    """Return peak memory in bytes, and decode in tokens/s of each round."""
    greedy = ("--temperature", "0", "--ignore-eos", "--max-new-tokens", str(tokens))
    how: dict[str, Any] = {"text": prompt, "state": state, "cpu": cpu}
    runs = [qmix_json("generate", "-m", store, *limits, *greedy, **how) for _ in range(rounds)]
    return max(run["memory"]["peak_memory"] for run in runs), [1 / run["timings"]["tpot_s"] for run in runs]


@click.command()
@click.argument("store")
@click.option("--context", default=1536, show_default=True, help="filled to two thirds by the prompt")
@click.option("--budgets", default=8, show_default=True, help="from the smallest to what holds everything")
@click.option("--tokens", default=48, show_default=True, help="decoded at each budget")
@click.option("--rounds", default=1, show_default=True, help="at each budget; the median speed counts")
@click.option("--paths", default="", help="CPU paths to compare")
@click.option("--threads", default="2", show_default=True, help="with --paths: numbers of threads")
@click.option("--kept", is_flag=True, help="use what `qmix doctor` kept instead of measuring")
def main(
    store: str, context: int, budgets: int, tokens: int, rounds: int, paths: str, threads: str, kept: bool
) -> None:
    """Print a table, then one JSON line."""
    with tempfile.TemporaryDirectory() as scratch:
        state = None if kept else Path(scratch)
        if paths:
            cases = [(path, count) for path in paths.split(",") for count in threads.split(",")]
            found = [on_path(store, context, tokens, rounds, Path(scratch), *case) for case in cases]
            Console(width=130).print(table(store, context, found))
            print(json.dumps({"store": store, "context": context, "rows": found}))
            return
        if not kept:
            disk = ("--directory", store) if Path(store).is_dir() else ()
            rates = qmix_json("doctor", *disk, state=state)["rates"]
        rows = [row(store, context, share / (budgets - 1), tokens, rounds, state) for share in range(budgets)]
        if kept:
            rates = qmix_json("doctor", "--no-measure")["rates"]
    Console(width=110).print(table(store, context, rows))
    print(json.dumps({"store": store, "context": context, "rates": rates, "rows": rows}))


def on_path(store: str, context: int, tokens: int, rounds: int, state: Path, path: str, threads: str) -> dict[str, Any]:
    """Return the row of one CPU path with everything in memory; its rates are measured first."""
    cpu = {"QMIX_CPU": path, "OMP_NUM_THREADS": threads}
    disk = ("--directory", store) if Path(store).is_dir() else ()
    rates = qmix_json("doctor", *disk, state=state, cpu=cpu)["rates"]
    found = row(store, context, 1.0, tokens, rounds, state, cpu)
    values = {name: rate["value"] for name, rate in rates.items()}
    return {"path": path, "threads": int(threads), "rates": values} | found


def row(
    store: str,
    context: int,
    share: float,
    tokens: int,
    rounds: int,
    state: Path | None,
    cpu: Mapping[str, str] = NO_LIMITS,
) -> dict[str, Any]:
    """Return the row of a budget, that share of the way from the smallest to what holds everything."""
    whole = qmix_json("plan", store, "--ram", "4TiB", "--context", str(context), cpu=cpu)
    low, high = whole["smallest"], int(whole["total"] * 1.02) + 2**24
    limits = ("--ram", str(low + int((high - low) * share)), "--context", str(context))
    plan = qmix_json("plan", store, *limits, state=state, cpu=cpu)
    prompt = PROMPT * (context // 24)  # some 16 tokens each
    peak, speeds = measured(store, limits, prompt, tokens, rounds, state, cpu)
    speed, predicted = statistics.median(speeds), plan["predicted"]["decode"]
    return {
        "ram": plan["ram"],
        "slots": plan["slots"],
        "num_records": plan["num_records"],
        "total": plan["total"],
        "peak": peak,
        "memory_off": peak / plan["total"] - 1,
        "predicted": predicted["tokens_per_s"],
        "limit": predicted["limit"],
        "speeds": speeds,
        "speed_off": predicted["tokens_per_s"] / speed - 1,
    }


def table(store: str, context: int, rows: list[dict[str, Any]]) -> Table:
    """Return a table in which differences beyond what is promised are marked."""
    found = Table(title=f"{store}, context {context}")
    for column in ("budget", "in memory", "predicted", "measured", "off", "predicted", "measured", "off", "limit"):
        found.add_column(column, justify="right")

    def off(value: float, most: float) -> str:
        return f"{value:+.1%}{' !' if abs(value) > most else ''}"

    for each in rows:
        memory = (format_bytes(each["total"]), format_bytes(each["peak"]), off(each["memory_off"], MOST_MEMORY))
        speed = (f"{each['predicted']:.3g} tok/s", f"{statistics.median(each['speeds']):.3g} tok/s")
        held = f"{each['slots']} of {each['num_records']}"
        off_speed = off(each["speed_off"], MOST_SPEED)
        name = f"{each['path']}, {each['threads']}" if "path" in each else format_bytes(each["ram"])
        found.add_row(name, held, *memory, *speed, off_speed, each["limit"])
    return found


if __name__ == "__main__":
    main()
