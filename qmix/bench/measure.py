"""Measure the speed of a model under a memory budget and compare it with the least time of disk, memory and cores.

Prompts are random token ids, different in each repetition; answers are greedy and continue past the end of text. `pp`
is timed from the prompt to its first new token, `tg` from there to the last. The least time is that of the same run:
its routing is recorded, and the least bytes to read are those of Belady's optimum from the best start.
"""

from __future__ import annotations

import platform
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qmix.bench.report import BenchReport, Row, Sample
from qmix.bench.roofline import Bound, GpuRates, OnGpus, Workload, bound, decode_cost, prefill_cost
from qmix.engine.compute import compute_threads
from qmix.engine.load import check_attention
from qmix.engine.resolve import prepare_store
from qmix.engine.stream import Runner
from qmix.errors import UsageError, arg
from qmix.machine.ceilings import Ceilings
from qmix.machine.found import cpu_name
from qmix.machine.probes import MATMUL_SIZES, MEMORY_BYTES, DiskProbe, MatmulProbe, MemoryProbe
from qmix.plan import Plan
from qmix.plan.file import PlanFile
from qmix.plan.here import Gpus, plan_for, run_machine
from qmix.plan.memory import PREFILL_CHUNK
from qmix.pool.counters import PoolCounters
from qmix.pool.eviction import Key
from qmix.pool.trace import as_trace, recorded
from qmix.precision.quantised import has_kernels
from qmix.progress import OnProgress, ignore
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout, precision_of
from qmix.store.opened import Store
from qmix.version import __version__

WARM_UP_STEPS = 16  # decode steps before timing
DISK_BYTES = 64 * 2**20  # memory for a slice of disk reads
PRODUCT_BYTES = 4 * 2 * MATMUL_SIZES[0] ** 2  # memory for a slice of products: three matrices, and one repacked
Probe = DiskProbe | MatmulProbe | MemoryProbe
STACK = ("torch", "bitsandbytes", "transformers")


def prepare(
    model: str | Path,
    workloads: Sequence[Workload],
    *,
    ram: int | str | None = None,
    gpu: Gpus = None,
    context: int | None = None,
    precision: str | None = None,
    clip: bool = False,
    dtype: str | None = None,
    attention: str = "sdpa",
    plan: PlanFile | None = None,
    on_progress: OnProgress = ignore,
) -> tuple[Store, Plan]:
    """Return a model's store, quantised first if there is none, and the plan for these workloads. Loads no weights.

    The default `context` is that of the longest workload. `plan` replaces `ram`, `gpu` and `context`. Raises QmixError
    as `qmix.load` does.
    """
    check_attention(attention)
    machine = run_machine(ram, gpu)

    def planned(layout: StoreLayout, fingerprint: str | None = None, use: ExpertFrequency | None = None) -> Plan:
        if plan is not None:
            check_context(workloads, plan.plan.context, "the plan's is", "make a plan with a larger one")
            return plan.plan_of(layout, fingerprint, attention)
        if context is None:
            check_context(workloads, layout.geometry.max_position, "the model's longest is", "give fewer tokens")
        else:
            check_context(workloads, context, f"{arg('context')} is", "give a larger one, or fewer tokens")
        tokens = context or max(workload.context for workload in workloads)
        return plan_for(layout, None, tokens, attention, machine=machine, use=use)

    spec = plan.precision if plan is not None and precision is None else precision
    store = prepare_store(model, spec, dtype, on_progress, planned, clip)
    return store, planned(store.layout, store.fingerprint, store.use)


def check_context(workloads: Sequence[Workload], context: int, which: str, advice: str) -> None:
    """Raise UsageError if a workload takes more than `context` tokens."""
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

    `machine` is the result of `qmix.machine.ceilings.probe_in_child()`, measured before the runner takes its memory. If
    the plan leaves room, ceilings are measured again before, between and after the repetitions (the disk's only if the
    run reads from it), and the rows are compared with their medians.
    """
    check_context(workloads, runner.plan.context, "the runner's is", "load the model with a larger one")
    store, samples = runner.store, []
    with _probed(runner) as probes, _watched(runner) as watch:
        for workload in workloads:
            samples.append(_repeat(watch, workload, repetitions, probes, tell))
        for probe in probes.values():
            probe.slice()
        rates: dict[str, Any] = {name: probe.rate() for name, probe in probes.items()}
        machine = replace(machine, **rates)
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
    """Runs workloads, and records the routing and the start of each forward pass."""

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
            cost=least(workload, layout, trace, self.runner.pool.slots, OnGpus.of(self.runner.plan, layout)),
        )


@contextmanager
def _probed(runner: Runner) -> Iterator[dict[str, Probe]]:
    """Yield probes that need no memory beyond the plan's, by the name of their ceiling.

    Between runs the work space of a step is free; they use half of it and leave the rest to the allocator.
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
    memory, matmul, gpus = machine.memory_read.median, machine.matmul.median, _gpu_rates(machine)
    return tuple(bound(sample.cost, memory, disk, matmul, gpus) for sample in samples)


def _gpu_rates(machine: Ceilings) -> GpuRates:
    """Return the best that all GPUs together reached."""
    sums = [sum(max(gpu[name].rounds) for gpu in machine.gpus) for name in ("gpu_memory", "pcie", "gpu_matmul")]
    return GpuRates(*sums)


def random_prompt(runner: Runner, tokens: int, seed: int) -> list[int]:
    """Return random token ids of the model's vocabulary without special tokens."""
    special = set(runner.tokenizer.all_special_ids)
    known = min(len(runner.tokenizer), runner.store.geometry.vocab_size)
    return random.Random(seed).choices([token for token in range(known) if token not in special], k=tokens)
