"""Turn a conversation into token ids, by the model's chat template or as the continuation of a text.

Answers keep the ids that were generated: encoding their text may give other ids, and the KV cache would be lost from
there on. So only a new turn is encoded: the part that it adds to the rendered conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from qmix.errors import StoreError
from qmix.text.chat_template import PROBE, ChatTemplate, TemplateRefusal
from qmix.text.tokenizer import encode


@dataclass(frozen=True, slots=True)
class Said:
    """The texts of one turn."""

    user: str
    answer: str


class Format(Protocol):
    """A way to encode conversations.

    `takes_roles` is false for a base model; `takes_system` is false where the system prompt is put into the first turn.
    """

    takes_roles: bool
    takes_system: bool

    def whole(self, system: str, said: Sequence[Said], user: str) -> list[int]:
        """Return the ids of a conversation and a new turn, encoded from the texts."""
        ...

    def after(self, ids: list[int], system: str, said: Sequence[Said], user: str) -> list[int]:
        """Return `ids`, the conversation as it was computed, followed by a new turn.

        It differs from `whole` only in the ids of the answers, which are as generated. Where the template changes the
        text before a new turn, it is `whole`.
        """
        ...


def format_of(tokenizer: PreTrainedTokenizerBase) -> Format:
    """Return the format of a tokenizer's template, or the plain one. Raises StoreError where the template fails."""
    return TemplateFormat(tokenizer) if tokenizer.chat_template else PlainFormat(tokenizer)


class TemplateFormat:
    """The format of the tokenizer's chat template."""

    takes_roles = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template = ChatTemplate(tokenizer)
        try:
            self._template.text([{"role": "user", "content": PROBE}], True)
            self._closing = self._behind_an_answer()
        except TemplateRefusal as error:
            raise StoreError(f"{error}; the chat template cannot be used; restore the model's own") from None
        self.takes_system = self._template.takes_system

    def whole(self, system: str, said: Sequence[Said], user: str) -> list[int]:
        return self._template.ids(self._messages(system, said, user), True)

    def after(self, ids: list[int], system: str, said: Sequence[Said], user: str) -> list[int]:
        messages = self._messages(system, said, user)
        before, now = self._template.ids(messages[:-1], False), self._template.ids(messages, True)
        asked = self._template.text(messages[:-2], True)  # the text of `ids` without the last answer
        if now[: len(before)] != before or not self._template.text(messages[:-1], False).startswith(asked):
            return now
        return ids + _missing(ids, self._closing) + now[len(before) :]

    def _messages(self, system: str, said: Sequence[Said], user: str) -> list[dict[str, str]]:
        messages = []
        for turn in said:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
        messages.append({"role": "user", "content": user})
        if system and self.takes_system:
            return [{"role": "system", "content": system}, *messages]
        if system:
            messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
        return messages

    def _behind_an_answer(self) -> list[int]:
        """Return the ids that the template puts after an answer: the end that two different answers share."""
        one, other = (
            self._template.ids([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], False)
            for answer in ("0", "1")
        )
        same = next((at for at, pair in enumerate(zip(one[::-1], other[::-1], strict=False)) if pair[0] != pair[1]), 0)
        return one[len(one) - same :]


class PlainFormat:
    """One text that user and model write in turns. It begins with the system prompt."""

    takes_roles = takes_system = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def whole(self, system: str, said: Sequence[Said], user: str) -> list[int]:
        text = f"{system}\n\n" if system else ""
        for turn in said:
            text = _joined(text, turn.user) + turn.answer
        return encode(self._tokenizer, _joined(text, user))

    def after(self, ids: list[int], system: str, said: Sequence[Said], user: str) -> list[int]:
        end = self._tokenizer.eos_token_id
        while ids and ids[-1] == end:  # the text continues
            ids = ids[:-1]
        last = (said[-1].user + said[-1].answer)[-1:]
        return ids + self._encoded_behind(last, _joined(last, user)[len(last) :])

    def _encoded_behind(self, anchor: str, text: str) -> list[int]:
        """Return the ids of a text that follows a character; a tokenizer may add a space at the start of a text."""
        before, both = (encode(self._tokenizer, part, add_special_tokens=False) for part in (anchor, anchor + text))
        if both[: len(before)] == before:
            return both[len(before) :]
        return encode(self._tokenizer, text, add_special_tokens=False)


def _joined(before: str, after: str) -> str:
    """Join two texts, with a space between them where neither has one."""
    apart = not before or before[-1].isspace() or after[:1].isspace()
    return before + ("" if apart else " ") + after


def _missing(ids: list[int], closing: list[int]) -> list[int]:
    """Return the part of `closing` that the ids do not end with yet: a model may have generated some of it."""
    there = next(count for count in range(len(closing), -1, -1) if ids[len(ids) - count :] == closing[:count])
    return closing[there:]
