"""`qmix doctor`: what this machine is, and how fast."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qmix.commands.shared import out, quiet_libraries, refuse


@click.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="on the disk that stores lie on [the user's cache directory]",
)
@click.option("--no-measure", is_flag=True, help="measure no rates, only try what must work; some seconds")
@click.option("--self-test", is_flag=True, help="check that GPUs give the CPU's values and take the planned bytes")
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of a table")
def doctor(directory: Path | None, no_measure: bool, self_test: bool, as_json: bool) -> None:
    """Report on this machine, and measure what plans are predicted from: memory, disk, products, GPUs.

    Takes half a minute and a gigabyte each of memory and disk; run it while nothing else runs. What it finds is kept,
    and used by plan and by every run from then on. Whether 4-bit products take a fast kernel is tried, not read off the
    processor's name: run it again after installing another torch or bitsandbytes.
    """
    if self_test:
        others = {"directory": directory, "no_measure": no_measure, "as_json": as_json}
        refuse(others, "is not for --self-test, which measures nothing")
        _self_test()
        return
    from qmix.disk.places import cache_directory
    from qmix.errors import QmixError
    from qmix.machine.doctor import examine
    from qmix.machine.doctor_view import report_table
    from qmix.machine.measured import keep, measured_rates
    from qmix.machine.rates import Rates
    from qmix.terminal.tables import print_table, say

    where = directory or cache_directory()
    quiet_libraries()
    from qmix.machine.four_bit import try_four_bit

    four_bit, rates, lost = try_four_bit(), measured_rates(), None
    found = None
    if not no_measure:
        from qmix.bench.machine_rates import measure

        found = measure(where, say)
        rates = Rates().with_measured(found)
    try:
        kept = keep(found, four_bit)
        if not no_measure:
            say(f"kept in {kept}")
    except QmixError as error:  # said last: the report is worth having all the same
        lost = error
    report = examine(where, rates, four_bit)
    if as_json:
        out(json.dumps(report.to_json()) + "\n")
    else:
        print_table(report_table(report))
    if report.typical and not as_json:
        say(f"not measured: {', '.join(report.typical)}; typical values stand in. `qmix doctor` measures them")
    if lost is not None:
        raise lost


def _self_test() -> None:
    """Some minutes; without a GPU on pretend ones. Raises QmixError where a check fails."""
    quiet_libraries()
    from qmix.errors import QmixError
    from qmix.verify.selftest import self_test

    if not self_test(lambda line: out(line + "\n")):
        raise QmixError("the self-test found faults; please report its lines")
