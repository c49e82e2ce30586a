"""Steps that several commands share: read options, load a model, keep to a budget, write."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.errors import QmixError, UsageError
from qmix.files import read_text
from qmix.models import DEFAULT_MODEL
from qmix.progress import OnProgress
from qmix.terminal.voice import say, stdout

if TYPE_CHECKING:
    from qmix.machine.rates import Machine
    from qmix.plan.file import PlanFile
    from qmix.store.profile import Profile
    from qmix.terminal.live import LiveScreen

EXIT_SOME_REFUSED = 4
LOADING_PATIENCE = 2.0  # seconds of reading experts into memory before progress is shown


def system_text(text: str | None, path: Path | None) -> str | None:
    """Return the system prompt of `system_options`, None where none was given. Raises UsageError."""
    if text is not None and path is not None:
        raise UsageError("--system and --system-file: give only one of them")
    if path is None:
        from qmix.text.detokenizer import check_text

        check_text(text or "", "--system")
        return text
    return read_text(path.expanduser(), f"--system-file {path}").rstrip("\n")


def read_json_schema(path: Path | None) -> str | None:
    """Return the text of `--json-schema`. Raises UsageError where it cannot be read."""
    return None if path is None else read_text(path.expanduser(), f"--json-schema {path}")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given a value."""
    return {name: value for name, value in options.items() if value is not None and value != () and value is not False}


def refuse(options: Iterable[str], why: str) -> None:
    """Raise UsageError where any of these options was typed; `why` says why it has no effect."""
    context = click.get_current_context()
    names = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    for name in options:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(
                f"{names[name]}: {why}, or leave it out" if "; " in why else f"{names[name]}: {why}; leave it out"
            )


def model_or_default(model: str | None) -> str:
    if model is not None:
        return model
    say(f"no model given: using the embedded {DEFAULT_MODEL}, a toy model")
    return DEFAULT_MODEL


def store_named(name: str) -> Path:
    """Return the directory of a store, given as a path or as `qmix ls` shows it. Raises UsageError."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    from qmix.disk.places import cache_directory
    from qmix.store.listing import find_store

    return find_store(name, cache_directory()).directory


def loaded(
    model: str | None,
    attention: str,
    plan_path: Path | None = None,
    *,
    begin: Callable[[], object] = lambda: None,
    on_load: OnProgress | None = None,
    **options: Any,
) -> Any:
    """Return the runner of a model, showing progress while it is made ready.

    `begin` is called when nothing can be refused any more, before the slow part. `on_load` follows that part in place
    of a bar.
    """
    options["gpu"] = options.get("gpu") or None
    given = {option: options.get(option) for option in ("ram", "gpu", "context")}
    plan = read_plan_option(plan_path, **given)
    name = model_or_default(model)
    from qmix.engine.load import load
    from qmix.terminal.progress import ProgressDisplay

    def on_store() -> None:
        shown.close()  # its bar would be drawn over what `begin` shows
        begin()

    following: dict[str, Any] = {"attention": attention, "plan": plan, "import_libraries": load_libraries}
    making, loading = ProgressDisplay(f"quantizing {name}, once"), ProgressDisplay(f"loading {name}", LOADING_PATIENCE)
    with ExitStack() as shown, loading:
        shown.enter_context(making)
        runner = load(name, **following, on_progress=making, on_store=on_store, on_load=on_load or loading, **options)
    hold_to(runner.plan.ram)
    warn_of_drive(runner.store.directory)
    logging.getLogger(__name__).debug(
        "store %s; %d of %d experts in memory, context %d",
        runner.store.directory,
        runner.plan.num_records - runner.plan.records_on_disk,
        runner.plan.num_records,
        runner.plan.context,
    )
    return runner


def warn_of_drive(directory: Path) -> None:
    """Warn of a store, there or to be made, on a Windows drive that is mounted in WSL."""
    from qmix.machine.wsl import drive_warning

    if (line := drive_warning(directory)) is not None:
        logging.getLogger(__name__).warning(line)


def hold_to(budget: int) -> None:
    """Warn on stderr at the end of the command, however it ends, if its process used more than `budget` bytes."""
    click.get_current_context().call_on_close(partial(_say_overrun, budget))


def _say_overrun(budget: int) -> None:
    """Warn of a peak above the budget, and have the next command measure Python's own memory again."""
    from qmix.machine.found import forget_interpreter_memory, peak_memory
    from qmix.units import format_bytes, size_option

    peak = peak_memory()
    if peak <= budget:
        return
    forget_interpreter_memory()
    less = 2 * budget - peak
    otherwise = f"; if it is above again, use --ram {size_option(less, up=False)}" if less >= 2**20 else ""
    logging.getLogger(__name__).warning(
        f"peak memory {format_bytes(peak)} is above the budget of {format_bytes(budget)}: run the command again, "
        f"it will measure Python's own memory again{otherwise}"
    )


