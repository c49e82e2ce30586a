"""`qmix generate`: continue a text."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from typing import Any

import click

from qmix.commands.shared import (
    MODEL_HELP,
    draft_option,
    given,
    json_schema_option,
    live_option,
    live_screen,
    loaded,
    loading_options,
    max_new_tokens_option,
    out,
    read_json_schema,
    sampling_options,
    watched,
)
from qmix.errors import UsageError
from qmix.files import TEXT_LIMIT
from qmix.models import DEFAULT_MODEL


@click.command()
@click.argument("prompt", required=False)
@click.option("-m", "--model", metavar="MODEL", help=MODEL_HELP)
@loading_options
@max_new_tokens_option
@sampling_options
@draft_option
@json_schema_option
@click.option("-n", type=int, metavar="N", help="completions to generate, one after the other [1]")
@click.option("--logprobs", type=int, metavar="N", help="with --json: log-probabilities, and those of the N likeliest")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object a completion instead of streamed text")
@live_option
def generate(prompt: str | None, **options: Any) -> None:
    """Continue a prompt and stream the text to stdout.

    The prompt is PROMPT, or stdin if PROMPT is - or left out. With -n, each completion ends with a new line.
    """
    from qmix.engine.sampling import Sampling

    as_json = options.pop("as_json")
    screen = live_screen(options.pop("live"), f"qmix generate: {options['model'] or DEFAULT_MODEL}")
    if options["logprobs"] is not None and not as_json:
        raise UsageError("--logprobs: only with --json; give it, or leave --logprobs out")
    names = ("model", "ram", "gpu", "context", "precision", "clip", "dtype", "plan_path")
    loading = {name: options.pop(name) for name in names}
    attention = options.pop("attn")
    options["json_schema"] = read_json_schema(options["json_schema"])
    sampling = Sampling(**given(options))
    loading["structured"] = sampling.source is not None
    text = _read_prompt(prompt)
    with loaded(attention=attention, **loading) as runner:
        from qmix.terminal.tables import say

        show, tell = (out, say) if screen is None else (screen.out, screen.say)
        # whatever ends the loop ends the computation
        with watched(screen, runner), closing(runner.generate(text, sampling)) as pieces:
            for piece in pieces:
                if not as_json:
                    show(piece.text)
                if (result := piece.result) is not None:
                    show(json.dumps(result.to_json(), ensure_ascii=False) + "\n" if as_json else "\n")
                    tell(result.summary())


def _read_prompt(prompt: str | None) -> str:
    """Return the prompt from the argument or stdin. Raises UsageError where it is not text."""
    if prompt is not None and prompt != "-":
        where, raw = "PROMPT", os.fsencode(prompt)
    elif sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise UsageError("no prompt: give one as an argument or on stdin")
    else:
        where, raw = "stdin", sys.stdin.buffer.read(TEXT_LIMIT + 1)
    if len(raw) > TEXT_LIMIT:
        raise UsageError(f"{where}: longer than {TEXT_LIMIT} bytes, more than any context holds; shorten it")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise UsageError(f"{where}: is empty; give some text to continue")
    return text if where != "stdin" else text.rstrip("\n")
