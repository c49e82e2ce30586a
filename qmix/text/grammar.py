"""JSON schemas and grammars of answers, checked before a run by the library llguidance (extra `structured`).

A grammar is in llguidance's Lark form (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from qmix.errors import UsageError, arg

# At most a space, or a line end and its indent: a model that may repeat white space may never come to an end.
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r" |\n {0,40}"}
SCHEMA, GRAMMAR = arg("json_schema"), "grammar"
MOST_REFERENCES = 256  # whose recursion is checked, so that it takes no time; without end an answer just grows
LONGEST = 2**18  # characters of a schema or grammar


@lru_cache(maxsize=64)
def schema_source(schema: str, what: str = SCHEMA, lenient: bool = False) -> str:
    """Return llguidance's form of a JSON schema. Raises UsageError, which begins with `what`, where it cannot be used.

    That is: not JSON, not a schema, satisfied by no finite text, or with keywords that llguidance does not support;
    with `lenient` these are ignored.
    """
    _check_length(schema, what)
    try:
        content = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: invalid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{what}: a JSON schema must be an object")
    matcher, options = library(what).LLMatcher, JSON_OPTIONS | {"lenient": lenient}
    source = _checked(matcher.grammar_from_json_schema(schema, overrides=options), what)
    if not finite(content):
        raise UsageError(f"{what}: Unsatisfiable schema: it requires itself without end")
    return source


@lru_cache(maxsize=64)
def grammar_source(grammar: str) -> str:
    """Return llguidance's form of a Lark grammar. Raises UsageError where it cannot be used."""
    _check_length(grammar, GRAMMAR)
    return _checked(library(GRAMMAR).LLMatcher.grammar_from_lark(grammar), GRAMMAR)


def _check_length(text: str, what: str) -> None:
    if len(text) > LONGEST:
        raise UsageError(f"{what} of {len(text)} characters: must be at most {LONGEST}")


def _checked(source: str, what: str) -> str:
    if problem := str(library(what).LLMatcher.validate_grammar(source)):
        raise UsageError(f"{what}: {' '.join(problem.split())[:300]}")
    return source


def library(what: str) -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError(f"{what}: needs the package llguidance; pip install 'qmix-moe[structured]'") from None
    return llguidance


def finite(schema: Any) -> bool:
    """Return whether a schema has an instance of finite size: a reference may not require itself for ever.

    The references with finite instances are found as a least fixed point: none at first, then those that need no
    others, and so on.
    """
    targets = set(_references(schema))
    if len(targets) > MOST_REFERENCES:
        return True
    known: set[str] = set()
    while more := {ref for ref in targets - known if _ends(_target(schema, ref), known)}:
        known |= more
    return _ends(schema, known)


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(ref := schema.get("$ref"), str):
            yield ref
        schema = list(schema.values())
    for part in schema if isinstance(schema, list) else ():
        yield from _references(part)


def _target(schema: Any, ref: str) -> Any:
    """Return what a reference within a document points at (RFC 6901); True, any value, for others."""
    if ref != "#" and not ref.startswith("#/"):
        return True
    for part in ref.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        schema = schema[int(key)] if isinstance(schema, list) else schema.get(key, True)
    return schema


def _ends(schema: Any, known: Collection[str]) -> bool:
    """Return whether a schema has a finite instance if of all references only `known` have one."""
    if not isinstance(schema, dict):
        return True
    if "$ref" in schema and schema["$ref"] not in known:
        return False
    some = [schema[name] for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list)]
    properties, required = schema.get("properties", {}), schema.get("required", ())
    needed = [*schema.get("allOf", ()), *(properties[name] for name in required if name in properties)]
    least = schema.get("minItems", 0)
    prefix = schema.get("prefixItems", [])
    needed += prefix[:least] if isinstance(prefix, list) else []
    needed += [schema.get("items")] if least > len(prefix) else []
    return all(any(_ends(part, known) for part in parts) for parts in some) and all(
        _ends(part, known) for part in needed
    )
