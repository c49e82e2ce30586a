"""Time the GPU kernels one by one, each with its ceiling in the same run. Needs one CUDA device and a few GB on it.

    python benchmarks/gpu_kernels.py --model 8x7b --model 8x22b --precision nf4 --tokens 1,2,8,32

A step of few tokens is bound by reading weights: its ceiling is summing as many bytes in torch. Weights rotate over
enough layers that none is in a cache. Many tokens are bound by arithmetic: their ceiling is torch's product of half
precision. "alone" says whether the first token's numbers are, to the bit, those that it has in a step of its own.
Times are medians of CUDA events around replays of a graph. Prints a table, then one JSON line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from rich.console import Console
from rich.table import Table

from qmix.checkpoint.safetensors_header import aligned
from qmix.kernels.gpu import dense, moe, prefill
from qmix.kernels.gpu.shapes import FEW_TOKENS, FOUR_BITS, OLDEST_BF16, ExpertShape, down_splits

SIZES = {"8x7b": (4096, 14336), "8x22b": (6144, 16384)}
EXPERTS, TOP_K, LAYERS, REPLAYS = 8, 2, 4, 20
TURING = torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_BF16
DTYPE = torch.float16 if TURING else torch.bfloat16
ITEMS = {"nf4": 0.53125, "fp4": 0.53125, "int8": 1, "half": 2}  # bytes of a weight with its scales


@dataclass(frozen=True, slots=True)
class Measured:
    """One kernel's time beside its ceiling's."""

    name: str
    tokens: int
    seconds: float
    rate: str
    share: float  # of the ceiling
    alone: bool | None = None


def graph_seconds(work: Callable[[], object]) -> float:
    """Return the median seconds of a replay of a graph of `work`."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[REPLAYS // 2]


