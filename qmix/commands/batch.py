"""`qmix batch`: answer a file of requests."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import click

from qmix.commands.general import with_general_options
from qmix.commands.merge import merge
from qmix.commands.options import (
    MODEL_HELP,
    batch_gpu_option,
    clip_option,
    context_option,
    dtype_option,
    json_schema_option,
    live_option,
    max_new_tokens_option,
    plan_option,
    precision_option,
    ram_option,
    sampling_options,
)
from qmix.commands.settings import SettingsContext
from qmix.commands.shared import (
    EXIT_SOME_REFUSED,
    LOADING_PATIENCE,
    batch_gpus,
    hold_to,
    live_screen,
    load_libraries,
    model_or_default,
    out,
    read_json_schema,
    read_plan_option,
    warn_of_drive,
    watched,
)
from qmix.errors import QmixError, UsageError
from qmix.terminal.voice import say, stdout
from qmix.units import plural

if TYPE_CHECKING:
    from qmix.batch.answering import Summary
    from qmix.batch.session import Session
    from qmix.batch.shards import Shard
    from qmix.plan.file import PlanFile
    from qmix.store.layout import StoreLayout
    from qmix.terminal.live import LiveScreen

OUTPUT_HELP = "answers, one line each, written as they finish; - is stdout"
BATCH_HELP = "sequences computed together [chosen by the plan]"


class BatchCommand(click.Command):
    """`qmix batch`, and the commands whose names can stand in the place of its input."""

    commands: ClassVar[dict[str, click.Command]] = {"merge": merge}

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        if args and args[0] in self.commands:
            inner = with_general_options(self.commands[args[0]])
            inner.context_class = SettingsContext
            return inner.make_context(f"{info_name} {args[0]}", args[1:], *rest, **extra)
        return super().make_context(info_name, args, *rest, **extra)


@click.command(cls=BatchCommand)
@click.argument("requests", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="OUT.jsonl", type=click.Path(path_type=Path), required=True, help=OUTPUT_HELP)
@click.option("-m", "--model", metavar="MODEL", help=MODEL_HELP)
@ram_option
@batch_gpu_option
@context_option
@precision_option
@clip_option
@dtype_option
@plan_option
@max_new_tokens_option
@sampling_options
@json_schema_option
@click.option("--batch", type=click.IntRange(1, 512), metavar="N", help=BATCH_HELP)
@click.option("--shard", metavar="I/N", help="answer every N-th request, from request I on: the part of one machine")
@click.option("--json", "as_json", is_flag=True, help="print the summary as one JSON object on stdout")
@live_option
def batch(requests: Path, output: Path, model: str | None, as_json: bool, live: bool, **options: Any) -> None:
    """Answer a file of requests, many at a time.

    Each line of IN.jsonl (- is stdin) is a request in OpenAI's batch format (custom_id, method, url, body) or in the
    short format: id, prompt or messages, and any of max_tokens, temperature, top_p, top_k, min_p, repetition_penalty,
    presence_penalty, frequency_penalty, logit_bias, n, seed, stop, ignore_eos, logprobs, response_format. The options
    below apply to lines that do not set their own. The answer to a line depends on that line alone.

    Run the same command again to continue an interrupted run. With --shard, several machines answer a file together;
    `qmix batch merge` joins their answers. Exit codes: 2 some lines are invalid (nothing is run),
    4 some lines could not be answered (each has a line with the reason), 130 interrupted.
    """
    from qmix.batch.shards import Shard
    from qmix.engine.sampling import Sampling

    shard = options.pop("shard")
    part = None if shard is None else Shard.parse(shard)
    to_stdout = str(output) == "-"
    if as_json and to_stdout:
        raise UsageError("--json: stdout has the answers; write them to a file with -o, or leave it out")
    screen = live_screen(live, f"qmix batch: {requests}")
    if screen is not None and to_stdout and stdout().isatty():
        raise UsageError("--live: the answers go to this terminal, too; write them to a file with -o")
    loading = {name: options.pop(name) for name in ("ram", "gpu", "context", "precision", "clip", "dtype", "batch")}
    loading["plan"] = read_plan_option(
        options.pop("plan_path"), **{name: loading[name] or None for name in ("ram", "gpu", "context")}
    )
    options["json_schema"] = read_json_schema(options["json_schema"])
    defaults = {name: value for name, value in options.items() if value is not None}  # compared when a run is continued
    Sampling(**defaults)
    seed = defaults.pop("seed", None)
    with _input(requests, output) as file:
        checked = _checked(requests, file, part)
        if to_stdout:
            from qmix.batch.output import StreamAnswers

            _answer(checked, StreamAnswers(stdout().buffer), model, defaults, seed, loading, as_json, screen)
        else:
            from qmix.batch.output import FileAnswers

            with FileAnswers(output) as answers:
                _answer(checked, answers, model, defaults, seed, loading, as_json, screen)


def _answer(
    requests: Any,
    answers: Any,
    model: str | None,
    options: dict[str, Any],
    seed: int | None,
    loading: dict[str, Any],
    as_json: bool,
    screen: LiveScreen | None,
) -> None:
    """Answer the requests that are left, and print the summary."""
    name = model_or_default(model)
    load_libraries()
    from qmix.batch.display import summary_line

    session = _begin(name, requests, answers, options, seed, **loading)
    if session.plan is not None:
        hold_to(session.plan.ram)
    for note in session.notes(name):
        say(note)
    summary = _watched(session, name, screen)
    if as_json:
        out(json.dumps(summary.to_json() | {"seed": session.seed}) + "\n")
    say(summary_line(summary, session.seed))
    if summary.refused:
        raise click.exceptions.Exit(EXIT_SOME_REFUSED)


def _begin(
    name: str,
    requests: Any,
    answers: Any,
    options: dict[str, Any],
    seed: int | None,
    plan: PlanFile | None,
    ram: int | None,
    gpu: tuple[str, ...],
    context: int | None,
    precision: str | None,
    clip: bool,
    dtype: str | None,
    batch: int | None,
) -> Session:
    """Return a run that is ready. Everything is checked before a store is made."""
    from qmix.batch.session import begin, check_budget
    from qmix.checkpoint import open_checkpoint
    from qmix.commands.texts import tokenizer_of
    from qmix.engine.resolve import prepare_store
    from qmix.store.sources import open_source
    from qmix.terminal.progress import ProgressDisplay

    if plan is not None:
        ram, context, precision = plan.plan.ram, plan.plan.context, precision or plan.precision
    gpus = batch_gpus(plan, gpu, ram)

    def check(layout: StoreLayout, fingerprint: str | None = None) -> None:
        if plan is not None:
            plan.plan_of(layout, fingerprint)

    def check_all(layout: StoreLayout) -> None:
        check(layout)
        tokenizer = tokenizer_of(open_checkpoint(open_source(name)))
        check_budget(layout, tokenizer, requests, answers, options, context, ram, batch, gpus)

    with ProgressDisplay(f"quantizing {name}, once") as making:
        store = prepare_store(name, precision, dtype, making, check_all, clip)
    check(store.layout, store.fingerprint)
    warn_of_drive(store.directory)
    return begin(store, requests, answers, options, seed, context, ram, batch, gpus)


def _watched(session: Session, name: str, screen: LiveScreen | None) -> Summary:
    """Answer the lines that are left, with a bar or on the screen of `--live`; return the summary."""
    from qmix.batch.display import BatchDisplay
    from qmix.terminal.progress import ProgressDisplay

    with ProgressDisplay(f"loading {name}", LOADING_PATIENCE) as load, BatchDisplay("batch") as display:

        def tell(summary: Summary) -> None:
            assert screen is not None
            screen.note(", ".join(filter(None, display.told(summary))))

        try:
            return session.answer(load, tell if screen else display, partial(watched, screen))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(session.interrupted()) from None


@contextmanager
def _input(path: Path, output: Path) -> Iterator[BinaryIO]:
    """Open the requests as a seekable file."""
    if str(path) == "-":
        with _copied(None if sys.stdin is None else sys.stdin.buffer) as copy:
            yield copy
        return
    try:
        if output.exists() and output.samefile(path):
            raise UsageError(f"{output}: is also the input; choose another name for the answers")
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give a file with one JSON object per line") from None
    with file:
        if path.is_file():
            yield file
        else:
            with _copied(file) as copy:
                yield copy


@contextmanager
def _copied(stream: BinaryIO | None) -> Iterator[BinaryIO]:
    """Copy the lines of a stream that is not seekable to a temporary file."""
    from qmix.batch.lines import copy_lines

    with tempfile.TemporaryFile() as copy:
        if stream is not None:
            copy_lines(stream, copy)
        yield copy


def _checked(path: Path, file: BinaryIO, shard: Shard | None) -> Any:
    """Return the requests. Raises UsageError where a line is invalid, after a message for each such line."""
    from qmix.batch.lines import Requests

    where = "stdin" if str(path) == "-" else str(path)
    try:
        found = Requests(file, shard)
    except OSError as error:
        raise QmixError(f"{where}: {error.strerror}") from None
    if found.bad == 1:
        raise UsageError(f"{where}: {found.problems[0]}; nothing was run")
    for problem in found.problems:
        click.echo(f"{where}: {problem}", err=True)
    if found.bad > len(found.problems):
        click.echo(f"{where}: {plural(found.bad - len(found.problems), 'more invalid line')}", err=True)
    if found.bad:
        raise UsageError(f"{where}: {found.bad} lines are invalid; nothing was run, correct them")
    if not found.count:
        raise UsageError(f"{where}: has no requests; give one JSON object per line")
    return found
