"""The JSON of a request in OpenAI's and in the short form, with one schema of options for both. Loads no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

Fields = dict[str, msgspec.Raw]


class Envelope(msgspec.Struct):
    """A line in OpenAI's form."""

    custom_id: str
    url: str
    body: Fields
    method: str | None = None


class Identity(msgspec.Struct):
    """The fields of a line in the short form, beside its options."""

    id: str | int


class NamedSchema(msgspec.Struct):
    """A schema with what OpenAI puts beside it; the answer always follows the schema."""

    schema: msgspec.Raw
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class Options(msgspec.Struct, kw_only=True):
    """The options of a request; null leaves one to the command line."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None


class ChatBody(Options, kw_only=True):
    messages: list[Fields]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(Options, kw_only=True):
    prompt: str | list[int | str | list[int]]
    logprobs: int | None = None


class Part(msgspec.Struct):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
