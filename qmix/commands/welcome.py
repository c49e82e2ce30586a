"""`qmix` without arguments on a terminal: what this machine can run, and the command to type next."""

from __future__ import annotations

import os
import shlex

from qmix.errors import DoesNotFitError
from qmix.units import format_bytes, plural

FIRST = "mistralai/Mixtral-8x7B-Instruct-v0.1"
MODELS = ("mixtral-8x7b", "mixtral-8x22b")
PYTHON_BYTES = 700_000_000  # with the libraries and kernels, until that was measured here


def welcome() -> list[str]:
    """Return five lines: the machine, a plan for each model, the source of the rates, and the next command.

    Measures nothing: Python's own memory is assumed where no command has measured it yet.
    """
    from qmix.machine.found import cpu_name
    from qmix.plan.here import this_machine

    machine = this_machine()
    gpus = f"GPUs of {', '.join(map(format_bytes, machine.gpus))} free" if machine.gpus else "no GPU"
    cores = plural(len(os.sched_getaffinity(0)), "core")
    width = max(map(len, MODELS))
    measured = bool(machine.rates.measured)
    rates = "as measured on this machine" if measured else "typical; `qmix doctor` measures this machine, in a minute"
    return [
        f"{cpu_name()}, {cores}, {format_bytes(machine.ram)} of RAM to use, {gpus}",
        *(f"{name:<{width}}  {_outlook(name, machine)}" for name in MODELS),
        f"rates: {rates}",
        f"next: {_next(measured)}  (qmix --help lists all commands)",
    ]


def _outlook(name: str, machine: object) -> str:
    """Return how a published model would run in nf4, or why it would not."""
    from qmix.machine.found import known_interpreter_memory
    from qmix.machine.rates import Machine
    from qmix.plan import predict
    from qmix.plan.device_memory import CUDA_CONTEXT_BYTES
    from qmix.plan.here import default_context
    from qmix.plan.make import make_plan
    from qmix.plan.target import target_of

    assert isinstance(machine, Machine)
    layout = target_of(name, None, None).layout
    own = known_interpreter_memory(kernels=True) or PYTHON_BYTES
    cuda = machine.cuda or CUDA_CONTEXT_BYTES
    context = default_context(layout.geometry)
    try:
        plan = make_plan(
            layout, machine.ram, context, own, "sdpa", 1, gpus=machine.gpus, rates=machine.speeds, use=None, cuda=cuda
        )
    except DoesNotFitError as error:
        return f"does not fit; needs {format_bytes(error.smallest)} of RAM"
    speed = predict(plan, layout, machine.speeds).decode
    disk = f"{format_bytes(layout.total_bytes)} of disk"
    if machine.disk is not None and layout.total_bytes > machine.disk:
        disk += f" ({format_bytes(machine.disk)} free)"
    there = plan.num_records - plan.records_on_disk
    return f"{speed.rate:.2g} tok/s, {there} of {plan.num_records} experts in memory, {disk}"


def _next(measured: bool) -> str:
    """Return the command that a person would type next."""
    from qmix.disk.places import cache_directory
    from qmix.store.listing import stores_in

    whole = [entry for entry in stores_in(cache_directory()) if entry.state == "whole" and entry.precision == "nf4"]
    ready = [entry.model for entry in whole if entry.model != "tiny"]
    if ready:
        return f"qmix chat {shlex.quote(ready[0])}"
    return f"qmix pull {FIRST}" if measured else "qmix doctor"
