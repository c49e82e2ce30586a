"""Check on a GPU that experts on the host are computed in the fastest way: by the CPU, by copies, or by both.

The way follows from the machine's rates. A model with half of its experts on the host decodes the same text three
times: with the rates as measured, with a link so slow that nothing is copied, and with a CPU so slow that as much as
possible is. The first must not take longer than the others.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from shutil import copyfile

import torch
from safetensors.torch import save_file

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.naming import expert_key
from qmix.checkpoint.source import LocalSource
from qmix.engine.stream import Runner
from qmix.geometry import CONFIG_KEYS, Geometry
from qmix.machine.rates import Rates
from qmix.models import EMBEDDED
from qmix.plan import Plan
from qmix.store.opened import Store
from qmix.store.quantize import quantize
from qmix.store.sources import layout_for

SIZES = Geometry(2048, 7168, 4, 16, 4, 128, 8, 2, 4096, 1024)  # records of 23 MB: far longer than a round trip
AS_CHOSEN, ON_CPU, COPIED = "as chosen", "the CPU alone", "as many copies as possible"
SLOWER = 1.1  # than the fastest way, from which on the choice counts as wrong
TOKENS, ROUNDS = 32, 3
PROMPT = list(range(300, 308))
PATTERN = 2**20  # weights that repeat
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def ways(rates: Rates) -> dict[str, Rates]:
    """Return the rates that lead to each way."""
    return {
        AS_CHOSEN: rates,
        ON_CPU: replace(rates, pcie=1.0),
        COPIED: replace(rates, four_bit_read=1.0, matmul=1.0, memory_read=1e15),
    }


def seconds_by_way(store: Store, plan: Plan, rates: Rates, kind: str, tokens: int = TOKENS) -> dict[str, float]:
    """Return the median seconds of a decoded token by way."""
    found = {}
    for way, given in ways(rates).items():
        with Runner(store, plan, rates=given, kind=kind) as runner:
            results = [
                runner.complete(PROMPT, temperature=0, ignore_eos=True, max_new_tokens=tokens, seed=0)
                for _ in range(ROUNDS + 1)
            ]
        found[way] = statistics.median(result.tpot_s for result in results[1:])  # the first one warms up
    return found


def verdict(found: Mapping[str, float]) -> tuple[bool, str]:
    """Return whether the chosen way is the fastest, or nearly, and a line with all of them."""
    right = found[AS_CHOSEN] <= SLOWER * min(found.values())
    times = ", ".join(f"{way} {1e3 * seconds:.2f} ms" for way, seconds in found.items())
    return right, f"{'ok' if right else 'FAILED'}: a token with half of the experts on the host: {times}"


def split_is_fastest(
    plan_of: Callable[[Store], Plan], rates: Rates, kind: str, geometry: Geometry = SIZES
) -> tuple[bool, str]:
    """Return the verdict on a random model; `plan_of` makes its plan from its store."""
    with tempfile.TemporaryDirectory() as scratch:
        store = random_store(Path(scratch), geometry)
        return verdict(seconds_by_way(store, plan_of(store), rates, kind))


def random_store(directory: Path, geometry: Geometry) -> Store:
    """Return the store, in nf4, of a model with random weights and the embedded model's tokenizer."""
    there = directory / "checkpoint"
    there.mkdir()
    sizes = {key: getattr(geometry, name) for name, key in CONFIG_KEYS.items()}
    (there / "config.json").write_text(json.dumps({"model_type": "mixtral", "torch_dtype": "bfloat16", **sizes}))
    for name in TOKENIZER_FILES:
        copyfile(EMBEDDED["tiny"] / name, there / name)
    save_file(dict(random_weights(geometry)), there / "model.safetensors")
    checkpoint = open_checkpoint(LocalSource(there))
    return quantize(checkpoint, directory / "store", layout_for(checkpoint, "nf4", None))


def random_weights(geometry: Geometry) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight by its published name: random numbers that repeat, scaled to keep lengths."""
    pattern = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0))
    shapes: dict[str, tuple[int, ...]] = dict(geometry.dense_tensors)
    for layer in range(geometry.num_layers):
        for expert in range(geometry.num_experts):
            for matrix, (rows, cols) in geometry.expert_matrices.items():
                shapes[expert_key(layer, expert, matrix)] = rows, cols
    for index, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
            continue
        values = (pattern.roll(97 * index) * shape[-1] ** -0.5).bfloat16()
        yield name, values.repeat(-(-prod(shape) // PATTERN))[: prod(shape)].clone().view(shape)
