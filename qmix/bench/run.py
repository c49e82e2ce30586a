"""Speed of a model on this machine under a budget, beside the least time that disk, memory and cores would take.

Prompts are random token ids, other ones in each repetition; answers are greedy and go on past the end of text. `pp`
is timed from the prompt to its first new token, `tg` from that to the last. The least time counts what the very run
needed: its routing is recorded, and Belady's optimum over it, from the best start, is what had to be read.
"""

from __future__ import annotations

import platform
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from qmix.bench.report import BenchReport, Row, Sample
from qmix.bench.roofline import Bound, Workload, bound, decode_cost, prefill_cost
from qmix.engine.opener import Runner
from qmix.engine.resolve import prepare_store
from qmix.engine.stream import compute_threads
from qmix.errors import UsageError
from qmix.machine.found import cpu_name
from qmix.machine.probes import MATMUL_SIZES, MEMORY_BYTES, Ceilings, DiskProbe, MatmulProbe, MemoryProbe
from qmix.model.build import check_attention
from qmix.plan import Plan
from qmix.plan.file import PlanFile
from qmix.plan.here import plan_for
from qmix.plan.memory import PREFILL_CHUNK
from qmix.pool.counters import PoolCounters
from qmix.pool.eviction import Key
from qmix.pool.trace import as_trace, recorded
from qmix.precision.matmul import has_kernels
from qmix.progress import OnProgress, ignore
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout, precision_of
from qmix.store.opened import Store
from qmix.version import __version__

WARM_UP_STEPS = 16  # decode steps that are not timed
DISK_BYTES = 64 * 2**20  # taken by a slice of disk reads
PRODUCT_BYTES = 4 * 2 * MATMUL_SIZES[0] ** 2  # taken by a slice of products: three matrices, and one repacked
Probe = DiskProbe | MatmulProbe | MemoryProbe
STACK = ("torch", "bitsandbytes", "transformers")


def prepare(
    model: str | Path,
    workloads: Sequence[Workload],
    *,
    ram: int | str | None = None,
    context: int | None = None,
    precision: str | None = None,
    clip: bool = False,
    dtype: str | None = None,
    attention: str = "sdpa",
    plan: PlanFile | None = None,
    on_progress: OnProgress = ignore,
) -> tuple[Store, Plan]:
    """A model's store, made first if there is none, and the plan for these workloads; no weights are loaded.

    Without `context` it is what the longest workload takes. `plan` is in place of `ram` and `context`. Raises
    QmixError as `qmix.load` does.
    """
    check_attention(attention)

    def planned(layout: StoreLayout, fingerprint: str | None = None, use: ExpertFrequency | None = None) -> Plan:
        if plan is not None:
            check_context(workloads, plan.plan.context, "the plan's is", "make a plan with a larger one")
            return plan.plan_of(layout, fingerprint, attention)
        if context is None:
            check_context(workloads, layout.geometry.max_position, "the model's longest is", "give fewer tokens")
        else:
            check_context(workloads, context, "--context is", "give a larger one, or fewer tokens")
        tokens = context or max(workload.context for workload in workloads)
        return plan_for(layout, ram, tokens, attention, use=use)

    spec = plan.precision if plan is not None and precision is None else precision
    store = prepare_store(model, spec, dtype, on_progress, planned, clip)
    return store, planned(store.layout, store.fingerprint, store.use)


def check_context(workloads: Sequence[Workload], context: int, which: str, advice: str) -> None:
    """Raises UsageError where a workload takes a longer context than there is."""
    for workload in workloads:
        if workload.context > context:
            needed = f"{workload.name}: takes a context of {workload.context}"
            raise UsageError(f"{needed}, and {which} {context}; {advice}")


def measure(
    runner: Runner,
    workloads: Sequence[Workload],
    repetitions: int,
    machine: Ceilings,
    tell: Callable[[str], None] = lambda line: None,
) -> BenchReport:
    """Time each workload after a warm-up.

    `machine` is `qmix.machine.probes.probe_in_child()`, taken before the runner took its memory. Where the plan leaves
    room for it, and for the disk where it is needed, ceilings are measured anew before, between and after the
    repetitions, and their medians are what the rows are compared with.
    """
    check_context(workloads, runner.plan.context, "the runner's is", "load the model with a larger one")
    store, samples = runner.store, []
    with _probed(runner) as probes, _watched(runner) as watch:
        for workload in workloads:
            samples.append(_repeat(watch, workload, repetitions, probes, tell))
        for probe in probes.values():
            probe.slice()
        machine = replace(machine, **{name: probe.rate() for name, probe in probes.items()})
    rows = [Row(workload, mine, _bounds(mine, machine)) for workload, mine in zip(workloads, samples, strict=True)]
    return BenchReport(
        model=store.source_name,
        precision=precision_of(store.layout),
        dtype=store.layout.dtype,
        plan=runner.plan,
        peak_memory=watch.peak_memory,
        cpu=cpu_name(),
        threads=compute_threads(store.geometry),
        fast_kernels=has_kernels(store.layout.records, store.geometry.expert_matrices.values()),
        versions={"qmix": __version__, "python": platform.python_version()} | {name: version(name) for name in STACK},
        ceilings=machine,
        rows=tuple(rows),
    )


