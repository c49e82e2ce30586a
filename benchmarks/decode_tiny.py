"""Compare decode speed on the embedded model with transformers' own bf16 model, in one process, in alternation.

    python benchmarks/decode_tiny.py --tokens 128 --rounds 5

Both run transformers' generate, greedily, on the same prompt. The time per token after the first is compared.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, MixtralForCausalLM
from transformers.generation.streamers import BaseStreamer

import qmix
from qmix.models import EMBEDDED


class _Clock(BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def tpot(self) -> float:
        """Seconds a token after the first; the first entry is the prompt."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def transformers_tpot(model: MixtralForCausalLM, ids: list[int], tokens: int) -> float:
    clock = _Clock()
    config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=clock)
    return clock.tpot


@click.command()
@click.option("--tokens", default=128, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--precision", default="nf4", show_default=True)
def main(tokens: int, rounds: int, precision: str) -> None:
    """Print median and spread of both, and their ratio pair by pair."""
    path: Path = EMBEDDED["tiny"]
    theirs = MixtralForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    theirs.generation_config = GenerationConfig()
    ours_times, theirs_times = [], []
    with qmix.load("tiny", precision=precision) as runner:
        ids = runner.tokenizer("To install a package on this system, open a terminal and")["input_ids"]
        for index in range(rounds + 1):  # the first round warms up
            ours = runner.complete(ids, max_new_tokens=tokens, temperature=0, ignore_eos=True).tpot_s
            reference = transformers_tpot(theirs, ids, tokens)
            if index:
                ours_times.append(ours)
                theirs_times.append(reference)
    ratios = [b / a for a, b in zip(ours_times, theirs_times, strict=True)]
    table = Table(title=f"decode on tiny, {tokens} tokens, {torch.get_num_threads()} threads, {rounds} rounds")
    for column in ("", "min ms/token", "median", "max"):
        table.add_column(column)
    rows = (
        (f"qmix {precision}", ours_times, 1e3),
        ("transformers bf16", theirs_times, 1e3),
        ("ratio", ratios, 1.0),
    )
    for name, values, scale in rows:
        table.add_row(name, *(f"{scale * f(values):.2f}" for f in (min, statistics.median, max)))
    Console().print(table)
    print(json.dumps({"precision": precision, "tokens": tokens, "ratio_median": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
