"""The command line: options, exit codes, and what goes to which stream.

stdout carries the answer, stderr the rest. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 does not fit the
budget, 130 interrupted. Commands import what they need when they run: `--help` loads no torch.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from qmix import __version__
from qmix.errors import DoesNotFitError, QmixError, UsageError
from qmix.models import DEFAULT_MODEL
from qmix.units import format_bytes, parse_bytes

EXIT_INTERRUPTED = 130
LOADING_PATIENCE = 2.0  # seconds of reading experts into memory before a run says so
MODEL_HELP = "a store, a checkpoint directory, a hub id (org/name[@revision]), or the embedded `tiny`"
PRECISION_HELP = "of the experts: nf4 (default), fp4, int8, half; single ones as in nf4,0.*=int8,*.3=half"
PROMPTS_HELP = "prompts to time, as 512 or 512,1024; 0 for none [512]"
NEW_HELP = "tokens to generate, as 128 or 128,512; 0 for none [128]"


class Size(click.ParamType[int]):
    """Bytes as people write them, refused before any work begins."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        try:
            return parse_bytes(value)
        except UsageError as error:
            self.fail(str(error), parameter, context)


precision_option = click.option("--precision", metavar="SPEC", help=PRECISION_HELP)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16"]),
    help="of dense weights; by default the checkpoint's own half",
)
ram_option = click.option(
    "--ram", type=Size(), metavar="SIZE", help="ceiling for the whole process, as 12GiB [90% of free memory]"
)
context_option = click.option(
    "--context", type=click.IntRange(min=1), metavar="TOKENS", help="prompt and answer together [4096]"
)
attention_option = click.option(
    "--attn", type=click.Choice(["eager", "sdpa", "flash_attention_2"]), default="sdpa", show_default=True
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qmix")
def qmix() -> None:
    """Run Mixtral models on one workstation, under a memory budget."""


@qmix.command()
@click.argument("prompt", required=False)
@click.option("-m", "--model", metavar="MODEL", help=MODEL_HELP)
@ram_option
@context_option
@precision_option
@dtype_option
@attention_option
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option("--temperature", type=float, help="0 is greedy [the model's own]")
@click.option("--top-p", type=float, help="[the model's own]")
@click.option("--top-k", type=int, help="0 turns it off [the model's own]")
@click.option("--min-p", type=float, help="[the model's own]")
@click.option("--repetition-penalty", type=float, help="[the model's own]")
@click.option("--seed", type=int, help="fixes the draws [random]")
@click.option("--stop", multiple=True, metavar="TEXT", help="end before this text; may be given again")
@click.option(
    "--draft-ngram", type=int, default=0, metavar="N", help="draft N tokens from repetitions in the text [0: off]"
)
@click.option("--ignore-eos", is_flag=True, help="go on after the end-of-text token")
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of streamed text")
def generate(prompt: str | None, **options: Any) -> None:
    """Continue PROMPT (or stdin, with - or nothing) and stream the text to stdout."""
    from qmix.sampling import Sampling

    as_json = options.pop("as_json")
    loading = {name: options.pop(name) for name in ("model", "ram", "context", "precision", "dtype")}
    attention = options.pop("attn")
    sampling = Sampling(**{name: value for name, value in options.items() if value is not None})
    text = _read_prompt(prompt)
    with _loaded(attention=attention, **loading) as runner:
        from qmix.terminal import say, statistics

        result = None
        with closing(runner.generate(text, sampling)) as pieces:  # what ends the loop ends the computation
            for piece in pieces:
                result = piece.result
                if not as_json:
                    _out(piece.text)
        assert result is not None
        _out(json.dumps(result.to_json(), ensure_ascii=False) + "\n" if as_json else "\n")
        say(statistics(result))


@qmix.command()
@click.argument("model")
@click.argument("store", type=click.Path(path_type=Path))
@precision_option
@dtype_option
@click.option("--evict", is_flag=True, help="hub only: delete each shard when it is used up")
def quantize(model: str, store: Path, precision: str | None, dtype: str | None, evict: bool) -> None:
    """Turn the checkpoint MODEL into the store STORE; run again, it goes on where it was stopped."""
    from qmix.checkpoint import open_checkpoint
    from qmix.checkpoint.source import LocalSource
    from qmix.prepare import INTERRUPTED, layout_for, open_source
    from qmix.quantize import quantize as run
    from qmix.store import is_store, partial_directory
    from qmix.terminal import ProgressDisplay, say

    there = is_store(store)
    scratch = partial_directory(store) / "shards" if evict else None
    source = open_source(model, scratch)
    if evict and isinstance(source, LocalSource):
        raise UsageError(f"--evict: {model} is not on the hub; your own files are never deleted")
    checkpoint = open_checkpoint(source)
    layout = layout_for(checkpoint, precision, dtype)
    with ProgressDisplay(f"quantizing {model}") as display:
        try:
            made = run(checkpoint, store, layout, display)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(INTERRUPTED) from None
    say(f"{made.directory}: {'already there, ' if there else ''}{format_bytes(made.layout.total_bytes)}")


@qmix.command()
@click.argument("model", required=False)
@ram_option
@context_option
@precision_option
@dtype_option
@attention_option
@click.option("--json", "as_json", is_flag=True, help="the plan as JSON")
def plan(model: str | None, as_json: bool, **options: Any) -> None:
    """Say what of MODEL lies where under a budget, reading no weights. Exit code 3: it does not fit."""
    from qmix.prepare import layout_of, plan_for

    name = _model_or_default(model)
    try:
        layout = layout_of(name, options["precision"], options["dtype"])
        made = plan_for(layout, options["ram"], options["context"], options["attn"])
    except DoesNotFitError as error:
        if as_json:
            _out(json.dumps({"schema": "qmix-plan-1", "fits": False, "smallest": error.smallest}) + "\n")
        raise
    if as_json:
        _out(json.dumps({"fits": True} | made.to_json()) + "\n")
    else:
        from qmix.terminal import plan_table, print_table

        print_table(plan_table(made, name))


@qmix.command()
@click.argument("model", required=False)
@ram_option
@click.option("--context", type=click.IntRange(min=1), metavar="TOKENS", help="[what the longest test takes]")
@precision_option
@dtype_option
@attention_option
@click.option("-p", "--prompt-tokens", multiple=True, metavar="LIST", default=["512"], help=PROMPTS_HELP)
@click.option("-n", "--new-tokens", multiple=True, metavar="LIST", default=["128"], help=NEW_HELP)
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of a table")
def bench(model: str | None, attn: str, repetitions: int, as_json: bool, **options: Any) -> None:
    """Measure how fast MODEL takes in a prompt (pp) and generates (tg), beside what this machine could do at best."""
    name = _model_or_default(model)
    from qmix.bound import workloads

    tests = workloads(options.pop("prompt_tokens"), options.pop("new_tokens"))
    _quiet_libraries()
    from calibration.probes import probe_in_child
    from qmix.bench import measure, prepare
    from qmix.runner import Runner
    from qmix.terminal import ProgressDisplay, bench_conditions, bench_table, print_table, say

    with ProgressDisplay(f"quantizing {name}, once") as making:
        store, plan = prepare(name, tests, attention=attn, on_progress=making, **options)
    say("measuring this machine's memory and cores")
    machine = probe_in_child()
    with ProgressDisplay(f"loading {name}", LOADING_PATIENCE) as loading:
        runner = Runner(store, plan, attn, loading)
    with runner:
        report = measure(runner, tests, repetitions, machine, say)
    if as_json:
        _out(json.dumps(report.to_json()) + "\n")
    else:
        print_table(bench_conditions(report), "", bench_table(report))


def _model_or_default(model: str | None) -> str:
    if model is not None:
        return model
    click.echo(f"no model named: using the embedded {DEFAULT_MODEL}, a toy for trying things out", err=True)
    return DEFAULT_MODEL


def _read_prompt(prompt: str | None) -> str:
    """The prompt from the argument or stdin; refused before anything is loaded if it is no text."""
    if prompt is not None and prompt != "-":
        where, raw = "PROMPT", os.fsencode(prompt)
    elif sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise UsageError("no prompt: give one as an argument, or on stdin")
    else:
        where, raw = "stdin", sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise UsageError(f"{where}: is empty; give some text to continue")
    return text if where != "stdin" else text.rstrip("\n")


def _loaded(model: str | None, attention: str, **options: Any) -> Any:
    """The runner of a model, with what is shown while it is made ready."""
    name = _model_or_default(model)
    _quiet_libraries()
    from qmix.runner import load
    from qmix.terminal import ProgressDisplay

    making, loading = ProgressDisplay(f"quantizing {name}, once"), ProgressDisplay(f"loading {name}", LOADING_PATIENCE)
    with making, loading:
        return load(name, attention=attention, on_progress=making, on_load=loading, **options)


def _quiet_libraries() -> None:
    """Keep what transformers and torch say to their developers away from the user."""
    import warnings

    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _out(text: str) -> None:
    try:
        click.echo(text, nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise QmixError(f"stdout: {error.strerror}; give the answer another place to go") from None


def _run() -> Any:
    """Run the command that was typed; click's own `main` would put an empty line before an interrupt's."""
    if "_QMIX_COMPLETE" in os.environ:  # the shell asks what could follow
        return qmix.main()
    with qmix.make_context("qmix", sys.argv[1:]) as context:
        return qmix.invoke(context)


def main(run: Callable[[], Any] = _run) -> None:
    """The console command: every failure is one line on stderr and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the locale lacks is no reason to stop
    try:
        status = run()
    except click.exceptions.Exit as done:
        status = done.exit_code
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it at once, without a traceback
        if sys.stderr is not None and sys.stderr.isatty():
            click.echo(err=True)  # after the text, and the ^C that the terminal shows
        status = _fail(str(interrupt) or "interrupted", EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except QmixError as error:
        status = _fail(str(error), error.exit_code)
    except BrokenPipeError:  # whoever read stdout is gone: nothing is left to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    except OSError as error:
        status = _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)
    except MemoryError:
        status = _fail("out of memory; give a smaller --ram or --context", 1)
    except Exception as error:
        if os.environ.get("QMIX_DEBUG"):
            raise
        status = _fail(f"a bug in qmix: {type(error).__name__}: {error}; QMIX_DEBUG=1 shows where", 1)
    sys.exit(status or 0)


def _fail(message: str, status: int) -> int:
    first, *more = message.splitlines() or [""]
    click.echo(f"qmix: {' '.join((first, *more))}", err=True)
    return status


if __name__ == "__main__":
    main()
