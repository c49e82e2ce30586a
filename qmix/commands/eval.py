"""`qmix eval`: a model's results on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.options import batch_gpu_option, clip_option, dtype_option, plan_option, precision_option, ram_option
from qmix.commands.shared import (
    LOADING_PATIENCE,
    batch_gpus,
    hold_to,
    load_libraries,
    model_or_default,
    out,
    read_plan_option,
    warn_of_drive,
)
from qmix.errors import UsageError
from qmix.units import plural

if TYPE_CHECKING:
    from qmix.evaluate.engine import StoreEngine
    from qmix.evaluate.harness import QmixLM, RequestEngine
    from qmix.plan.file import PlanFile
    from qmix.store.layout import StoreLayout
    from qmix.store.opened import Store

PLACE = click.Path(path_type=Path)
TASKS_HELP = "tasks of the harness or in --data, such as arc_easy,gsm8k; `card`: see above [all in --data, or card]"
DATA_HELP = "your own tasks, and data sets from `hf download`; the network is then not used"
OUT_HELP = "directory of the results [qmix-eval]"
SHOTS_HELP = "examples in each prompt [the task's own]"
CONTEXT_HELP = "longest request; longer ones lose their beginning [the model's longest]"
BATCH_HELP = "tokens computed together [chosen by the plan]"


@click.command("eval")
@click.argument("model", required=False)
@click.option("--tasks", metavar="NAMES", help=TASKS_HELP)
@click.option("--data", type=PLACE, metavar="DIR", help=DATA_HELP)
@click.option("-o", "--out", "output", type=PLACE, metavar="DIR", default=Path("qmix-eval"), help=OUT_HELP)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="the first N questions of each task [all]")
@click.option("--num-fewshot", "shots", type=click.IntRange(min=0), metavar="N", help=SHOTS_HELP)
@ram_option
@batch_gpu_option
@click.option("--context", type=click.IntRange(min=2), metavar="TOKENS", help=CONTEXT_HELP)
@precision_option
@clip_option
@dtype_option
@plan_option
@click.option("--batch-tokens", type=click.IntRange(min=1), metavar="N", help=BATCH_HELP)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object instead of a table")
def eval(model: str | None, output: Path, as_json: bool, plan_path: Path | None, **options: Any) -> None:
    """Evaluate MODEL on tasks of lm-evaluation-harness.

    `--tasks card` runs ARC-Challenge (25 examples), HellaSwag (10), MMLU (5), TruthfulQA (0), Winogrande (5) and GSM8K
    (5), and compares the results with those of Mixtral 8x22B's model card.

    Each result is written to --out at once and not computed again: run the same command to continue an interrupted run.
    results.json in that directory has the figures of the last run.
    """
    plan = read_plan_option(plan_path, **{name: options[name] or None for name in ("ram", "gpu", "context")})
    if plan is not None:
        options |= {"ram": plan.plan.ram, "context": plan.plan.context}
        options["precision"] = options["precision"] or plan.precision
    options["gpus"] = batch_gpus(plan, options.pop("gpu"), options["ram"])
    if options["data"] is not None and not options["data"].is_dir():
        raise UsageError(f"--data {options['data']}: directory not found")
    if find_spec("lm_eval") is None:
        raise UsageError("lm-evaluation-harness is not installed; pip install 'qmix-moe[eval]'")
    name = model_or_default(model)
    load_libraries()
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of the harness
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # otherwise it resamples in child processes
    store = _store(name, plan, options)
    warn_of_drive(store.directory)
    from qmix.evaluate.display import EvaluationDisplay, result_tables, work_line
    from qmix.evaluate.engine import StoreEngine
    from qmix.evaluate.results import Results, identity
    from qmix.machine.arithmetic import computed_on
    from qmix.machine.found import default_budget, own_memory
    from qmix.terminal.progress import ProgressDisplay
    from qmix.terminal.tables import print_table, say

    def loading() -> ProgressDisplay:
        hold_to(options["ram"] or default_budget())  # from here on: a budget that is refused is not exceeded
        return ProgressDisplay(f"loading {name}", LOADING_PATIENCE)

    showing = partial(EvaluationDisplay, f"evaluating {name}")
    with Results(output, identity(store, computed_on(options["gpus"] is not None))) as results:
        limits = options["ram"], options["batch_tokens"], own_memory(), options["gpus"]
        engine = StoreEngine(store, results, *limits, loading, showing)
        try:
            content, path = _evaluate(engine, output, options)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(engine)) from None
    if as_json:
        out(json.dumps(content) + "\n")
    else:
        print_table(*result_tables(content))
    say(f"{work_line(engine.work, options['ram'])}; {path}")


def _store(name: str, plan: PlanFile | None, options: dict[str, Any]) -> Store:
    """Return the model's store; it is made after checking that the budget suffices for all requests."""
    from qmix.engine.resolve import prepare_store
    from qmix.terminal.progress import ProgressDisplay

    def check(layout: StoreLayout, fingerprint: str | None = None) -> None:
        context, longest = options["context"], layout.geometry.max_position
        if context is not None and context > longest:
            raise UsageError(f"--context {context}: must be 2 to {longest}, the model's longest")
        if plan is not None:
            plan.plan_of(layout, fingerprint)

    def check_all(layout: StoreLayout) -> None:
        check(layout)
        _check_budget(name, layout, options)

    with ProgressDisplay(f"quantizing {name}, once") as making:
        store = prepare_store(name, options["precision"], options["dtype"], making, check_all, options["clip"])
    check(store.layout, store.fingerprint)
    return store


