"""Run transformers' own bf16 model of a checkpoint, with the weights that do not fit offloaded to disk by accelerate.

    python benchmarks/transformers_peer.py CHECKPOINT --prompt ids.json --tokens 20 --ram 8GiB

The prompt is a JSON list of token ids, in a file or as the argument itself. `--ram` is for weights (accelerate's
max_memory), not for the whole process. Prints one JSON line. Times are in seconds, memory in bytes. The prefill
includes the first token.
"""

from __future__ import annotations

import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from transformers import DynamicCache, MixtralForCausalLM

from qmix.machine.found import peak_memory
from qmix.units import parse_bytes


def run(checkpoint: Path, ids: list[int], tokens: int, ram: int, offload: Path) -> dict[str, Any]:
    """Load, prefill in one go, decode greedily."""
    clock = [time.perf_counter()]
    model = MixtralForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": ram}, offload_folder=offload
    ).eval()
    places = list(getattr(model, "hf_device_map", {"": "cpu"}).values())
    cache, step = DynamicCache(config=model.config), torch.tensor([ids])
    found: list[int] = []
    clock.append(time.perf_counter())
    with torch.inference_mode():
        while len(found) < tokens:
            logits = model(step, cache=cache, use_cache=True, logits_to_keep=1).logits
            found.append(int(logits[0, -1].argmax()))
            step = torch.tensor([found[-1:]])
            clock.append(time.perf_counter())
    load, prefill, *decode = [after - before for before, after in pairwise(clock)]
    conditions = {"engine": "transformers", "model": str(checkpoint), "prompt_tokens": len(ids)}
    conditions |= {"modules_on_disk": places.count("disk"), "modules": len(places)}
    times = {"load_s": load, "prefill_s": prefill, "decode_s": decode}
    return conditions | times | {"token_ids": found, "peak_memory": peak_memory()}


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--prompt", required=True, help="A JSON list of token ids, or a file that holds one.")
@click.option("--tokens", default=20, show_default=True, help="To generate.")
@click.option("--ram", default="8GiB", show_default=True, help="For weights.")
@click.option("--offload", type=click.Path(path_type=Path), help="Where a folder for offloaded weights is made.")
def main(checkpoint: Path, prompt: str, tokens: int, ram: str, offload: Path | None) -> None:
    """Run CHECKPOINT on a prompt of token ids."""
    ids = json.loads(prompt if prompt.startswith("[") else Path(prompt).read_text())
    with tempfile.TemporaryDirectory(dir=offload) as folder:
        print(json.dumps(run(checkpoint, ids, tokens, parse_bytes(ram), Path(folder))))


if __name__ == "__main__":
    main()
