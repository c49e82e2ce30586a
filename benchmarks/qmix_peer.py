"""qmix on a store: prefill a prompt, decode greedily, print one JSON line; the counterpart of llamacpp_peer.py.

    python benchmarks/qmix_peer.py STORE --prompt-tokens 128 --tokens 100 --ram 6GiB [--batch 32]

Prompts are parts of the tour that the synthetic model continues greedily, those of a batch far from each other. Times
in seconds, memory in bytes; the first token comes with the prefill. Counts are those of the decode steps alone,
`belady_bytes` the fewest that any cache of as many slots could have read for them, had it known the routing beforehand.
"""

from __future__ import annotations

import json
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from synthetic_weights import SyntheticModel

import qmix
from calibration.replay import belady_hits, requests
from calibration.trace import recorded
from qmix.runner import Runner
from qmix.sampling import Sampling


class Clock:
    """When each forward pass of the model ended, and what the pool had counted by then."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.passes: list[tuple[float, Any, int]] = []
        self.steps: list[Any] = []

    def note(self, now: float) -> None:
        self.passes.append((now, self.runner.pool.counters.copy(), len(self.steps)))


def run(
    model: SyntheticModel, store: Path, prompts: list[list[int]], tokens: int, ram: str, context: int
) -> dict[str, Any]:
    """One measured run, as a JSON object."""
    started = time.perf_counter()
    with qmix.load(store, ram=ram, context=context, batch=len(prompts)) as runner:
        loaded = time.perf_counter()
        clock = Clock(runner)
        runner.model.register_forward_hook(lambda *_: clock.note(time.perf_counter()))
        sampling = Sampling(max_new_tokens=tokens, temperature=0, ignore_eos=True)
        with recorded(runner.pool) as clock.steps:
            results = runner.complete_batch(prompts, sampling)
        plan = runner.plan
        layers = runner.store.geometry.num_layers
        lookahead = runner.model.model.layers[0].mlp.experts.lookahead
        threads = torch.get_num_threads()
    # passes: the prompt's last chunk first, then one for each further token
    prefill, decode = clock.passes[-tokens:][0], clock.passes[-1]
    used, trace = decode[1].since(prefill[1]), clock.steps
    warm = belady_hits(trace, plan.slots) - belady_hits(trace[: prefill[2]], plan.slots)
    asked = requests(trace[prefill[2] :])
    return {
        "engine": "qmix",
        "model": str(store),
        "prompt_tokens": len(prompts[0]),
        "batch": len(prompts),
        "threads": threads,
        "layers": layers,
        "slots": plan.slots,
        "experts": plan.num_records,
        "budget": plan.ram,
        "planned": plan.total,
        "load_s": loaded - started,
        "prefill_s": results[0].ttft_s,
        "prefill_bytes": prefill[1].bytes_read,
        "decode_s": [after[0] - before[0] for before, after in pairwise(clock.passes[-tokens:])],
        "hit_rate": used.hit_rate,
        "bytes_read": used.bytes_read,
        "ahead": used.ahead,
        "hidden": used.hidden,
        "unused": used.unused,
        "misses": used.misses,
        "asked": asked,
        "belady_bytes": (asked - warm) * plan.slot_bytes,
        "precision_ahead": [lookahead.precision(depth) for depth in (1, 2, 3, 4)] if lookahead else None,
        "token_ids": results[0].token_ids,
        "all_as_expected": all(
            result.token_ids == model.continuation(prompt, tokens)
            for prompt, result in zip(prompts, results, strict=True)
        ),
        "peak_memory": max(result.peak_memory for result in results),
    }


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--start", default=0, show_default=True, help="place on the tour")
@click.option("--tokens", default=20, show_default=True, help="to generate")
@click.option("--ram", required=True)
@click.option("--context", default=1024, show_default=True)
@click.option("--batch", default=1, show_default=True, help="prompts decoded together")
def main(store: Path, prompt_tokens: int, start: int, tokens: int, ram: str, context: int, batch: int) -> None:
    """Print one JSON line."""
    warnings.simplefilter("ignore")
    model = SyntheticModel.of(store)
    apart = len(model.tour) // batch
    prompts = [model.prompt(start + index * apart, prompt_tokens) for index in range(batch)]
    click.echo(json.dumps(run(model, store, prompts, tokens, ram, context)))


if __name__ == "__main__":
    main()
