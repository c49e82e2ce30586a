"""Tool calls in an answer: the grammar that a model's template writes them in, and the calls in an answer's tokens.

Two forms are known. Mistral's instruct models write `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`; models in
the Hermes format write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` for each call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qmix.errors import UsageError
from qmix.text.grammar import JSON_OPTIONS, schema_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qmix.text.chat_template import ChatTemplate, Tools

AUTO, REQUIRED = "auto", "required"
LIST, EACH = "[TOOL_CALLS]", "<tool_call>"
CLOSING = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of the tool of this `name`; `arguments` are a JSON object, as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolForm:
    """The form of a model's calls, which begin with `marker`. `token` and `closing` are the ids of special tokens."""

    marker: str
    token: int | None = None
    closing: int | None = None

    def grammar(self, tools: Tools, choice: str = AUTO, parallel: bool = True) -> str:
        """Return the Lark grammar of answers with calls of `tools`, for `Sampling.grammar`.

        `choice` is "auto" (text, calls, or text and then calls), "required" (calls), or the name of the tool to call.
        Without `parallel` there is one call at most. Keywords of the tools' parameters that llguidance does not
        support are ignored. Raises UsageError naming the tool, or the field of it, that cannot be used.
        """
        functions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
        if choice not in (AUTO, REQUIRED):
            functions = [function for function in functions if function["name"] == choice]
        if not functions:
            raise UsageError(f"tool_choice {choice[:100]!r}: is not among the tools")
        marker = _terminal(self.marker, self.token)
        calls = self._calls(marker, _one_call(functions), parallel)
        if choice != AUTO:
            start = [f"start: {marker} calls"]
        elif self.token is not None:  # which is in no text
            start = [f"start: TEXT ({marker} calls)?"]
        else:  # the shortest text up to a marker, so that none is passed over
            start = ["start: before calls | TEXT", f"before[lazy]: TEXT {marker}"]
        return "\n".join([*start, *calls, r"TEXT: /(.|\n)*/" if choice == AUTO else "", ""])

    def parse(self, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, list[ToolCall]]:
        """Return the text and the calls of an answer; all of it is text where a call is not complete."""
        text, calls = self._split(ids, decode)
        try:
            found = [ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in _read(calls)]
        except (ValueError, KeyError, TypeError, RecursionError):
            return decode(ids), []
        return text, found

    def _split(self, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, str]:
        """Return the text before the first marker, and what follows it."""
        if self.token is None:
            before, _, after = decode(ids).partition(self.marker)
            return before, after
        at = list(ids).index(self.token) if self.token in ids else len(ids)
        return decode(ids[:at]), decode(ids[at + 1 :])

    def _calls(self, marker: str, one: dict[str, Any], parallel: bool) -> list[str]:
        """Return the rules of what follows the first marker."""
        if self.marker == LIST:
            several = {"type": "array", "minItems": 1, "items": {"anyOf": one["anyOf"]}, "$defs": one["$defs"]}
            several |= {} if parallel else {"maxItems": 1}
            return [f'calls: (" " | "  ")? %json {_embedded(several)}']  # tokenizers may add a space
        more = rf' ("\n"? {marker} call)*' if parallel else ""
        return [f"calls: call{more}", rf'call: "\n"? %json {_embedded(one)} "\n"? {_terminal(CLOSING, self.closing)}']


def tool_form(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> ToolForm:
    """Return the form of a model's calls. Raises UsageError where its template has no tools, or an unknown form."""
    if not template.takes_tools:
        raise UsageError("tools: the model's chat template has no place for tools; leave them out")
    source = template.source(tools=True)
    marker = next((marker for marker in (LIST, EACH) if marker in source), None)
    if marker is None:
        raise UsageError("tools: the chat template writes calls in a form unknown to qmix; leave them out")
    special = {added.content: token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return ToolForm(marker, special.get(marker), special.get(CLOSING))


def _function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the function of a tool in OpenAI's form."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise UsageError(f"{where}: must be an object with 'type' \"function\" and a 'function'")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise UsageError(f"{where}.function.name: must be a text that is not empty")
    parameters = function.get("parameters") or {"type": "object"}
    schema_source(json.dumps(parameters), f"{where}.function.parameters", lenient=True)
    return {"name": function["name"], "parameters": parameters}


def _one_call(functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a call of one of several functions, whose parameters are definitions in it."""
    calls, definitions = [], {}
    for index, function in enumerate(functions):
        place = f"#/$defs/{index}"
        definitions[str(index)] = _moved(function["parameters"], place)
        properties = {"name": {"const": function["name"]}, "arguments": {"$ref": place}}
        whole = {"required": list(properties), "additionalProperties": False}
        calls.append({"type": "object", "properties": properties, **whole})
    return {"anyOf": calls, "$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references to itself point to where it is put in another."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(part, place) for name, part in schema.items()}
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#"):
        moved["$ref"] = place + ref[1:]
    return moved


def _embedded(schema: dict[str, Any]) -> str:
    return json.dumps(schema | {"x-guidance": JSON_OPTIONS | {"lenient": True}})


def _terminal(text: str, token: int | None) -> str:
    return json.dumps(text) if token is None else f"<[{token}]>"


def _read(calls: str) -> list[dict[str, Any]]:
    """Return the objects of calls: of a list, or one after the other between markers. Raises ValueError."""
    found: list[dict[str, Any]] = []
    decoder, left = json.JSONDecoder(), calls.strip()
    while left:
        value, end = decoder.raw_decode(left)
        found += value if isinstance(value, list) else [value]
        left = left[end:].strip().removeprefix(CLOSING).strip().removeprefix(EACH).strip()
    return found