def expert_shape(precision: str, hidden: int, inner: int) -> tuple[ExpertShape, int]:
    """Return a record's shape and its bytes."""
    codes, scales, at = [], [], 0
    for rows, columns in ((inner, hidden), (inner, hidden), (hidden, inner)):
        codes.append(at)
        at = aligned(at + int(rows * columns * (0.5 if precision in FOUR_BITS else ITEMS[precision])), 64)
        scales.append(at)
        at = aligned(at + (rows * columns // 32 if precision in FOUR_BITS else rows * 4), 64)
    return ExpertShape(precision, hidden, inner, (codes[0], codes[1], codes[2]), (scales[0], scales[1], scales[2])), at


class Mixture:
    """Records of random numbers of some layers, and steps over them."""

    def __init__(self, precision: str, hidden: int, inner: int) -> None:
        self.shape, nbytes = expert_shape(precision, hidden, inner)
        number = LAYERS * EXPERTS
        self.records = torch.zeros(number, aligned(nbytes, 4096), dtype=torch.uint8, device="cuda")
        for start, rows, columns in zip(self.shape.codes, (inner, inner, hidden), (hidden, hidden, inner), strict=True):
            size = int(rows * columns * (0.5 if precision in FOUR_BITS else ITEMS[precision]))
            self.records[:, start : start + size].random_(0, 128)
        for start, rows in zip(self.shape.scales, (inner, inner, hidden), strict=True):
            if precision in FOUR_BITS:
                size = hidden * inner // 32
                self.records[:, start : start + size].view(torch.bfloat16).fill_(0.01)
            elif precision == "int8":
                self.records[:, start : start + rows * 4].view(torch.float32).fill_(0.01)
        if precision == "half":
            self.records.view(DTYPE).normal_(0, 0.01)
        places = torch.tensor([record.data_ptr() for record in self.records], device="cuda")
        self.addresses = places.view(LAYERS, EXPERTS)
        self.matrix = ITEMS[precision] * hidden * inner

    def step(self, tokens: int) -> tuple[list[torch.Tensor], Callable[[], None], Callable[[], None], bool]:
        """Return the routing of each layer, the launches of gate and up, of down, and `alone`."""
        shape = self.shape
        ids = [torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K).indices for _ in range(LAYERS)]
        groups = [moe.group(each, EXPERTS) if tokens > FEW_TOKENS else None for each in ids]
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(tokens, shape.hidden, dtype=DTYPE, device="cuda", generator=generator)
        inner = x.new_empty(tokens * TOP_K, shape.inner)
        parts = x.new_empty(down_splits(shape.inner), tokens * TOP_K, shape.hidden, dtype=torch.float32)

        def up() -> None:
            for layer in range(LAYERS):
                moe.gate_up(shape, self.addresses[layer], ids[layer], x, inner, groups[layer])

        def down() -> None:
            for layer in range(LAYERS):
                moe.down(shape, self.addresses[layer], ids[layer], inner, parts, groups[layer])

        def once() -> None:
            moe.gate_up(shape, self.addresses[0], ids[0], x, inner, groups[0])
            moe.down(shape, self.addresses[0], ids[0], inner, parts, groups[0])

        once()
        together = parts[:, :TOP_K].clone()
        alone = torch.full_like(together, float("nan"))
        moe.gate_up(shape, self.addresses[0], ids[0][:1], x[:1], inner[:TOP_K])
        moe.down(shape, self.addresses[0], ids[0][:1], inner[:TOP_K], alone)
        return ids, up, down, torch.equal(together, alone)


def measure_steps(name: str, mixture: Mixture, tokens: int, read: float) -> list[Measured]:
    """Time gate and up, and down, of `tokens` tokens; `read` is the ceiling in bytes a second."""
    ids, up, down, same = mixture.step(tokens)
    used = sum(len(each.unique()) for each in ids) / LAYERS
    found = []
    for kernel, work, matrices in (("gate+up", up, 2), ("down", down, 1)):
        seconds = graph_seconds(work) / LAYERS
        rate = used * matrices * mixture.matrix / seconds
        title = f"{name} {mixture.shape.precision} {kernel}, {used:.1f} experts"
        found.append(Measured(title, tokens, seconds, f"{rate / 1e9:.0f} GB/s", rate / read, same))
    return found


def measure_many(name: str, mixture: Mixture, tokens: int, flops: float) -> list[Measured]:
    """Time one expert with many tokens, in place and by way of a buffer; `flops` is the ceiling a second."""
    shape, record = mixture.shape, mixture.records[0]
    x = torch.randn(tokens, shape.hidden, dtype=DTYPE, device="cuda")
    buffer = x.new_empty(shape.hidden * shape.inner)
    work = 6 * tokens * shape.hidden * shape.inner
    ways = {
        "in place": lambda: prefill.in_place(shape, record, x),
        "by torch.mm": lambda: prefill.forward(shape, record, x, buffer),
    }
    found = []
    for way, run in ways.items():
        seconds = graph_seconds(run)
        rate = f"{work / seconds / 1e12:.0f} TFLOP/s"
        found.append(Measured(f"{name} {shape.precision} expert {way}", tokens, seconds, rate, work / seconds / flops))
    return found


def measure_dense(name: str, hidden: int, tokens: int, read: float) -> Measured:
    """Time the product with the weights of queries, keys and values, which rotate."""
    weights = [torch.randn(hidden * 3 // 2, hidden, dtype=DTYPE, device="cuda") for _ in range(16)]
    x = torch.randn(tokens, hidden, dtype=DTYPE, device="cuda")
    out = x.new_empty(tokens, len(weights[0]))

    def work() -> None:
        for weight in weights:
            dense.linear(x, weight, out)

    seconds = graph_seconds(work) / len(weights)
    rate = weights[0].numel() * 2 / seconds
    return Measured(f"{name} dense {hidden * 3 // 2}x{hidden}", tokens, seconds, f"{rate / 1e9:.0f} GB/s", rate / read)


def ceilings() -> tuple[float, float]:
    """Return the bytes a second of a sum, and the operations a second of a product of half precision."""
    block = torch.zeros(2**28, dtype=torch.int64, device="cuda")
    read = block.numel() * 8 / graph_seconds(block.sum)
    a = torch.randn(4096, 4096, dtype=DTYPE, device="cuda")
    return read, 2 * 4096**3 / graph_seconds(lambda: a @ a)


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(SIZES)), default=("8x7b", "8x22b"))
@click.option("--precision", "precisions", multiple=True, type=click.Choice(list(ITEMS)), default=("nf4",))
@click.option("--tokens", default="1,2,8,32", help="tokens of a step")
@click.option("--many", default="16,64,256", help="tokens of an expert")
def main(models: tuple[str, ...], precisions: tuple[str, ...], tokens: str, many: str) -> None:
    read, flops = ceilings()
    found = []
    for model in models:
        hidden, inner = SIZES[model]
        found += [measure_dense(model, hidden, int(count), read) for count in tokens.split(",")]
        for precision in precisions:
            mixture = Mixture(precision, hidden, inner)
            for count in tokens.split(","):
                found += measure_steps(model, mixture, int(count), read)
            for count in many.split(","):
                found += measure_many(model, mixture, int(count), flops)
            del mixture
    card = torch.cuda.get_device_name()
    title = f"{card}, torch {torch.__version__}: reads {read / 1e9:.0f} GB/s, multiplies {flops / 1e12:.0f} TFLOP/s"
    table = Table("kernel", "tokens", "microseconds", "rate", "of the ceiling", "alone", title=title)
    for row in found:
        alone = "" if row.alone is None else "equal" if row.alone else "differs"
        table.add_row(row.name, str(row.tokens), f"{row.seconds * 1e6:.1f}", row.rate, f"{row.share:.0%}", alone)
    Console().print(table)
    rows = [{"kernel": row.name, "tokens": row.tokens, "seconds": row.seconds, "share": row.share} for row in found]
    print(json.dumps({"card": card, "read": read, "flops": flops, "kernels": rows}))


if __name__ == "__main__":
    main()
