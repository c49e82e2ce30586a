"""Compare a batch whose prompts begin alike with one of the same lengths whose prompts do not, in alternation.

    python benchmarks/shared_prefix.py --lines 32 --shared 300 --own 20 --tokens 16 --rounds 3

The ceiling is the ratio of the tokens that go through the model; the arena has room for all lines.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import click

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.engine.batch import BatchRunner
from qmix.engine.running import BatchRequest
from qmix.engine.sampling import Sampling
from qmix.models import EMBEDDED
from qmix.plan import make_plan
from qmix.store.quantize import quantize
from qmix.store.sources import layout_for


def seconds(runner: BatchRunner, prompts: list[list[int]], sampling: Sampling) -> tuple[float, int]:
    """Return how long a batch takes, and how many tokens went through the model."""
    start, tokens = time.perf_counter(), runner.work.tokens
    for _ in runner.answer(BatchRequest(str(index), prompt, sampling) for index, prompt in enumerate(prompts)):
        pass
    return time.perf_counter() - start, runner.work.tokens - tokens


@click.command()
@click.option("--lines", default=32, show_default=True)
@click.option("--shared", default=300, show_default=True, help="tokens that all prompts begin with")
@click.option("--own", default=20, show_default=True, help="further tokens of each prompt")
@click.option("--tokens", default=16, show_default=True, help="new tokens of each line")
@click.option("--rounds", default=3, show_default=True)
def main(lines: int, shared: int, own: int, tokens: int, rounds: int) -> None:
    """Print the medians of both, their ratio, and the ratio of their tokens."""
    draw = random.Random(1)
    sampling = Sampling(max_new_tokens=tokens, temperature=0, ignore_eos=True)
    times: dict[str, list[float]] = {"apart": [], "alike": []}
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(LocalSource(EMBEDDED["tiny"]))
        store = quantize(checkpoint, Path(scratch) / "store", layout_for(checkpoint, "nf4", None))
        plan = make_plan(store.layout, 2**40, shared + own + tokens, 2**28, batch=lines)
        with BatchRunner(store, plan.with_slots(store.geometry.num_records)) as runner:
            for index in range(rounds + 1):  # the first round warms up
                for name, found in times.items():
                    beginnings = [[draw.randrange(5, 4000) for _ in range(shared)] for _ in range(lines)]
                    ends = [[draw.randrange(5, 4000) for _ in range(own)] for _ in range(lines)]
                    if name == "alike":
                        beginnings = [beginnings[0]] * lines
                    prompts = [first + last for first, last in zip(beginnings, ends, strict=True)]
                    taken, counts[name] = seconds(runner, prompts, sampling)
                    if index:
                        found.append(taken)
    medians = {name: statistics.median(each) for name, each in times.items()}
    ceiling = counts["apart"] / counts["alike"]
    print(f"{lines} lines of {shared} + {own} tokens, {tokens} new ones: {medians['apart']:.2f} s apart, ", end="")
    print(f"{medians['alike']:.2f} s alike, ratio {medians['apart'] / medians['alike']:.2f} (tokens: {ceiling:.2f})")
    print(json.dumps({"seconds": times, "tokens": counts}))


if __name__ == "__main__":
    main()
