"""OpenAI's request fields that qmix has no option for: which values are taken, and which are refused. Loads no torch.

A field is taken where its value leaves the answer as it is anyway. Any other value is an error of that request alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class Field:
    """A field with the values besides null that change nothing; None where no value changes an answer."""

    name: str
    neutral: tuple[Any, ...] | None
    why: str

    def takes(self, raw: msgspec.Raw) -> bool:
        if self.neutral is None:
            return True
        try:
            value = msgspec.json.decode(raw)
        except msgspec.DecodeError:  # a number beyond all others
            return False
        return value is None or any(_same(value, neutral) for neutral in self.neutral)


BOTH = (
    Field("user", None, "says who asks"),
    Field("stream_options", None, "shapes streams, which a batch has none of"),
    Field("stream", (False,), "a batch's answers are whole"),
    Field("n", (1,), "one answer a request"),
    Field("logit_bias", ({},), "no such option"),
    Field("frequency_penalty", (0,), "no such option; repetition_penalty is"),
    Field("presence_penalty", (0,), "no such option; repetition_penalty is"),
)
CHAT_FIELDS = (
    *BOTH,
    Field("store", None, "says what OpenAI keeps"),
    Field("metadata", None, "labels what OpenAI keeps"),
    Field("service_tier", None, "says how OpenAI serves it"),
    Field("safety_identifier", None, "says who asks"),
    Field("prompt_cache_key", None, "steers OpenAI's cache"),
    Field("prompt_cache_retention", None, "steers OpenAI's cache"),
    Field("prediction", None, "only speeds an answer up"),
    Field("parallel_tool_calls", None, "says how tools are called, and there are none"),
    Field("tools", ([],), "no tools are called"),
    Field("tool_choice", ("none", "auto"), "no tools are called"),
    Field("functions", ([],), "no tools are called"),
    Field("function_call", ("none", "auto"), "no tools are called"),
    Field("response_format", ({"type": "text"},), "answers are text without a format"),
    Field("modalities", (["text"],), "answers are text"),
    Field("audio", (), "answers are text"),
    Field("reasoning_effort", ("none",), "the model answers without reasoning first"),
    Field("verbosity", ("medium",), "no such option"),
    Field("web_search_options", (), "nothing is searched"),
)
COMPLETION_FIELDS = (
    *BOTH,
    Field("best_of", (1,), "one answer a request"),
    Field("echo", (False,), "answers leave the prompt out"),
    Field("suffix", ("",), "the model only continues"),
)
MESSAGE_FIELDS = (
    Field("name", None, "names who speaks, which templates do not show"),
    Field("refusal", (), "a refusal is no answer"),
    Field("annotations", None, "says where an earlier answer came from"),
    Field("audio", (), "messages are text"),
    Field("tool_calls", ([],), "no tools are called"),
    Field("function_call", (), "no tools are called"),
    Field("tool_call_id", (), "no tools are called"),
)
TOOL_ROLES = ("tool", "function")


def not_taken(fields: Iterable[Field], given: Mapping[str, msgspec.Raw], where: str = "") -> str | None:
    """Return what is said of the first field whose value would change the answer, None where all are taken."""
    for field in fields:
        if field.name in given and not field.takes(given[field.name]):
            return f"{where}{field.name}: qmix takes only {taken(field)} ({field.why}); leave it out"
    return None


def taken(field: Field) -> str:
    """Return the values that are taken, as JSON."""
    return " or ".join(["null", *(json.dumps(value) for value in field.neutral or ())])


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: 0 is 0.0, and false is not 0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
