"""A model, a conversation with it, and the settings of its answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from qmix.chat.conversation import Conversation, Prompt, Turn
from qmix.chat.format import Format, format_of
from qmix.engine.completion import Piece, Result
from qmix.engine.sampling import Sampling
from qmix.engine.stream import Runner
from qmix.errors import UsageError
from qmix.text.detokenizer import Detokenizer


@dataclass(slots=True)
class Totals:
    """Counts of a session so far, of whole answers."""

    answers: int = 0
    prefilled: int = 0
    reused: int = 0
    generated: int = 0

    def add(self, result: Result) -> None:
        self.answers += 1
        self.prefilled += result.prefilled_tokens
        self.reused += result.reused_tokens
        self.generated += result.completion_tokens


@dataclass(slots=True)
class Answer:
    """An answer that is being generated. Iterate `pieces`, to the end or not, then call `keep`.

    `result` is set when the generation ends by itself. `forgotten` turns were dropped to make room for it; `before` is
    the state of the conversation to restore if there is no answer.
    """

    prompt: Prompt
    forgotten: int
    before: tuple[list[Turn], int]
    text: str = ""
    ids: list[int] = field(default_factory=list)
    result: Result | None = None
    pieces: Generator[str, None, None] = field(init=False)


class Session:
    """A model, a conversation and settings. `settings` are the fields of Sampling that were set; a seed among them is
    that of the first answer, and each later answer takes the next one."""

    def __init__(self, runner: Runner, settings: Mapping[str, Any], system: str = "") -> None:
        self.runner, self.settings = runner, dict(settings)
        form = format_of(runner.tokenizer)
        self.conversation = Conversation(form, runner.plan.context, system, runner.encoder.longest_context)
        self.totals = Totals()
        self._drawn = 0  # answers since the seed was set

    @property
    def form(self) -> Format:
        return self.conversation.form

    @property
    def most_bytes(self) -> int:
        """Return the bytes of the longest text that could fit the context."""
        return self.runner.encoder.most_bytes

    def set(self, name: str, value: object) -> None:
        """Change a setting; None restores the default. Raises UsageError where the value cannot be used."""
        changed = {key: known for key, known in self.settings.items() if key != name}
        changed |= {} if value is None else {name: value}
        Sampling(**changed)
        self.settings = changed
        if name == "seed":
            self._drawn = 0

    def ask(self, text: str, again: bool = False) -> Answer:
        """Start the answer to a new turn; with `again` the turn replaces the last one.

        Raises UsageError where the turn is empty or does not fit the context.
        """
        if not text.strip():
            raise UsageError("the turn is empty; give some text")
        self.runner.encoder.check(text, "this turn")
        self.runner.encoder.check(self.conversation.system, "the system prompt")
        sampling, conversation, before = self._sampling(), self.conversation, self.conversation.state
        try:
            if again:
                conversation.take_back()
            prompt = conversation.prompt(text, sampling.max_new_tokens)
            pieces = self.runner.generate(prompt.ids, sampling, reuse=True)
        except BaseException:
            conversation.state = before
            raise
        answer = Answer(prompt, prompt.forgotten - conversation.forgotten, before)
        answer.pieces = self._texts(pieces, answer)
        return answer

    def drop(self, answer: Answer) -> None:
        """Restore the conversation before an answer that failed."""
        self.conversation.state = answer.before

    def keep(self, answer: Answer) -> bool:
        """Add an answer, whole or stopped, to the conversation. Returns False, and drops it, where it has no token."""
        self._drawn += 1
        if answer.result is not None:
            self.totals.add(answer.result)
        if not answer.ids:
            self.conversation.state = answer.before
            return False
        decode = self.runner.decode
        ids = shown_ids(decode, answer.prompt.ids, answer.ids, answer.text)
        text = answer.text.strip() if self.form.takes_roles else answer.text
        self.conversation.add(answer.prompt, text, ids)
        return True

    def _texts(self, pieces: Iterator[Piece], answer: Answer) -> Generator[str, None, None]:
        """Yield the text to show, piece by piece; leading space of a chat model's answer is dropped."""
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                bare = piece.text if answer.text.strip() or not self.form.takes_roles else piece.text.lstrip()
                answer.text += piece.text
                answer.ids += piece.token_ids
                if piece.result is not None:
                    answer.result = piece.result
                    answer.ids = piece.result.token_ids
                if bare:
                    yield bare

    def _sampling(self) -> Sampling:
        changed = dict(self.settings)
        changed.setdefault("max_new_tokens", self.runner.plan.context)
        if "seed" in changed:
            changed["seed"] = (changed["seed"] + self._drawn) % 2**63
        return Sampling(**changed)


def shown_ids(
    decode: Callable[[Sequence[int]], str], prompt: Sequence[int], ids: Sequence[int], text: str
) -> list[int]:
    """Return the ids of an answer up to the end of the text that was shown, without a stop sequence."""
    detokenizer, so_far, kept = Detokenizer(decode, prompt), "", 0
    for count, token in enumerate(ids, 1):
        so_far += detokenizer.add(token)
        if not text.startswith(so_far):
            return list(ids[:kept])
        kept = count
    return list(ids)
