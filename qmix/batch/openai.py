"""OpenAI's request fields that qmix does not support, with the values that it accepts. Loads no torch.

A value is accepted where it does not change the answer. Any other value is an error of that request alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class Field:
    """A field with its neutral values besides null, None where no value changes the answer."""

    name: str
    neutral: tuple[Any, ...] | None
    why: str

    def takes(self, raw: msgspec.Raw) -> bool:
        if self.neutral is None:
            return True
        try:
            value = msgspec.json.decode(raw)
        except msgspec.DecodeError:  # a number out of range
            return False
        return value is None or any(_same(value, neutral) for neutral in self.neutral)


BOTH = (
    Field("user", None, "identifies the user"),
    Field("stream_options", None, "only for streams"),
    Field("stream", (False,), "a batch does not stream"),
)
CHAT_FIELDS = (
    *BOTH,
    Field("store", None, "storage at OpenAI"),
    Field("metadata", None, "labels for storage at OpenAI"),
    Field("service_tier", None, "only for OpenAI's service"),
    Field("safety_identifier", None, "identifies the user"),
    Field("prompt_cache_key", None, "only for OpenAI's cache"),
    Field("prompt_cache_retention", None, "only for OpenAI's cache"),
    Field("prediction", None, "only changes the speed"),
    Field("parallel_tool_calls", None, "no tools are called"),
    Field("tools", ([],), "no tools are called"),
    Field("tool_choice", ("none", "auto"), "no tools are called"),
    Field("functions", ([],), "no tools are called"),
    Field("function_call", ("none", "auto"), "no tools are called"),
    Field("modalities", (["text"],), "answers are text"),
    Field("audio", (), "answers are text"),
    Field("reasoning_effort", ("none",), "the model has no reasoning step"),
    Field("verbosity", ("medium",), "not supported"),
    Field("web_search_options", (), "no web search"),
)
COMPLETION_FIELDS = (
    *BOTH,
    Field("best_of", (1,), "all answers are returned; use n"),
    Field("echo", (False,), "answers do not repeat the prompt"),
    Field("suffix", ("",), "the model only continues"),
)
MESSAGE_FIELDS = (
    Field("name", None, "templates do not show names"),
    Field("refusal", (), "refusals are not supported"),
    Field("annotations", None, "sources of an earlier answer"),
    Field("audio", (), "messages are text"),
    Field("tool_calls", ([],), "no tools are called"),
    Field("function_call", (), "no tools are called"),
    Field("tool_call_id", (), "no tools are called"),
)
TOOL_ROLES = ("tool", "function")


def not_taken(fields: Iterable[Field], given: Mapping[str, msgspec.Raw], where: str = "") -> str | None:
    """Return the message about the first field whose value would change the answer, None where there is none."""
    for field in fields:
        if field.name in given and not field.takes(given[field.name]):
            return f"{where}{field.name}: qmix takes only {taken(field)} ({field.why}); leave it out"
    return None


def taken(field: Field) -> str:
    """Return the accepted values as JSON."""
    return " or ".join(["null", *(json.dumps(value) for value in field.neutral or ())])


def _same(value: Any, neutral: Any) -> bool:
    """Return whether two values are equal as JSON: 0 is 0.0, and false is not 0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
