"""`qmix generate`: continue a text, or answer one message."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.options import (
    MODEL_HELP,
    draft_option,
    json_schema_option,
    live_option,
    loading_options,
    max_new_tokens_option,
    sampling_options,
    system_options,
)
from qmix.commands.shared import given, live_screen, loaded, out, read_json_schema, refuse, system_text, watched
from qmix.errors import UsageError
from qmix.files import TEXT_LIMIT, read_text
from qmix.models import DEFAULT_MODEL
from qmix.terminal.voice import say

if TYPE_CHECKING:
    from qmix.engine.completion import Piece
    from qmix.terminal.live import LiveScreen

FILE = click.Path(path_type=Path)
CHAT_HELP = "PROMPT is a message: the model's chat template makes the prompt of it, and the text is the answer"
TEMPLATE_HELP = "chat template (Jinja) in place of the model's; implies --chat"
JSONL_HELP = "print one JSON object a piece of text as it comes, and one with the result after each completion"
LOGPROBS_HELP = "with --json or --jsonl: log-probabilities, and those of the N likeliest"


@click.command(context_settings={"allow_extra_args": True})
@click.argument("prompt", required=False)
@click.option("-m", "--model", metavar="MODEL", help=MODEL_HELP)
@click.option("--prompt-file", type=FILE, metavar="FILE", help="read the prompt from a file")
@click.option("--chat", is_flag=True, help=CHAT_HELP)
@system_options
@click.option("--chat-template", type=FILE, metavar="FILE", help=TEMPLATE_HELP)
@loading_options
@max_new_tokens_option
@sampling_options
@draft_option
@json_schema_option
@click.option("-n", type=int, metavar="N", help="completions to generate, one after the other [1]")
@click.option("--logprobs", type=int, metavar="N", help=LOGPROBS_HELP)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object a completion instead of streamed text")
@click.option("--jsonl", "as_jsonl", is_flag=True, help=JSONL_HELP)
@live_option
def generate(prompt: str | None, prompt_file: Path | None, **options: Any) -> None:
    """Continue a prompt and stream the text to stdout.

    The prompt is PROMPT, or stdin if PROMPT is - or left out. With -n, each completion ends with a new line.
    """
    _check_words(prompt, click.get_current_context())
    from qmix.engine.sampling import Sampling

    as_json, as_jsonl = options.pop("as_json"), options.pop("as_jsonl")
    if options["logprobs"] is not None and not (as_json or as_jsonl):
        raise UsageError("--logprobs: only with --json or --jsonl; give one of them, or leave --logprobs out")
    if as_json and as_jsonl:
        raise UsageError("--json and --jsonl: leave one of them out")
    template = options.pop("chat_template")
    message = options.pop("chat") or template is not None
    system = options.pop("system"), options.pop("system_file")
    if not message:
        refuse(("system", "system_file"), "only with --chat; give it")
    screen = live_screen(options.pop("live"), f"qmix generate: {options['model'] or DEFAULT_MODEL}")
    names = ("model", "ram", "gpu", "context", "precision", "clip", "dtype", "plan_path")
    loading = {name: options.pop(name) for name in names}
    attention = options.pop("attn")
    options["json_schema"] = read_json_schema(options["json_schema"])
    sampling = Sampling(**given(options))
    loading["structured"] = sampling.source is not None
    instructions = system_text(*system) if message else None
    source = None if template is None else read_text(template.expanduser(), f"--chat-template {template}")
    text = _read_prompt(prompt, prompt_file)
    with loaded(attention=attention, **loading) as runner:
        start = _as_message(runner, text, instructions or "", source) if message else text
        # whatever ends the loop ends the computation
        with watched(screen, runner), closing(runner.generate(start, sampling)) as pieces:
            _show(pieces, message, as_json, as_jsonl, screen)


def _show(pieces: Iterable[Piece], message: bool, as_json: bool, as_jsonl: bool, screen: LiveScreen | None) -> None:
    """Write completions as they come, as text or JSON, and a line of statistics after each."""
    index, began = 0, not message
    show, tell = (out, say) if screen is None else (screen.out, screen.say)
    for piece in pieces:
        if as_jsonl:
            show(_line(piece, index))
        elif not as_json:
            shown = piece.text if began else piece.text.lstrip()  # an answer begins with its first word
            began = began or bool(shown)
            show(shown)
        if (result := piece.result) is not None:
            if not as_jsonl:
                show(json.dumps(result.to_json(), ensure_ascii=False) + "\n" if as_json else "\n")
            index, began = index + 1, not message
            tell(result.summary())


def _line(piece: Piece, index: int) -> str:
    """Return the line of a piece: its text and ids, and the result where it is a completion's last."""
    content: dict[str, Any] = {"completion": index, "text": piece.text, "token_ids": piece.token_ids}
    if piece.result is not None:
        content = {"completion": index, "result": piece.result.to_json()}
    return json.dumps(content, ensure_ascii=False) + "\n"


def _as_message(runner: Any, text: str, system: str, template: str | None) -> list[int]:
    """Return the ids of a user's message as the model's chat template, or `template`, renders it."""
    from qmix.chat.format import format_of

    if template is not None:
        runner.tokenizer.chat_template = template
    if not runner.tokenizer.chat_template:
        raise UsageError("--chat: the model has no chat template; give one with --chat-template, or leave --chat out")
    for part, what in ((text, "the prompt"), (system, "the system prompt")):
        runner.encoder.check(part, what)
    form = format_of(runner.tokenizer)
    if system and not form.takes_system:
        say("the chat template has no system role; the system prompt goes into the message")
    ids = form.whole(system, (), text)
    runner.encoder.check_count(len(ids))
    return ids


def _check_words(prompt: str | None, context: click.Context) -> None:
    """Raise UsageError where the first word is a model's name, or where there are several words."""
    words = context.args
    typed = context.get_parameter_source("model") is click.core.ParameterSource.COMMANDLINE
    if prompt is not None and not typed and _is_model(prompt, surely=not words):
        rest = shlex.join(words) if words else "PROMPT"
        raise UsageError(
            f"{prompt}: is a model, and this is the place of the prompt; type `qmix generate -m "
            f"{shlex.quote(prompt)} {rest}`"
        )
    if words:
        whole = shlex.quote(" ".join([prompt or "", *words]))
        raise UsageError(f"{words[0]}: the prompt is one argument; quote it: `qmix generate {whole}`")


def _is_model(name: str, surely: bool) -> bool:
    """Return True if a word names a model: an embedded or published one, a directory of one, or else a Hub id."""
    from qmix.checkpoint import hub
    from qmix.models import EMBEDDED
    from qmix.models.published import PUBLISHED

    if name in EMBEDDED or name in PUBLISHED:
        return True
    try:
        if any((Path(name).expanduser() / file).is_file() for file in ("qmix.json", "config.json", "params.json")):
            return True
    except (OSError, ValueError, RuntimeError):  # no path at all
        return False
    return not surely and hub.parse(name) is not None


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from the argument, a file or stdin. Raises UsageError where it is not text."""
    if file is not None and prompt is not None:
        raise UsageError("PROMPT and --prompt-file: leave one of them out")
    if file is not None:
        return _not_empty(read_text(file.expanduser(), f"--prompt-file {file}").rstrip("\n"), f"--prompt-file {file}")
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
    return _not_empty(text if where != "stdin" else text.rstrip("\n"), where)


def _not_empty(text: str, where: str) -> str:
    if not text.strip():
        raise UsageError(f"{where}: is empty; give some text to continue")
    return text
