"""Render chat templates, which are programs from the Hub, in a process with limited memory and time.

`python -I template_child.py MEMORY SECONDS OUTPUT` reads one request a line from stdin, JSON with the template and its
variables. It answers each with a line on stdout: the text, or the error and its line in the template. It is started by
its path, imports only jinja2, and renders as transformers' `apply_chat_template` does.
"""

from __future__ import annotations

import json
import resource
import sys
import traceback
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks an assistant's text for training; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_rendered"), [], [], body).set_lineno(line)

    def _rendered(self, caller: Any) -> Any:
        return caller()


class TemplateDict:
    """`dict` without its attributes."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments, **named)


class TemplateNamespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, *given = arguments
        attributes = dict(*given, **named)
        for name in attributes:
            _checked(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _checked(name)
        Namespace.__setitem__(self, name, value)


def _checked(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """Return a template as transformers compiles it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    environment.globals |= {"dict": TemplateDict(), "namespace": TemplateNamespace}
    return environment.from_string(template)


def render(template: str, variables: dict[str, Any], longest: int) -> str:
    """Return the text. Raises ValueError where it exceeds `longest` characters, and whatever the template raises."""
    parts, size = [], 0
    for part in compiled(template).generate(**variables):
        size += len(part)
        if size > longest:
            raise ValueError(f"makes more than {longest} characters")
        parts.append(part)
    return "".join(parts)


def answer(request: dict[str, Any], longest: int) -> dict[str, Any]:
    """Return the reply to a request: the text, or an error."""
    try:
        return {"text": render(request["template"], request["variables"], longest)}
    except MemoryError:
        return {"error": "takes too much memory", "line": None}
    except RecursionError:
        return {"error": "calls itself too often", "line": None}
    except Exception as error:
        lines = str(error).split("\n")[0][:200] or type(error).__name__
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else (own[-1] if own else None)
        return {"error": lines, "line": line}


def main() -> None:
    memory, seconds, longest = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        sys.stdout.write(json.dumps(answer(json.loads(line), longest)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
