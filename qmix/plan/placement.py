"""Choose which tier holds which layer and expert. Pure and deterministic; loads no torch.

Layers stay in order: first the layers that fit no GPU, on the CPU, then a run of layers on each GPU. A GPU holds its
layers' dense weights and cache, the work space of a step, and as many of its layers' most used experts as fit; so each
layer's experts are near it. Of all such cuts, the one with the fastest predicted answer to a prompt is taken. More of
any budget leaves every cut possible and makes none slower, so it never makes the best one slower.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from qmix.machine.rates import Rates
from qmix.plan.demand import Arrangement, Demand, Holding, StepUse
from qmix.plan.device_memory import CUDA_CONTEXT_BYTES, device_work_bytes, usable_device_bytes
from qmix.plan.memory import PREFILL_CHUNK
from qmix.plan.plan import DevicePlan
from qmix.plan.predict import seconds_of
from qmix.plan.traffic import decode_load, prefill_load

JOB = (512, 128)  # tokens of the prompt and the answer that arrangements are compared by

Cut = tuple[int, ...]  # where each GPU's layers begin, and at the end the number of layers
# From layers on the CPU and the bytes of each record on no GPU, most used first, to slots; None where too few fit.
SlotsFor = Callable[[int, list[int]], dict[int, int] | None]


def arrange(
    demand: Demand, gpus: Sequence[int], slots_for: SlotsFor, rates: Rates, cuda: int = CUDA_CONTEXT_BYTES
) -> Arrangement | None:
    """Return the arrangement with the fastest predicted JOB under the GPUs' budgets; None where none fits the host.

    `cuda` are the bytes of CUDA's context on each GPU.

    Of equals, return the one with the fewest layers on the CPU, then the one that follows the GPUs' sizes best.
    """
    best: tuple[tuple[float, int, float], Arrangement] | None = None
    holdings = _Holdings(demand, gpus, cuda)
    prompt, new = (min(tokens, demand.context) for tokens in JOB)
    step, chunk = StepUse.of(demand, demand.batch), StepUse.of(demand, prompt)
    for cut in _cuts(demand.geometry.num_layers, gpus):
        held = holdings.of(cut)
        if held is None:
            continue
        bare = Arrangement(cut[0], held, {}, demand)
        slots = slots_for(cut[0], bare.wanted)
        if slots is None:
            continue
        found = replace(bare, slots=slots)
        seconds = new * seconds_of(decode_load(found, step), rates)
        seconds += seconds_of(prefill_load(found, chunk, prompt), rates)
        uneven = max((each.last - each.first) / each.plan.budget for each in held) if held else 0.0
        key = (seconds, cut[0], uneven)
        if best is None or key < best[0]:
            best = key, found
    return best[1] if best else None


def _cuts(layers: int, gpus: Sequence[int]) -> Iterator[Cut]:
    """Yield every way to share layers out, for up to two GPUs; for more, only in proportion to their sizes."""
    if not gpus:
        yield (layers,)
        return
    for cpu in range(layers + 1):
        if len(gpus) == 1:
            yield cpu, layers
        elif len(gpus) == 2:
            yield from ((cpu, middle, layers) for middle in range(cpu, layers + 1))
        else:
            shares = accumulate(gpus[:-1])
            yield cpu, *(cpu + round((layers - cpu) * share / sum(gpus)) for share in shares), layers


class _Holdings:
    """The holding of each GPU for each run of layers, worked out once."""

    def __init__(self, demand: Demand, gpus: Sequence[int], cuda: int) -> None:
        self.demand, self.gpus, self.cuda = demand, gpus, cuda
        self.prefill = min(map(demand.device_prefill, gpus), default=PREFILL_CHUNK)
        self._found: dict[tuple[int, int, int], Holding | None] = {}
        self._works: dict[tuple[bool, bool], int] = {}
        self._runs: dict[tuple[int, int], tuple[list[int], list[int]]] = {}

    def of(self, cut: Cut) -> tuple[Holding, ...] | None:
        """Return the holding of every GPU that a cut uses; None where one of them is too small."""
        found = []
        for key in ((gpu, *run) for gpu, run in enumerate(pairwise(cut)) if run[0] < run[1]):
            if key not in self._found:
                self._found[key] = self._holding(*key)
            held = self._found[key]
            if held is None:
                return None
            found.append(held)
        return tuple(found)

    def _holding(self, gpu: int, first: int, last: int) -> Holding | None:
        demand, budget = self.demand, self.gpus[gpu]
        dense, cache = demand.dense_of(first, last), demand.layer_kv * (last - first)
        for uploads in (False, True):  # no record is copied where all experts are residents
            work = self._work(last == demand.geometry.num_layers, uploads)
            room = usable_device_bytes(budget, self.cuda) - dense - cache - work
            if room < 0:
                continue
            ranks, sizes = self._run(first, last)
            count = bisect_right(sizes, room)
            if uploads or count == len(sizes):
                experts = sizes[count - 1] if count else 0
                plan = DevicePlan(f"gpu:{gpu}", budget, dense, cache, experts, work, self.cuda)
                return Holding(first, last, plan, ranks[count - 1] if count else -1)
        return None

    def _run(self, first: int, last: int) -> tuple[list[int], list[int]]:
        """Return the ranks of these layers' experts, and the bytes on a GPU of the first, the first two, and so on."""
        if (first, last) not in self._runs:
            demand = self.demand
            sizes, precisions, order = demand.device_bytes, demand.layout.precisions, demand.order
            ranks = [rank for rank, (layer, _) in enumerate(order) if first <= layer < last]
            mine = (order[rank] for rank in ranks)
            taken = list(accumulate(sizes[precisions[layer][expert]] for layer, expert in mine))
            self._runs[first, last] = ranks, taken
        return self._runs[first, last]

    def _work(self, ends: bool, uploads: bool) -> int:
        """Return the work space of a GPU, with the head where the layers end there."""
        if (ends, uploads) not in self._works:
            demand = self.demand
            self._works[ends, uploads] = device_work_bytes(
                demand.geometry,
                demand.chunk,
                demand.context,
                demand.attention,
                demand.batch,
                precisions=tuple(demand.layout.records),
                dtype=demand.layout.dtype,
                last=ends,
                uploads=uploads,
                prefill=self.prefill,
            )
        return self._works[ends, uploads]
