"""Run qmix on a store: prefill a prompt, decode greedily, print one JSON line. The counterpart of llamacpp_peer.py.

    python benchmarks/qmix_peer.py STORE --prompt-tokens 128 --tokens 100 --ram 6GiB [--batch 32]

Prompts are parts of the tour that the synthetic model continues greedily; those of a batch are far from each other.
Times are in seconds, memory in bytes. The prefill includes the first token, and for a batch all its prompts. Counts
are those of the decode steps only. `belady_bytes` is the least that any cache with as many slots could have read for
them, if it had known the routing beforehand.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from synthetic_weights import SyntheticModel

import qmix
from qmix.bench.roofline import least_read_bytes
from qmix.engine.batch import BatchRunner
from qmix.engine.running import BatchRequest
from qmix.engine.sampling import Sampling
from qmix.engine.stream import Runner
from qmix.machine.found import peak_memory
from qmix.plan.batching import plan_lines
from qmix.pool.counters import PoolCounters
from qmix.pool.experts import ExpertPool
from qmix.pool.replay import requests
from qmix.pool.trace import as_trace, recorded
from qmix.store.opened import open_store
from qmix.units import parse_bytes


class Clock:
    """The times at which passes ended, with the pool's counters and the layers that had asked by then."""

    def __init__(self, pool: ExpertPool) -> None:
        self.pool = pool
        self.passes: list[tuple[float, PoolCounters, int]] = []
        self.steps: list[Any] = []

    def note(self) -> None:
        self.passes.append((time.perf_counter(), self.pool.counters.copy(), len(self.steps)))


@dataclass
class Decoded:
    """Generated tokens, and the passes: the one that ended the prompts, and those after it that had every sequence
    in them."""

    token_ids: list[list[int]]
    peak_memory: int
    clock: Clock
    first: int
    last: int


def alone(runner: Runner, prompt: list[int], tokens: int) -> Decoded:
    """Compute one prompt: its last chunk is a pass, and each further token."""
    clock = Clock(runner.pool)
    runner.model.register_forward_hook(lambda *_: clock.note())
    with recorded(runner.pool) as clock.steps:
        result = runner.complete(prompt, max_new_tokens=tokens, temperature=0, ignore_eos=True)
    last = len(clock.passes) - 1
    return Decoded([result.token_ids], result.peak_memory, clock, last - tokens + 1, last)


def together(runner: BatchRunner, prompts: list[list[int]], tokens: int) -> Decoded:
    """Many prompts, which go through the model with the first tokens of those before them."""
    sampling = Sampling(max_new_tokens=tokens, temperature=0, ignore_eos=True)
    clock, answers, first, last = Clock(runner.pool), dict[str, list[int]](), None, None
    requests = [BatchRequest(str(index), prompt, sampling) for index, prompt in enumerate(prompts)]
    with recorded(runner.pool) as clock.steps:
        for finished in runner.answer(requests):
            clock.note()
            if first is None and runner.work.prompt_tokens == sum(map(len, prompts)):
                first = len(clock.passes) - 1
            if finished and last is None:
                last = len(clock.passes) - 1
            answers |= {answer.name: answer.token_ids for answer in finished}
    assert first is not None
    assert last is not None
    return Decoded([answers[request.name] for request in requests], peak_memory(), clock, first, last)


def run(
    model: SyntheticModel, path: Path, prompts: list[list[int]], tokens: int, ram: str, context: int
) -> dict[str, Any]:
    """Return one measured run as a JSON object."""
    started = time.perf_counter()
    runner: Runner | BatchRunner
    if len(prompts) == 1:
        runner = qmix.load(path, ram=ram, context=context)
    else:
        store, needs = open_store(path), [len(prompt) + tokens for prompt in prompts]
        runner = BatchRunner(store, plan_lines(store.layout, needs, parse_bytes(ram), len(prompts)))
    with runner:
        loaded = time.perf_counter()
        if isinstance(runner, BatchRunner):
            found = together(runner, prompts, tokens)
        else:
            found = alone(runner, prompts[0], tokens)
        plan = runner.plan
        prefetcher = runner.model.model.layers[0].mlp.experts.prefetcher
    passes, geometry = found.clock.passes, runner.store.geometry
    prefill, decode = passes[found.first], passes[found.last]
    used, layers = decode[1].since(prefill[1]), geometry.num_layers
    before, whole = (as_trace(found.clock.steps[: ended[2]], layers) for ended in (prefill, decode))
    least = [least_read_bytes(runner.store.layout, trace, runner.pool.slots, ()) for trace in (before, whole)]
    return {
        "engine": "qmix",
        "model": str(path),
        "prompt_tokens": len(prompts[0]),
        "batch": len(prompts),
        "threads": torch.get_num_threads(),
        "layers": geometry.num_layers,
        "slots": plan.slots,
        "experts": plan.num_records,
        "budget": plan.ram,
        "planned": plan.total,
        "load_s": loaded - started,
        "prefill_s": prefill[0] - loaded,
        "prefill_bytes": prefill[1].bytes_read,
        "decode_s": [after[0] - before[0] for before, after in pairwise(passes[found.first : found.last + 1])],
        "hit_rate": used.hit_rate,
        "bytes_read": used.bytes_read,
        "ahead": used.ahead,
        "hidden": used.hidden,
        "unused": used.unused,
        "misses": used.misses,
        "asked": requests(whole) - requests(before),
        "belady_bytes": least[1] - least[0],
        "precision_ahead": [prefetcher.precision(depth) for depth in (1, 2, 3, 4)] if prefetcher else None,
        "token_ids": found.token_ids[0],
        "all_as_expected": all(
            ids == model.continuation(prompt, tokens) for prompt, ids in zip(prompts, found.token_ids, strict=True)
        ),
        "peak_memory": found.peak_memory,
    }


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--start", default=0, show_default=True, help="place on the tour")
@click.option("--tokens", default=20, show_default=True, help="to generate")
@click.option("--ram", required=True)
@click.option("--context", default=1024, show_default=True)
@click.option(
    "--batch", default=1, show_default=True, help="prompts decoded together; more than one as `qmix batch` does"
)
def main(store: Path, prompt_tokens: int, start: int, tokens: int, ram: str, context: int, batch: int) -> None:
    """Print one JSON line."""
    warnings.simplefilter("ignore")
    model = SyntheticModel.of(store)
    apart = len(model.tour) // batch
    prompts = [model.prompt(start + index * apart, prompt_tokens) for index in range(batch)]
    click.echo(json.dumps(run(model, store, prompts, tokens, ram, context)))


if __name__ == "__main__":
    main()