def live_screen(live: bool, title: str) -> LiveScreen | None:
    """Return the screen of `--live`, None without it. Raises UsageError where stderr cannot show one."""
    if not live:
        return None
    from qmix.terminal.live import LiveScreen, check_live
    from qmix.terminal.voice import say

    check_live()
    return LiveScreen(title, out, say)


def watched(screen: LiveScreen | None, runner: Any) -> AbstractContextManager[None]:
    """Show the work of a runner while the block runs, where there is a screen."""
    if screen is None:
        return nullcontext()
    from qmix.engine.figures import Watch

    return screen.showing(Watch(runner).figures)


def read_profile_option(path: Path | None, precision: str | None, budget: int | None) -> Profile | None:
    """Return the profile of `--profile`. Raises UsageError where another option needs one and it is not given."""
    from qmix.store.profile import AUTO, read_profile

    if budget is not None and precision not in (None, AUTO):
        raise UsageError(f"--budget and --precision {precision}: leave one of them out")
    if path is None and (precision == AUTO or budget is not None):
        asking = "--budget" if budget is not None else f"--precision {AUTO}"
        raise UsageError(f"{asking}: needs a --profile with the quantisation errors of the experts")
    return None if path is None else read_profile(path)


def read_plan_option(path: Path | None, **others: Any) -> PlanFile | None:
    """Return the plan of `--plan`. Raises UsageError where another option sets what the plan sets."""
    if path is None:
        return None
    for name, value in others.items():
        if value is not None:
            raise UsageError(f"--plan and --{name}: the plan sets it already; leave one of them out")
    from qmix.plan.file import read_plan

    return read_plan(path)


def batch_gpus(plan: PlanFile | None, gpus: Sequence[str], ram: int | None) -> Machine | None:
    """Return the machine whose GPUs take part in a batch: those of `--plan` or `--gpu`. None for the CPU alone."""
    budgets = [device.budget for device in plan.plan.devices] if plan is not None else list(gpus)
    if not budgets:
        return None
    from qmix.plan.here import run_machine

    try:
        machine = run_machine(ram, budgets)
    except UsageError as error:
        if plan is None:
            raise
        raise UsageError(f"{plan.path}: is a plan for other GPUs; make it again on this machine ({error})") from None
    return machine if machine.gpus else None


def quiet_libraries() -> None:
    """Hide the warnings that transformers and torch print for developers."""
    import warnings

    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load_libraries() -> None:
    """Import what a model needs of transformers and the libraries around it, without their warnings."""
    quiet_libraries()
    from qmix.machine.kept import limit_kept_memory
    from qmix.model.lean import import_libraries

    limit_kept_memory()
    import_libraries()


def out(text: str) -> None:
    """Write to stdout. Raises QmixError where it is closed or full."""
    try:
        click.echo(text, stdout(), nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise QmixError(f"stdout: {error.strerror}; redirect it to another file") from None
