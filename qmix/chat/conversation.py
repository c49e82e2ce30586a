"""Turns of a conversation and their token ids, within a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmix.chat.format import Format, Said
from qmix.engine.stream import common_prefix
from qmix.errors import UsageError
from qmix.text.prompt import too_long
from qmix.units import plural

LEAST_SHARE_FOR_AN_ANSWER = 4  # a quarter of the context, or what an answer may have if that is less


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said, under which system text, and its ids: the first `kept` of all that lay before, then `opening`,
    then the answer's as they were generated."""

    user: str
    answer: str
    system: str
    kept: int
    opening: list[int]
    answer_ids: list[int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A turn that waits for its answer. `forgotten` turns of the conversation are not in its ids any more."""

    user: str
    ids: list[int]
    forgotten: int


class Conversation:
    """Turns, oldest first; the first `forgotten` of them the model does not see any more."""

    def __init__(self, form: Format, context: int, system: str = "", longest_context: int = 0) -> None:
        self.form, self.context, self.system, self._longest_context = form, context, system, longest_context
        self.turns: list[Turn] = []
        self.forgotten = 0

    @property
    def ids(self) -> list[int]:
        """All token ids up to the end of the last answer, as they were computed."""
        return ids_of(self.turns)

    @property
    def state(self) -> tuple[list[Turn], int]:
        """What can be returned to."""
        return list(self.turns), self.forgotten

    @state.setter
    def state(self, before: tuple[list[Turn], int]) -> None:
        self.turns, self.forgotten = list(before[0]), before[1]

    def prompt(self, user: str, longest_answer: int) -> Prompt:
        """The ids of a new turn with what comes before it; the oldest turns go where there is no room for an answer.

        Raises UsageError where the turn alone does not fit.
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
        """Note the answer to a prompt."""
        kept = common_prefix(self.ids, prompt.ids)
        self.turns.append(Turn(prompt.user, answer, self.system, kept, prompt.ids[kept:], answer_ids))
        self.forgotten = prompt.forgotten

    def take_back(self) -> Turn:
        """Forget the last turn. Raises UsageError where there is none."""
        if not self.turns:
            raise UsageError("nothing has been said yet")
        turn = self.turns.pop()
        if self.forgotten >= len(self.turns):
            self.forgotten = 0  # what is left may fit again
        return turn

    def clear(self) -> None:
        self.turns, self.forgotten = [], 0

    def _shortened(self, user: str, room: int) -> Prompt:
        """Without its oldest turns, half of the context free if possible: each cut costs a prefill of what is left."""
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
    """All token ids of these turns."""
    ids: list[int] = []
    for turn in turns:
        ids = ids[: turn.kept] + turn.opening + turn.answer_ids
    return ids


def _said(turns: Sequence[Turn]) -> list[Said]:
    return [Said(turn.user, turn.answer) for turn in turns]