def _check_budget(name: str, layout: StoreLayout, options: dict[str, Any]) -> None:
    """Check all requests with the checkpoint's tokenizer. Raises DoesNotFitError with a budget that suffices."""
    from qmix.checkpoint import open_checkpoint
    from qmix.commands.texts import tokenizer_of
    from qmix.evaluate import engine  # noqa: F401 -- its imports must not count as memory of the tasks and requests
    from qmix.evaluate.budget import Budget, BudgetCheck, Checked
    from qmix.machine.found import own_memory
    from qmix.store.sources import open_source

    budget = Budget(layout, options["ram"], options["batch_tokens"], own_memory(), options["gpus"])
    tokenizer = tokenizer_of(open_checkpoint(open_source(name)))
    with suppress(Checked):
        _run(BudgetCheck(budget), tokenizer, layout, options, lambda line: None)


def _evaluate(engine: StoreEngine, output: Path, options: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """Return the content of results.json and its path.

    The harness is imported here, after the engine has measured this process, so that it counts as memory held beside
    the model.
    """
    from qmix.terminal.voice import say
    from qmix.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(engine.store.directory)
    lm, found, names = _run(engine, tokenizer, engine.store.layout, options, say)
    from qmix.evaluate.report import report, write_report

    shots, limit = options["shots"], options["limit"]
    if "card" in names and limit:
        say("with --limit the figures are of other questions than the card's")
    content = report(lm, found, {"tasks": names, "limit": limit, "num_fewshot": shots})
    return content, write_report(output, content)


def _run(
    engine: RequestEngine, tokenizer: Any, layout: StoreLayout, options: dict[str, Any], notify: Callable[[str], None]
) -> tuple[QmixLM, dict[str, Any], list[str]]:
    """Return the harness's model over an engine, its results, and the names of the tasks."""
    from qmix.evaluate import tasks
    from qmix.evaluate.data import offline
    from qmix.evaluate.harness import QmixLM
    from qmix.evaluate.report import run_tasks

    tasks.mute()
    data, shots = options["data"], options["shots"]
    names = _names(options["tasks"]) or (tasks.own_tasks(data) if data else []) or ["card"]
    if "card" in names and shots is not None:
        raise UsageError("--num-fewshot: the tasks of `card` have their own; leave it out, or give other --tasks")
    lm = QmixLM(engine, tokenizer, options["context"] or layout.geometry.max_position, notify)
    with offline() if data else nullcontext():
        return lm, run_tasks(lm, tasks.load_tasks(names, data, shots), options["limit"]), names


def _names(asked: str | None) -> list[str]:
    if asked is None:
        return []
    names = list(dict.fromkeys(filter(None, map(str.strip, asked.split(",")))))
    if not names:
        raise UsageError("--tasks: empty; give some tasks, or leave it out")
    return names


def _interrupted(engine: StoreEngine) -> str:
    work = engine.work
    done = f"; {work.done} of {plural(work.requests, 'request')} done" if work.requests else ""
    return f"interrupted{done}, run the same command again to continue"
