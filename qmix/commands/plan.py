"""`qmix plan`: where the parts of a model lie, and how fast it runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.options import (
    attention_option,
    budget_option,
    context_option,
    dtype_option,
    gpu_option,
    profile_option,
    ram_option,
)
from qmix.commands.parameters import Rate, Size, speak_as
from qmix.commands.shared import model_or_default, out, quiet_libraries, read_profile_option, refuse, warn_of_drive
from qmix.disk.places import cache_directory
from qmix.errors import DoesNotFitError, UsageError, arg
from qmix.units import parse_bytes, size_option

if TYPE_CHECKING:
    from qmix.machine.rates import Machine
    from qmix.plan.target import PlanTarget
    from qmix.planner.planned import Planned
    from qmix.verify.rehearsal import Verification

PRECISION_HELP = "as for `quantize`, or `auto`: chosen by the profile"
RATES = {  # option: name of the rate, whether in FLOP/s, help
    "--disk-read": ("disk_read", False, "disk reads, such as 3.5GB/s"),
    "--memory-read": ("memory_read", False, "memory bandwidth, such as 60GB/s"),
    "--pcie": ("pcie", False, "memory to GPU, such as 25GB/s"),
    "--gpu-memory": ("gpu_memory", False, "GPU memory bandwidth, such as 900GB/s"),
    "--gpu-matmul": ("gpu_matmul", True, "GPU matmul in half precision, such as 80TFLOP/s"),
}
OF_GPUS = ("pcie", "gpu_memory", "gpu_matmul")
COMPARE_HELP = "compare machines, each as GPUs,RAM, such as 24GiB+24GiB,64GiB or 4090,64GiB; repeatable"


def _rate_options(command: Any) -> Any:
    for option, (name, flops, text) in reversed(RATES.items()):
        command = click.option(option, name, type=Rate(flops), metavar="RATE", help=text)(command)
    return command


@click.command()
@click.argument("model", required=False)
@ram_option
@gpu_option
@click.option("--disk", type=Size(), metavar="SIZE", help="disk space for the store [what is free]")
@_rate_options
@context_option
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="sequences decoded together")
@click.option("--precision", metavar="SPEC", help=PRECISION_HELP)
@dtype_option
@attention_option
@profile_option
@budget_option
@click.option("--compare", multiple=True, metavar="MACHINE", help=COMPARE_HELP)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="also draw the plan to a .png or .svg file"
)
@click.option(
    "--verify", is_flag=True, help="run the model at full size on pretend devices and check the planned bytes"
)
@click.option("--json", "as_json", is_flag=True, help="print the plan as JSON, for --plan of other commands")
def plan(model: str | None, as_json: bool, **options: Any) -> None:
    """Plan what lies where on a machine, and predict its speed.

    Reads no weights. MODEL may also be mixtral-8x7b or mixtral-8x22b, which need no download. Values of the machine
    that are not given are those of this one. Exit code 3 if the model does not fit; then the nearest plan is shown.
    """
    plot = _plot_target(options["plot"])
    if options["compare"]:
        refuse(("ram", "gpu", "verify"), "not used with --compare, which names each machine's own")
    machine = _machine(options)
    machines = {text: _compared(text, machine) for text in options["compare"]}
    if not any(each.gpus for each in machines.values() or [machine]):
        refuse(OF_GPUS, "there is no GPU in this plan; give --gpu")
    name = model_or_default(model)
    subject, precision = _subject(name, options)
    how = {"batch": options["batch"], "attention": options["attn"], "precision": precision}
    if machines:
        _compare(subject, machines, options, how, as_json, plot)
        return
    warn_of_drive(Path(name).expanduser() if subject.is_store else cache_directory())
    if options["disk"] is None and not subject.is_store:
        _warn_of_disk(subject, machine)
    planned, refusal = _planned(subject, machine, options, how)
    verified = _verified(planned) if options["verify"] else None
    if as_json:
        out(json.dumps(_whole_content(planned, verified, refusal)) + "\n")
    else:
        _show(planned, name if refusal is None else f"{name}: the nearest plan that fits")
    if verified is not None:
        if not as_json:
            from qmix.terminal.tables import print_table
            from qmix.verify.view import verification_table

            print_table(verification_table(verified))
        verified.check()
    if refusal is not None:
        raise refusal
    if plot is not None:
        from qmix.planner.plot import draw

        draw(planned, plot)


def _whole_content(planned: Planned, verified: Any, refusal: DoesNotFitError | None) -> dict[str, Any]:
    """Return the JSON of a plan, with what its verification found; of the nearest plan where it does not fit."""
    content = _content(planned)
    if verified is not None:
        from qmix.verify.view import to_json

        content["verified"] = to_json(verified)
    if refusal is None:
        return content
    return {"schema": content["schema"], "fits": False, "smallest": refusal.smallest, "nearest": content}


def _planned(
    subject: PlanTarget, machine: Machine, options: dict[str, Any], how: dict[str, Any]
) -> tuple[Planned, DoesNotFitError | None]:
    """Return the plan and None, or the nearest plan that fits and the error of this one."""
    from qmix.planner.planned import check_disk, nearest, plan_on

    try:
        planned = plan_on(subject, machine, options["context"], **how)
        if options["disk"] is not None:
            check_disk(planned)
        return planned, None
    except DoesNotFitError as error:
        return nearest(subject, machine, max(error.smallest, 1), options["context"], **how), error


def _verified(planned: Planned) -> Verification:
    """Run the plan on pretend devices, which takes a minute for the largest models."""
    quiet_libraries()
    from qmix.terminal.voice import say
    from qmix.verify.rehearsal import verify

    say("running the model on pretend devices, at full size ...")
    return verify(planned.plan, planned.subject.layout, planned.attention, planned.machine.speeds)


def _show(planned: Planned, title: str) -> None:
    from rich.text import Text

    from qmix.planner.view import details, device_table
    from qmix.terminal.expert_map import ExpertMap
    from qmix.terminal.tables import print_table

    placed = ExpertMap(planned.plan.placement)
    print_table(Text(title), device_table(planned.plan), placed, details(planned))
    out("run it:\n" + "".join(f"  {line}\n" for line in run_lines(planned)))  # not wrapped, so that it can be copied


def _content(planned: Planned) -> dict[str, Any]:
    return planned.to_json() | {"commands": run_lines(planned)}


def run_lines(planned: Planned) -> list[str]:
    """Return shell lines that run a plan."""
    from qmix.models.published import PUBLISHED

    plan, name = planned.plan, planned.subject.name
    model = shlex.quote(PUBLISHED[name].hub_id if name in PUBLISHED else name)
    gpus = "".join(f" --gpu {size_option(budget, up=False)}" for budget in planned.machine.gpus) if plan.devices else ""
    limits = f"--ram {size_option(plan.ram)}{gpus} --context {plan.context}"
    if planned.precision is not None:
        limits += f" --precision {shlex.quote(planned.precision)}"
    attention = "" if planned.attention == "sdpa" else f" --attn {planned.attention}"
    return [f"qmix generate -m {model} {limits}{attention}"]


def _machine(options: dict[str, Any]) -> Machine:
    """Return this machine, with given values in place of those found."""
    from dataclasses import replace

    from qmix.plan.here import this_machine

    found = this_machine(options["ram"], options["gpu"] or None)
    stated = {name: options[name] for name, _, _ in RATES.values() if options[name] is not None}
    disk = found.disk if options["disk"] is None else options["disk"]
    return replace(found, rates=found.rates.with_stated(stated), disk=disk)


def _compared(text: str, machine: Machine) -> Machine:
    """Return the machine that a value of `--compare` names: 24GiB+24GiB,64GiB, RTX 4090,64GiB, or 128GiB alone."""
    from dataclasses import replace

    from qmix.plan.here import this_machine

    named, comma, ram = text.rpartition(",")
    memory = _size("--compare", ram)
    try:
        found = this_machine(memory, named.split("+") if comma else ("none",))
    except UsageError as error:
        raise UsageError(f"--compare: {error.message}".replace(f"{arg('gpu')}: ", "")) from None
    stated = {name: getattr(machine.rates, name) for name in machine.rates.stated}
    return replace(found, rates=found.rates.with_stated(stated), disk=machine.disk)


def _size(option: str, text: str) -> int:
    speak_as(text)
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None


def _subject(name: str, options: dict[str, Any]) -> tuple[PlanTarget, str | None]:
    """Return the model, calibrated by the profile if there is one, and its precision as --precision takes it."""
    from qmix.plan.target import target_of

    path, precision, budget = options["profile"], options["precision"], options["budget"]
    profile = read_profile_option(path, precision, budget)
    if profile is None:
        return target_of(name, precision, options["dtype"]), precision
    from qmix.store.profile import AUTO, check_profile

    subject = target_of(name, None if precision == AUTO else precision, options["dtype"])
    check_profile(profile, path, subject.geometry, subject.fingerprint)
    if not subject.is_store or precision is not None or budget is not None:
        precision = profile.spec(precision, budget, subject.geometry, subject.layout.dtype)
    return subject.calibrated(profile, precision), precision


def _warn_of_disk(subject: PlanTarget, machine: Machine) -> None:
    """Warn where the store does not fit the disk that was found; the user may have another one."""
    from qmix.terminal.voice import say
    from qmix.units import format_bytes

    free, needed = machine.disk, subject.layout.total_bytes
    if free is not None and needed > free:
        say(
            f"the store takes {format_bytes(needed)}, {format_bytes(free)} are free at {cache_directory()}: free some "
            f"space, or `qmix quantize {subject.name} STORE` with STORE on a larger disk"
        )


def _compare(
    subject: PlanTarget,
    machines: dict[str, Machine],
    options: dict[str, Any],
    how: dict[str, Any],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show machines side by side. Raises DoesNotFitError where none is large enough."""
    from qmix.planner.planned import Planned, check_disk, plan_on

    found: dict[str, Planned | str] = {}
    refusals = []
    for name, machine in machines.items():
        try:
            found[name] = planned = plan_on(subject, machine, options["context"], **how)
        except DoesNotFitError as error:
            refusals.append(error)
            found[name] = f"does not fit; needs --ram {size_option(error.smallest)}"
        else:
            if options["disk"] is not None:  # the same for every machine
                check_disk(planned)
    if as_json:
        plans = {
            name: {"fits": False, "reason": each} if isinstance(each, str) else _content(each)
            for name, each in found.items()
        }
        out(json.dumps({"schema": "qmix-compare-1", "machines": plans}) + "\n")
    else:
        from qmix.planner.view import compare_table
        from qmix.terminal.tables import print_table

        print_table(compare_table(subject.name, list(found), list(found.values())))
    if len(refusals) == len(machines):
        raise min(refusals, key=lambda error: error.smallest)
    if plot is not None:
        from qmix.planner.plot import draw_compared

        draw_compared({name: each for name, each in found.items() if isinstance(each, Planned)}, plot)


def _plot_target(path: Path | None) -> Path | None:
    """Check a picture's path before any work. Raises UsageError."""
    if path is None:
        return None
    from qmix.terminal.figure import check_target

    return check_target(path, "plan")
