"""Compare prompts layer by layer with prompts chunk after chunk, by length, with the disk's ceiling of the same run.

    python benchmarks/synthetic_store.py STORE --model 8x22b --layers 8
    python benchmarks/prompt_length.py STORE --ram 7GiB
    python benchmarks/prompt_length.py STORE --ram 7GiB --prompts 16 --tokens 800

Both read the same prompts with the same pool, in alternation. With --prompts, so many prompts of about --tokens each
wait together in the engine of many sequences, as in `qmix batch`. The ceiling is the time to read, once, every expert
that has no slot, at the disk's rate measured between the runs. Tokens are random: every expert is used in every layer.
With --disk, reads are slowed down to a slower disk's rate. The predicted time of a single prompt is the plan's, with
rates measured in the same run.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from slow_disk import limited

from qmix.commands.parameters import Size
from qmix.engine.batch import BatchRunner
from qmix.engine.pace import Pace
from qmix.engine.running import BatchRequest
from qmix.engine.sampling import Sampling
from qmix.engine.stream import Runner
from qmix.machine.ceilings import probe_in_child
from qmix.machine.measured import measured_rates
from qmix.machine.probes import DiskProbe
from qmix.machine.rates import Rates
from qmix.plan import predict
from qmix.plan.here import plan_for
from qmix.plan.memory import PREFILL_CHUNK
from qmix.plan.plan import Plan
from qmix.store.opened import Store, open_store

SLICE = 2 * 10**9  # bytes of disk reads between two runs, or one second of a slowed disk
ONE = Sampling(max_new_tokens=1, temperature=0)
SPREAD = 0.25  # of the lengths of prompts that wait together, either side of the middle


@dataclass(frozen=True, slots=True)
class Found:
    """Seconds until every prompt had its first new token, bytes read, passes, and the tokens chosen."""

    seconds: float
    read: int
    passes: int
    chosen: list[int]


Pair = tuple[Found, Found]  # by chunk, by layer


def one_prompt(runner: Runner, together: int, prompts: list[list[int]]) -> Found:
    """Read one prompt, `together` tokens of it through each layer."""
    runner.plan = replace(runner.plan, prefill=together)
    result = runner.complete(prompts[0], ONE)
    return Found(result.ttft_s, result.bytes_read, -(-len(prompts[0]) // together), result.token_ids)


def many_prompts(runner: BatchRunner, together: int, prompts: list[list[int]]) -> Found:
    """Read prompts that wait together, in passes of at most `together` tokens."""
    runner._pace = Pace(together)
    requests = [BatchRequest(str(index), prompt, ONE) for index, prompt in enumerate(prompts)]
    passes, read, started = runner.work.passes, runner.pool.counters.bytes_read, time.perf_counter()
    answers = {answer.name: answer for finished in runner.answer(requests) for answer in finished}
    seconds, read = time.perf_counter() - started, runner.pool.counters.bytes_read - read
    chosen = [token for request in requests for token in answers[request.name].token_ids]
    return Found(seconds, read, runner.work.passes - passes, chosen)


def prompts_of(store: Store, count: int, tokens: int, seed: int) -> list[list[int]]:
    """Return prompts of random tokens; several have lengths around `tokens`."""
    rng, vocabulary = random.Random(seed), range(3, store.geometry.vocab_size)
    lengths = [tokens] if count == 1 else [round(tokens * rng.uniform(1 - SPREAD, 1 + SPREAD)) for _ in range(count)]
    return [rng.choices(vocabulary, k=length) for length in lengths]


def rates_of(disk: float) -> Rates:
    """Return what `qmix doctor` kept, with memory, products and disk measured now."""
    found = probe_in_child()
    now = {"memory_read": found.memory_read.median, "matmul": found.matmul.median, "disk_read": disk}
    return measured_rates().with_measured(now)


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.option("--ram", type=Size(), required=True)
@click.option("--tokens", multiple=True, type=int, default=[1024, 2048, 4096], show_default=True)
@click.option("--prompts", default=1, show_default=True, help="that wait together")
@click.option("--together", type=int, help="tokens of prompts a layer, in place of the plan's; takes more than --ram")
@click.option("--disk", type=Size(), help="bytes/s that reads are slowed down to")
@click.option("--rounds", default=3, show_default=True)
def main(
    store: Path, ram: int, tokens: list[int], prompts: int, together: int | None, disk: int | None, rounds: int
) -> None:
    """Print seconds to the first token and bytes read, and the ratio pair by pair."""
    opened = open_store(store)
    context = round(max(tokens) * (1 + SPREAD * (prompts > 1))) + 1
    plan = plan_for(opened.layout, ram, context, batch=prompts)
    plan = replace(plan, prefill=together or plan.prefill)
    if plan.prefill == PREFILL_CHUNK:
        raise click.UsageError("the plan has no room for more than a chunk a layer; give more --ram, or --together")
    with limited(disk):
        measured, disk_read = measure(opened, plan, prompts, tokens, rounds, min(SLICE, disk or SLICE))
    rates = rates_of(disk_read)
    rows = [row(opened, plan, rates, prompts, count, pairs) for count, pairs in measured.items()]
    title = f"{store.name}, {plan.slots} of {plan.num_records} experts have a slot, {plan.prefill} together"
    Console(width=150).print(table(title, rows))
    print(json.dumps({"store": store.name, "ram": ram, "rates": rates.to_json(), "rows": rows}))


def measure(
    store: Store, plan: Plan, prompts: int, tokens: Sequence[int], rounds: int, nbytes: int
) -> tuple[dict[int, list[Pair]], float]:
    """Return the runs by chunk and by layer for each length, in alternation, and the disk's rate between them."""
    run: Callable[..., Found] = one_prompt if prompts == 1 else many_prompts
    measured: dict[int, list[Pair]] = {}
    opened = Runner(store, plan) if prompts == 1 else BatchRunner(store, plan)
    with DiskProbe.of_store(store) as probe, opened as runner:
        for count in tokens:
            measured[count] = []
            for index in range(rounds):
                texts = prompts_of(store, prompts, count, index)
                slow, fast = (run(runner, most, texts) for most in (PREFILL_CHUNK, plan.prefill))
                assert slow.chosen == fast.chosen
                measured[count].append((slow, fast))
                probe.slice(nbytes)
    return measured, statistics.median(probe.rates)


