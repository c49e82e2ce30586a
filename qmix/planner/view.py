"""Show a plan: bytes by device, the speed, and machines side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from qmix.errors import QmixError, arg
from qmix.machine.rates import RATE_LABELS, Machine, Rates, rate_text
from qmix.plan import Plan
from qmix.plan.predict import Speed
from qmix.planner.planned import Planned
from qmix.units import UnitSystem, format_bytes, plural, size_option

GPU_RATES = ("pcie", "gpu_memory", "gpu_matmul")


def device_table(plan: Plan) -> Table:
    """Return a table with a column for main memory and for each GPU, and a row for each part."""
    table = Table()
    table.add_column("")
    for name in ("RAM", *(device.name for device in plan.devices)):
        table.add_column(name, justify="right", no_wrap=True)

    def row(what: str, host: int, parts: Sequence[int | None]) -> None:
        cells = ("" if part is None else format_bytes(part) for part in (host, *parts))
        table.add_row(what, *cells)

    devices = plan.devices
    row("Python with its imports", plan.interpreter, [None] * len(devices))
    row("dense weights", plan.dense, [device.dense for device in devices])
    row(f"KV cache, {plan.context * plan.batch} tokens", plan.kv_cache, [device.kv_cache for device in devices])
    row("work space", plan.work, [device.work for device in devices])
    row("experts", plan.pool, [device.experts for device in devices])
    table.add_section()
    row("predicted peak", plan.total, [device.total for device in devices])
    if devices:
        table.add_row("CUDA's context", "", *(format_bytes(device.cuda) for device in devices))
    row("headroom", plan.headroom, [device.headroom for device in devices])
    row("budget", plan.ram, [device.budget for device in devices])
    return table


def details(planned: Planned) -> Table:
    """Return a table of the predicted speed and its rates, the store, and the budgets."""
    plan, machine, predicted = planned.plan, planned.machine, planned.prediction
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value, overflow="fold"))

    row("decode", speed_text(predicted.decode))
    row("prefill", speed_text(predicted.prefill))
    row("prompt", prompt_text(predicted.prompt))
    row("4-bit kernel", kernel_text(machine))
    row("rates", rates_text(machine.speeds, bool(plan.devices)))
    free = "" if machine.disk is None else f", which has {format_bytes(machine.disk)} free"
    row("store", f"{format_bytes(plan.store_bytes)} on disk{free}; {format_bytes(plan.on_disk)} of experts only there")
    smallest, roomy = arg("ram", _enough(plan.smallest)), arg("ram", _enough(plan.roomy))
    row("runs from", QmixError(f"{smallest}; all experts fit in RAM with {roomy} or more").for_command({}))
    return table


def outlook(planned: Planned) -> str:
    """Return how a model will run in one line: memory, experts in it, predicted speed and what it follows from."""
    plan, predicted = planned.plan, planned.prediction
    on_gpus = plan.num_records - plan.host_records
    places = [f"{on_gpus} on {plural(len(plan.devices), 'GPU')}"] if plan.devices else []
    places.append(f"{plan.host_records - plan.records_on_disk} in {format_bytes(plan.ram)} of RAM")
    if plan.records_on_disk:
        places.append(f"{plan.records_on_disk} on disk")
    measured = planned.machine.rates.measured
    source = "by this machine's measured rates" if measured else "by typical rates: `qmix doctor` measures this machine"
    return (
        f"{_digits(predicted.decode.rate)} tok/s ({_digits(predicted.decode.slowest)} to "
        f"{_digits(predicted.decode.fastest)}), prompts {_digits(predicted.prefill.rate)} tok/s, {source}; of "
        f"{plan.num_records} experts {', '.join(places)}"
    )


def speed_text(speed: Speed) -> str:
    """Return a speed with its band and its limit."""
    return (
        f"{_digits(speed.rate)} tok/s ({_digits(speed.slowest)} to {_digits(speed.fastest)}), limited by {speed.limit}"
    )


def prompt_text(speed: Speed) -> str:
    """Return the time to the first token of a whole prompt, with its band."""
    seconds, band = speed.seconds, 1 + speed.band
    return f"{speed.tokens:,} tokens in {_digits(seconds)} s ({_digits(seconds / band)} to {_digits(seconds * band)})"


def kernel_text(machine: Machine) -> str:
    """Return how the CPU multiplies 4-bit weights, and how that is known."""
    how = "tested by `qmix doctor`" if machine.four_bit.tried else "by the CPU's flags; `qmix doctor` tests it"
    if machine.four_bit.fast:
        return f"yes, {how}"
    slower = machine.rates.four_bit_read / machine.speeds.four_bit_read
    times = f"4-bit matmuls are {slower:.0f} times slower, " if slower > 1 else ""
    return f"none: {times}{how}"


def rates_text(rates: Rates, gpus: bool) -> str:
    """Return each rate that counts, grouped by source."""
    names = ["memory_read", "disk_read", "matmul", "four_bit_read", "half_read", "layer_seconds"]
    names += GPU_RATES if gpus else ()
    groups: dict[str, list[str]] = {}
    for name in names:
        source = rates.source(name)
        of_card = f" of {rates.card}" if name in GPU_RATES and source in ("published", "typical") and rates.card else ""
        groups.setdefault(source + of_card, []).append(f"{RATE_LABELS[name]} {rate_text(rates, name)}")
    parts = [f"{source}: {', '.join(found)}" for source, found in groups.items()]
    advice = "; `qmix doctor` measures this machine" if "typical" in groups and "measured" not in groups else ""
    return "; ".join(parts) + advice


def compare_table(title: str, names: Sequence[str], found: Sequence[Planned | str]) -> Table:
    """Return a table with a row for each machine: its plan, or why it has none."""
    table = Table(title=Text(title), title_justify="left")
    for name in ("machine", "experts on GPU / RAM / disk", "decode", "prefill", "limited by"):
        table.add_column(name, justify="right" if name in ("decode", "prefill") else "left", overflow="fold")
    for name, each in zip(names, found, strict=True):
        if isinstance(each, str):
            table.add_row(Text(name), Text(each), "", "", "")
            continue
        plan, predicted = each.plan, each.prediction
        on_disk = plan.records_on_disk
        spread = f"{plan.num_records - plan.host_records} / {plan.host_records - on_disk} / {on_disk}"
        rates = (f"{_digits(speed.rate)} tok/s" for speed in (predicted.decode, predicted.prefill))
        table.add_row(Text(name), spread, *rates, predicted.decode.limit)
    return table


def _enough(count: int) -> str:
    """Return a budget as an option takes it, rounded up so that it is enough: with two digits behind the point."""
    unit, factor = ("GiB", 2**30) if UnitSystem.binary else ("GB", 10**9)
    return f"{-(-count * 100 // factor) / 100:.2f}{unit}" if count >= factor else size_option(count)


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
