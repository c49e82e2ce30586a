"""Tools in requests: the grammar of an answer, calls in a conversation, and calls in an answer.

Inside the server tools and calls have the form of OpenAI's chat completions. Other interfaces translate from and to it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from qmix.batch.prompts import Asking, LineRefused
from qmix.batch.request import LineError
from qmix.batch.schema import Fields
from qmix.engine.completion import BatchResult
from qmix.text.tools import AUTO, ToolForm, tool_form

ID_LENGTH = 9  # Mistral's templates refuse any other
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A call in an answer; `arguments` are a JSON object, as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tooling:
    """The tools of one request: the form of the model's calls, and the grammar of its answer."""

    form: ToolForm
    tools: list[dict[str, Any]]
    grammar: str
    decode: Callable[[Sequence[int]], str]

    def holds(self, token: int) -> bool:
        """Return whether the text from this token on may be a call, which is not shown as text."""
        return self.form.token in (None, token)

    def read(self, result: BatchResult) -> tuple[str, list[Call]]:
        """Return the text and the calls of an answer."""
        text, calls = self.form.parse(result.token_ids, self.decode)
        if not calls:
            return result.text, []
        return text, [Call(secrets.token_hex(ID_LENGTH)[:ID_LENGTH], call.name, call.arguments) for call in calls]

    def rest(self, text: str, calls: Sequence[Call], sent: int) -> str:
        """Return the text of a stream's end, after `sent` characters: with calls, all before them has been sent."""
        return text[sent:] if not calls or self.form.token is None else ""


def tooling(given: Fields, asking: Asking, decode: Callable[[Sequence[int]], str]) -> Tooling | None:
    """Take the tools out of a body; None where the model may call none. Raises LineError, LineRefused, UsageError."""
    tools, choice, parallel = (
        msgspec.json.decode(given.pop(name, b"null")) for name in ("tools", "tool_choice", "parallel_tool_calls")
    )
    if isinstance(choice, dict):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, dict) else None
        if not isinstance(choice, str):
            raise LineError("tool_choice: must be 'none', 'auto', 'required', or name a function")
    if not tools or choice == "none":
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise LineError("tools: must be a list of objects")
    if "response_format" in given:
        raise LineError("response_format: not together with tools; leave one of them out")
    if asking.template is None:
        raise LineRefused("tools: the model has no chat template; leave them out")
    form = tool_form(asking.template, asking.encoder.tokenizer)
    return Tooling(form, tools, form.grammar(tools, choice or AUTO, parallel is not False), decode)


def without_calls(given: Fields) -> dict[int, Message]:
    """Make plain texts of a body's messages that are calls, or results of tools; return what they lost, by index."""
    lost: dict[int, Message] = {}
    messages = msgspec.json.decode(given.get("messages", b"null"))
    if not isinstance(messages, list):
        return lost
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        where = f"messages[{index}]"
        if message.get("role") == "tool":
            if not isinstance(message.get("tool_call_id"), str):
                raise LineError(f"{where}.tool_call_id: is missing")
            lost[index] = {"role": "tool", "tool_call_id": message.pop("tool_call_id")}
            message["role"] = "user"
        elif message.get("tool_calls"):
            lost[index] = {"tool_calls": _calls(message.pop("tool_calls"), where)}
            message["content"] = message.get("content") or ""
    if lost:
        given["messages"] = msgspec.Raw(msgspec.json.encode(messages))
    return lost


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls as templates take them: their arguments are objects, not texts."""
    found = []
    for index, call in enumerate(calls if isinstance(calls, list) else [calls]):
        place = f"{where}.tool_calls[{index}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise LineError(f"{place}: must be an object with 'name' and 'arguments'")
        try:
            arguments = msgspec.json.decode(function.get("arguments") or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, TypeError):
            raise LineError(f"{place}.arguments: must be a JSON object as text") from None
        function = {"name": function["name"], "arguments": arguments}
        found.append({"id": str(call.get("id", ""))[:100], "type": "function", "function": function})
    return found