def row(store: Store, plan: Plan, rates: Rates, prompts: int, count: int, pairs: list[Pair]) -> dict[str, Any]:
    """Return the medians of a length, and for a single prompt what the plan predicts for both ways."""
    of_count = [replace(plan, context=count, prefill=together) for together in (PREFILL_CHUNK, plan.prefill)]
    predicted = [predict(each, store.layout, rates).prompt.seconds for each in of_count] if prompts == 1 else None
    return {
        "tokens": count,
        "prompts": prompts,
        "seconds": [statistics.median(pair[way].seconds for pair in pairs) for way in (0, 1)],
        "read": [statistics.median(pair[way].read for pair in pairs) for way in (0, 1)],
        "passes": [statistics.median(pair[way].passes for pair in pairs) for way in (0, 1)],
        "ratio": statistics.median(slow.seconds / fast.seconds for slow, fast in pairs),
        "ceiling": plan.on_disk / rates.disk_read,
        "predicted": predicted,
    }


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Return a line for each length: by chunk and by layer, and the disk's time for reading each expert once."""
    found = Table(title=title)
    for name in ("prompt", "by chunk", "by layer", "ratio", "passes", "read", "disk once", "predicted", "off"):
        found.add_column(name, justify="right")
    for each in rows:
        predicted = each["predicted"] or []
        off = [guess / seconds - 1 for guess, seconds in zip(predicted, each["seconds"], strict=False)]
        found.add_row(
            f"{each['prompts']} × {each['tokens']}",
            *(f"{seconds:.2f} s" for seconds in each["seconds"]),
            f"{each['ratio']:.2f}",
            " and ".join(f"{count:.0f}" for count in each["passes"]),
            " and ".join(f"{nbytes / 1e9:.2f} GB" for nbytes in each["read"]),
            f"{each['ceiling']:.2f} s",
            " and ".join(f"{seconds:.2f} s" for seconds in predicted),
            " and ".join(f"{share:+.0%}" for share in off),
        )
    return found


if __name__ == "__main__":
    main()
