"""`qmix eval`: a model's figures on lm-evaluation-harness's tasks."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.shared import (
    LOADING_PATIENCE,
    dtype_option,
    model_or_default,
    out,
    plan_option,
    precision_option,
    quiet_libraries,
    ram_option,
    read_plan_option,
)
from qmix.errors import UsageError

if TYPE_CHECKING:
    from qmix.evaluate.model import QmixLM
    from qmix.layout import StoreLayout
    from qmix.store import Store

TASKS_HELP = "the harness's tasks or those in --data, as arc_easy,gsm8k; `card` is the model card's six [those in --data, or card]"
DATA_HELP = "tasks of your own, and data sets as `hf download` leaves them; with it the tasks use no network"
OUT_HELP = "where results are kept, each request's as soon as it is known"
CONTEXT_HELP = "seen at once; longer requests lose their beginning [all that the model sees]"
BATCH_HELP = "through the model together [by the plan, from --ram and the requests]"
INSTALL = "pip install 'qmix-moe[eval]'"


@click.command("eval")
@click.argument("model", required=False)
@click.option("--tasks", metavar="NAMES", help=TASKS_HELP)
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help=DATA_HELP)
@click.option("-o", "--out", "output", type=click.Path(path_type=Path), metavar="DIR", default="qmix-eval", help=OUT_HELP, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="the first N questions of each task [all]")
@click.option("--num-fewshot", "shots", type=click.IntRange(min=0), metavar="N", help="examples in a prompt [the task's own]")
@ram_option
@click.option("--context", type=click.IntRange(min=2), metavar="TOKENS", help=CONTEXT_HELP)
@precision_option
@dtype_option
@plan_option
@click.option("--batch-tokens", type=click.IntRange(min=1), metavar="N", help=BATCH_HELP)
@click.option("--json", "as_json", is_flag=True, help="the results as one JSON object instead of a table")
def eval(model: str | None, output: Path, as_json: bool, **options: Any) -> None:
    """Evaluate MODEL on tasks of lm-evaluation-harness.

    `--tasks card` is ARC-Challenge (25 examples), HellaSwag (10), MMLU (5), TruthfulQA (0), Winogrande (5) and GSM8K
    (5), beside the figures of Mixtral 8x22B's model card.

    A result is kept in --out as soon as it is known, and never computed again: a run that was stopped goes on with the
    same command. results.json there has the figures of the last run.
    """
    plan = read_plan_option(options.pop("plan_path"), ram=options["ram"], context=options["context"])
    if plan is not None:
        options |= {"ram": plan.plan.ram, "context": plan.plan.context}
        options["precision"] = options["precision"] or plan.precision
    data = options["data"]
    if data is not None and not data.is_dir():
        raise UsageError(f"--data {data}: no such directory")
    if find_spec("lm_eval") is None:
        raise UsageError(f"lm-evaluation-harness is not installed; {INSTALL}")
    name = model_or_default(model)
    quiet_libraries()
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness would resample in processes of its own
    _evaluate(name, _store(name, plan, options), output, as_json, options)


def _store(name: str, plan: Any, options: dict[str, Any]) -> Store:
    """The model's store, made once the budget is known to do for the least there is to it."""
    from qmix.evaluate.sizing import plan_scoring
    from qmix.prepare import prepare_store
    from qmix.terminal import ProgressDisplay

    def check(layout: StoreLayout, fingerprint: str | None = None) -> None:
        longest = layout.geometry.max_position
        if options["context"] is not None and options["context"] > longest:
            raise UsageError(f"--context {options['context']}: must be 2 to {longest}, the model's longest")
        if plan is not None and plan.plan_of(layout, fingerprint).devices:
            raise UsageError(f"{plan.path}: uses GPUs, and evaluations are computed by the CPU; make a plan without any")
        plan_scoring(layout, 1, 1, options["ram"])

    with ProgressDisplay(f"quantizing {name}, once") as making:
        store = prepare_store(name, options["precision"], options["dtype"], making, check)
    check(store.layout, store.fingerprint)
    return store


def _evaluate(name: str, store: Store, output: Path, as_json: bool, options: dict[str, Any]) -> None:
    from qmix.evaluate.display import EvaluationDisplay, card_table, results_table, work_line
    from qmix.evaluate.engine import Engine
    from qmix.evaluate.results import Results, identity
    from qmix.machine import own_memory
    from qmix.runner import load_tokenizer
    from qmix.terminal import ProgressDisplay, print_table, say

    tokenizer = load_tokenizer(store.directory)
    loading, display = ProgressDisplay(f"loading {name}", LOADING_PATIENCE), EvaluationDisplay("evaluating")
    with Results(output, identity(store)) as results, loading, display:
        engine = Engine(store, results, options["ram"], options["batch_tokens"], own_memory(), loading, display)
        try:
            lm, content = _run(engine, tokenizer, options)
        except KeyboardInterrupt:
            work = engine.work
            done = f"; {work.done} of {work.requests} requests are done" if work.requests else ""
            raise KeyboardInterrupt(f"interrupted{done}, the same command goes on") from None
        from qmix.evaluate.run import write_report

        path = write_report(output, content)
    if as_json:
        out(json.dumps(content) + "\n")
    else:
        print_table(results_table(content))
        if "card" in content:
            from qmix.evaluate.card import card_rows

            print_table("", card_table(card_rows(content["results"])))
    if "card" in content and options["limit"]:
        say("with --limit the difference to the card is of other questions")
    say(f"{work_line(lm.engine.work, options['ram'])}; {path}")


def _run(engine: Any, tokenizer: Any, options: dict[str, Any]) -> tuple[QmixLM, dict[str, Any]]:
    """`engine` was made before the harness was imported, which is a part of what is held beside the model."""
    from contextlib import nullcontext

    from qmix.evaluate import tasks
    from qmix.evaluate.model import QmixLM
    from qmix.evaluate.run import report, run_tasks
    from qmix.terminal import say

    tasks.mute()
    data, shots = options["data"], options["shots"]
    names = _names(options["tasks"], data, tasks.own_tasks)
    if "card" in names and shots is not None:
        raise UsageError("--num-fewshot: the model card's tasks have theirs; leave it out, or name the tasks")
    lm = QmixLM(engine, tokenizer, options["context"] or engine.store.geometry.max_position, say)
    with nullcontext() if data is None else tasks.offline():
        found = run_tasks(lm, tasks.load_tasks(names, data, shots), options["limit"])
    settings = {"tasks": names, "limit": options["limit"], "num_fewshot": shots}
    return lm, report(lm, found, settings)


def _names(asked: str | None, data: Path | None, own: Any) -> list[str]:
    if asked is not None:
        names = list(dict.fromkeys(filter(None, map(str.strip, asked.split(",")))))
        if not names:
            raise UsageError("--tasks: names no task; give some, or leave it out")
        return names
    return (own(data) if data is not None else []) or ["card"]