@dataclass(slots=True)
class _Watch:
    """Runs workloads and notes the routing, and for each forward pass where it begins."""

    runner: Runner
    steps: list[list[Key]]
    passes: list[tuple[int, PoolCounters]]  # steps so far, and the pool's counters, before each pass
    peak_memory: int = 0

    def run(self, workload: Workload, seed: int) -> Sample:
        self.steps.clear()
        self.passes.clear()
        count = workload.decode_steps
        result = self.runner.complete(
            random_prompt(self.runner, workload.prompt_tokens, seed),
            temperature=0,
            ignore_eos=True,
            max_new_tokens=count + 1,
            seed=0,
        )
        chunks = -(-workload.prompt_tokens // PREFILL_CHUNK)
        assert len(self.passes) == chunks + count
        step, before = self.passes[chunks if count else 0]
        used = self.runner.pool.counters.since(before)
        self.peak_memory = max(self.peak_memory, result.peak_memory)
        least, layout = decode_cost if count else prefill_cost, self.runner.store.layout
        trace = as_trace(self.steps[step:], layout.geometry.num_layers)
        return Sample(
            ttft_s=result.ttft_s,
            tpot_s=result.tpot_s if count else None,
            rate=result.rate if count else result.prompt_rate,
            hit_rate=used.hit_rate,
            bytes_read=used.bytes_read,
            cost=least(workload, layout, trace, self.runner.pool.slots),
        )


@contextmanager
def _probed(runner: Runner) -> Iterator[dict[str, Probe]]:
    """Probes that take no memory beyond the plan's, by the name of the ceiling that they measure.

    Between runs the work space of a step is free; half of it is left to the allocator.
    """
    probes: dict[str, Probe] = {}
    room = runner.plan.work // 2
    if room >= PRODUCT_BYTES:
        probes["matmul"] = MatmulProbe(MATMUL_SIZES[0])
    if runner.pool.memory.nbytes >= MEMORY_BYTES:
        probes["memory_read"] = MemoryProbe(runner.pool.memory[:MEMORY_BYTES])
    if runner.pool.holds_all:
        yield probes
        return
    with DiskProbe.of_store(runner.store, min(DISK_BYTES, room)) as disk:
        yield probes | {"disk_read": disk}


@contextmanager
def _watched(runner: Runner) -> Iterator[_Watch]:
    with recorded(runner.pool) as steps:
        watch = _Watch(runner, steps, [])

        def note(*_: object) -> None:
            watch.passes.append((len(steps), runner.pool.counters.copy()))

        hook = runner.model.register_forward_pre_hook(note)
        try:
            yield watch
        finally:
            hook.remove()


def _repeat(
    watch: _Watch,
    workload: Workload,
    repetitions: int,
    probes: Mapping[str, Probe],
    tell: Callable[[str], None],
) -> tuple[Sample, ...]:
    tell(f"{workload.name}: warming up")
    short = Workload(min(workload.prompt_tokens, PREFILL_CHUNK), min(workload.decode_steps, WARM_UP_STEPS))
    watch.run(short, 0)
    samples = []
    for repetition in range(1, repetitions + 1):
        for probe in probes.values():
            probe.slice()
        samples.append(watch.run(workload, repetition))
        tell(f"{workload.name}: {repetition} of {repetitions}, {samples[-1].rate:.2f} tok/s")
    return tuple(samples)


def _bounds(samples: Sequence[Sample], machine: Ceilings) -> tuple[Bound, ...]:
    disk = None if machine.disk_read is None else machine.disk_read.median
    return tuple(bound(sample.cost, machine.memory_read.median, disk, machine.matmul.median) for sample in samples)


def random_prompt(runner: Runner, tokens: int, seed: int) -> list[int]:
    """Token ids of the model's vocabulary, special ones left out."""
    special = set(runner.tokenizer.all_special_ids)
    known = min(len(runner.tokenizer), runner.store.geometry.vocab_size)
    return random.Random(seed).choices([token for token in range(known) if token not in special], k=tokens)
