"""`qmix doctor`: examine and measure this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qmix.commands.shared import load_libraries, out, quiet_libraries, refuse
from qmix.errors import QmixError
from qmix.terminal.voice import say

if TYPE_CHECKING:
    from qmix.machine.doctor import MachineReport


@click.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="a directory on the disk of the stores [the user's cache directory]",
)
@click.option("--no-measure", is_flag=True, help="only test what must work; measure no rates")
@click.option("--self-test", is_flag=True, help="check that GPUs give the values of the CPU and use the planned bytes")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object instead of a table")
def doctor(directory: Path | None, no_measure: bool, self_test: bool, as_json: bool) -> None:
    """Examine this machine and measure its memory, disk and GPUs.

    Takes half a minute, 1 GB of memory and 1 GB of disk; run it while nothing else runs. The first time it also
    compiles the kernels for this processor. The results are kept, and `plan` and every run use them. The fast kernel
    for 4-bit matmul is tested, not assumed from the processor's name: run `doctor` again after installing another
    version of torch or bitsandbytes.
    """
    if self_test:
        refuse(("directory", "no_measure", "as_json"), "not used with --self-test")
        _self_test()
        return
    from qmix.disk.places import cache_directory
    from qmix.machine.doctor_view import report_table
    from qmix.terminal.tables import print_table

    report, lost = _examined(directory or cache_directory(), measuring=not no_measure)
    if as_json:
        out(json.dumps(report.to_json()) + "\n")
    else:
        print_table(report_table(report))
    if report.typical and not as_json:
        say(f"not measured: {', '.join(report.typical)}; typical values are used. `qmix doctor` measures them")
    if lost is not None:
        raise lost


def _examined(where: Path, measuring: bool) -> tuple[MachineReport, QmixError | None]:
    """Return what was found, and the error where that could not be kept: the report is useful all the same."""
    from qmix.machine.doctor import examine, examine_gpus
    from qmix.machine.found import interpreter_memory
    from qmix.machine.measured import keep, measured_gpus, measured_rates
    from qmix.machine.rates import Rates

    for kernels in (False, True):
        interpreter_memory(kernels=kernels)  # also compiles, so that no run has to
    quiet_libraries()
    from qmix.machine.four_bit import try_four_bit

    four_bit, rates, lost = try_four_bit(), measured_rates(), None
    found, widened, gpus = None, None, measured_gpus()
    if measuring:
        load_libraries()
        from qmix.bench.machine_rates import measure
        from qmix.machine.many_rows import try_widened

        found = measure(where, say)
        rates, gpus = Rates().with_measured(found), examine_gpus()
        say("multiplying dequantised weights")
        widened = try_widened()
    try:
        kept = keep(found, four_bit, widened=widened, gpus=gpus)
        if measuring:
            say(f"kept in {kept}")
    except QmixError as error:
        lost = error
    return examine(where, rates, four_bit, gpus.context), lost


def _self_test() -> None:
    """Run the self-test, which takes minutes, on pretend devices without a GPU. Raises QmixError where it fails."""
    quiet_libraries()
    from qmix.verify.selftest import self_test

    if not self_test(lambda line: out(line + "\n")):
        raise QmixError("the self-test failed; please report its output")
