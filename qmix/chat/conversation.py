"""Turns of a conversation and their token ids within a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmix.chat.format import Format, Said
from qmix.engine.prefixes import common_prefix
from qmix.errors import UsageError
from qmix.text.prompt import too_long
from qmix.units import plural

LEAST_SHARE_FOR_AN_ANSWER = 4  # a quarter of the context, or what an answer may have if that is less


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn with its system prompt and its ids: the first `kept` ids of the turns before, then `opening`, then the
    ids of the answer as they were generated."""

    user: str
    answer: str
    system: str
    kept: int
    opening: list[int]
    answer_ids: list[int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A turn without its answer. The first `forgotten` turns of the conversation are dropped from its ids."""

    user: str
    ids: list[int]
    forgotten: int


class Conversation:
    """Turns, oldest first; the first `forgotten` of them are dropped from the context."""

    def __init__(self, form: Format, context: int, system: str = "", longest_context: int = 0) -> None:
        self.form, self.context, self.system, self._longest_context = form, context, system, longest_context
        self.turns: list[Turn] = []
        self.forgotten = 0

    @property
    def ids(self) -> list[int]:
        """Return all token ids up to the end of the last answer, as they were computed."""
        return ids_of(self.turns)

    @property
    def state(self) -> tuple[list[Turn], int]:
        """The turns and the number of dropped ones, to be restored later."""
        return list(self.turns), self.forgotten

    @state.setter
    def state(self, before: tuple[list[Turn], int]) -> None:
        self.turns, self.forgotten = list(before[0]), before[1]

    def prompt(self, user: str, longest_answer: int) -> Prompt:
        """Return a new turn with the ids of the whole conversation; the oldest turns are dropped to leave room for an
        answer. Raises UsageError where the turn alone does not fit.
        """
        seen = self.turns[self.forgotten :]
        if seen and self.ids and seen[-1].system == self.system:
            ids = self.form.after(self.ids, self.system, _said(seen), user)
        else:
            ids = self.form.whole(self.system, _said(seen), user)
        room = min(longest_answer, max(1, self.context // LEAST_SHARE_FOR_AN_ANSWER))
        if len(ids) + room <= self.context:
            return Prompt(user, ids, self.forgotten)
        return self._shortened(user, room)

    def add(self, prompt: Prompt, answer: str, answer_ids: list[int]) -> None:
        """Add a prompt and its answer."""
        kept = common_prefix(self.ids, prompt.ids)
        self.turns.append(Turn(prompt.user, answer, self.system, kept, prompt.ids[kept:], answer_ids))
        self.forgotten = prompt.forgotten

    def take_back(self) -> Turn:
        """Remove and return the last turn. Raises UsageError where there is none."""
        if not self.turns:
            raise UsageError("nothing has been said yet")
        turn = self.turns.pop()
        if self.forgotten >= len(self.turns):
            self.forgotten = 0  # the turns that are left may fit again
        return turn

    def clear(self) -> None:
        self.turns, self.forgotten = [], 0

    def _shortened(self, user: str, room: int) -> Prompt:
        """Return the prompt without its oldest turns, half of the context free if possible: a cut costs a prefill."""
        candidates = [
            Prompt(user, self.form.whole(self.system, _said(self.turns[start:]), user), start)
            for start in range(self.forgotten + 1, len(self.turns) + 1)
        ] or [Prompt(user, self.form.whole(self.system, (), user), 0)]
        for limit in (self.context // 2, self.context - room, self.context - 1):
            for prompt in candidates:
                if len(prompt.ids) <= limit:
                    return prompt
        raise too_long(f"this turn is {plural(len(candidates[-1].ids), 'token')}", self.context, self._longest_context)


def ids_of(turns: Sequence[Turn]) -> list[int]:
    """Return all token ids of these turns."""
    ids: list[int] = []
    for turn in turns:
        ids = ids[: turn.kept] + turn.opening + turn.answer_ids
    return ids


def _said(turns: Sequence[Turn]) -> list[Said]:
    return [Said(turn.user, turn.answer) for turn in turns]
