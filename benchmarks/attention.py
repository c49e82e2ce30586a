"""Time attention in a decode step: qmix's kernel, torch's sdpa in several forms, and reading keys and values once.

    python benchmarks/attention.py --context 4096

One layer, one sequence, bf16, on slices of preallocated caches. All contestants alternate in one process, over the
caches of as many layers as fill 256 MB, so that no processor cache holds the next one. The ceiling is the time that the
same number of threads need to sum the bytes of the same keys and values.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from qmix.model.attention import grouped_sdpa

WIDTH = 128
CACHES = 256e6  # bytes
Attention = Callable[[torch.Tensor, torch.Tensor], object]


@click.command()
@click.option("--context", default=4096, show_default=True)
@click.option("--heads", nargs=2, type=int, default=(48, 8), show_default=True, help="Of queries, of keys.")
@click.option("--threads", default=torch.get_num_threads(), show_default="one a core")
@click.option("--seconds", default=8.0, show_default=True)
@torch.inference_mode()
def main(context: int, heads: tuple[int, int], threads: int, seconds: float) -> None:
    """Print the times and their ratios; last, one line of JSON."""
    torch.set_num_threads(threads)
    query_heads, groups = heads
    layer_bytes = 4 * groups * context * WIDTH
    layers = max(2, -int(-CACHES // layer_bytes))
    made = [torch.empty(2, 1, groups, context + 64, WIDTH, dtype=torch.bfloat16).normal_() for _ in range(layers)]
    caches = [(both[0, :, :, :context], both[1, :, :, :context]) for both in made]
    query = torch.randn(1, query_heads, 1, WIDTH).bfloat16()
    packed, module = query.view(1, groups, -1, WIDTH), nn.Module()
    forms: dict[str, Attention] = {
        "reading alone": lambda key, value: (key.view(torch.int64).sum(), value.view(torch.int64).sum()),
        "qmix": lambda key, value: grouped_sdpa(module, query, key, value, None),
        "sdpa, a group's heads as queries": lambda key, value: F.scaled_dot_product_attention(packed, key, value),
        "sdpa, enable_gqa": lambda key, value: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form(*caches[0])  # compiles and warms up
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, form in forms.items():
            some = caches[:2] if "enable_gqa" in name else caches  # fifty times slower: no cache matters
            start = time.perf_counter()
            for key, value in some:
                form(key, value)
            times[name].append((time.perf_counter() - start) / len(some))

    rounds = len(times["qmix"])
    title = f"{query_heads} on {groups} heads of {WIDTH}, bf16, context {context}, {threads} threads, {rounds} rounds"
    table = Table(title=title)
    for column in ("", "median ms", "min", "max", "GB/s", "of ceiling"):
        table.add_column(column, justify="right")
    medians = {name: statistics.median(values) for name, values in times.items()}
    ceiling = {name: medians["reading alone"] / median for name, median in medians.items()}
    for name, values in times.items():
        figures = [f"{1e3 * t:.3f}" for t in (medians[name], min(values), max(values))]
        table.add_row(name, *figures, f"{layer_bytes / medians[name] / 1e9:.1f}", f"{ceiling[name]:.0%}")
    Console().print(table)
    report = {"context": context, "heads": heads, "threads": threads, "layers": layers, "layer_bytes": layer_bytes}
    print(json.dumps(report | {"seconds": medians, "of_ceiling": ceiling}))


if __name__ == "__main__":
    main()
