"""Render messages by the model's chat template, within limits of time, memory and length.

A template is a program that came with a model. It runs in a process of its own (`template_child.py`), which starts with
the first text and ends with this process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qmix.errors import QmixError, StoreError
from qmix.text.tokenizer import TEMPLATE, encode

CHILD = Path(__file__).with_name("template_child.py")
MEMORY = 2**29  # bytes of address space for rendering, Python's own 50 MB included
SECONDS = 5  # of CPU time for one text
LONGEST = 2**24  # characters of one text
PROBE = "qmix-probe"  # in no template
PROBE_TOOL = {"type": "function", "function": {"name": PROBE, "description": PROBE, "parameters": {"type": "object"}}}
Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]]


class TemplateRefusal(QmixError):
    """The template rejects these messages; the error names its line."""


class ChatTemplate:
    """A tokenizer's chat template. `takes_system` is false where it has no place for a system message.

    Raises StoreError where the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.path = _path_of(tokenizer)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise StoreError(f"{self.path}: {str(error).splitlines()[0]}") from None
        self._variables = {"tools": None, "documents": None} | {
            name: value if isinstance(value, list) else str(value)
            for name, value in tokenizer.special_tokens_map.items()
        }
        self.takes_system = self._shows_system()

    def ids(self, messages: Messages, asks: bool, tools: Tools = ()) -> list[int]:
        """Return the token ids of messages; parameters and errors as `text`."""
        return encode(self._tokenizer, self.text(messages, asks, tools), add_special_tokens=False)

    def text(self, messages: Messages, asks: bool, tools: Tools = ()) -> str:
        """Return messages as text; where it `asks`, with the beginning of an answer. Raises TemplateRefusal.

        `tools` are in OpenAI's form; a template that does not take them shows none (`takes_tools`).
        """
        variables = self._variables | {"messages": list(messages), "add_generation_prompt": asks}
        variables |= {"tools": list(tools)} if tools else {}
        answer = self._ask({"template": self.source(bool(tools)), "variables": variables})
        if "text" in answer:
            return str(answer["text"])
        where = self.path if answer["line"] is None else f"{self.path}: line {answer['line']}"
        raise TemplateRefusal(f"{where}: {answer['error']}")

    def source(self, tools: bool) -> str:
        """Return the template itself; some models have another one for messages with tools."""
        return str(self._tokenizer.get_chat_template(tools=[PROBE_TOOL])) if tools else self._template

    @cached_property
    def takes_tools(self) -> bool:
        """Return whether tools appear in the text."""
        try:
            return PROBE in self.text([{"role": "user", "content": "a"}], True, [PROBE_TOOL])
        except TemplateRefusal:
            return False

    def _shows_system(self) -> bool:
        """Return whether a system message appears in the text: some templates raise, some leave it out."""
        try:
            return PROBE in self.text([{"role": "system", "content": PROBE}, {"role": "user", "content": "a"}], True)
        except TemplateRefusal:
            return False

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BaseException as error:  # interrupts included: the pipe may hold half a message
            _end(process)
            self._process = None
            if not isinstance(error, BrokenPipeError):
                raise
            line = b""
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        _end(process)
        self._process = None
        return {"error": f"takes more than {SECONDS} s or {MEMORY >> 20} MiB", "line": None}

    def _start(self) -> subprocess.Popen[bytes]:
        bounds = map(str, (MEMORY, SECONDS, LONGEST))
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), *bounds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must not reach it
        )
        weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # unsent bytes
                stream.close()
    process.wait()


def _path_of(tokenizer: PreTrainedTokenizerBase) -> Path:
    directory = Path(tokenizer.name_or_path)
    return directory / (TEMPLATE if (directory / TEMPLATE).is_file() else "tokenizer_config.json")
